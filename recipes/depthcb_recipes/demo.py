"""The main job in one go: two depth profiles, standard and equal-step, under AdamW and under SGD with momentum."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import wandb
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from transformers import PreTrainedModel

from depthcb import DepthProfile, EqualStep, UpdateRatioMonitor
from depthcb.compare import null_profiles
from depthcb.probe import Probe
from depthcb.reference import Reference
from depthcb.report import print_runs, write_html, write_png
from depthcb.report.groups import groups
from depthcb.run import Run, read_runs, write_header, write_null
from depthcb.similarity import find_measures
from depthcb.study.store import write_whole
from depthcb_recipes.backbones import load_backbone
from depthcb_recipes.causal_lm import CausalLM
from depthcb_recipes.corpus import corpus_fingerprint, python_corpus
from depthcb_recipes.data import PackedText
from depthcb_recipes.objective import OptimizerName
from depthcb_recipes.quiet import quiet_libraries

OPTIMIZERS: tuple[OptimizerName, ...] = ("adamw", "sgd")
CONTROLS = ("standard", "equal-step")
MEASURES = ("cka", "cka_normalized")
#: Coupled decay would rule the clipped gradient of SGD and make all step ratios alike by itself.
WEIGHT_DECAY: dict[OptimizerName, float] = {"adamw": 0.01, "sgd": 0.0}


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


def run_demo(settings: Settings, out: Path, console: Console) -> list[Run]:
    """Runs the four fits and leaves a report in ``out``, of what was measured so far when interrupted.

    Args:
        settings: What to run.
        out: Folder for ``summary.json``, ``profiles.png``, ``report.html`` and one folder a run; made if missing.
        console: Where progress, tables and verdicts are printed.

    Returns:
        The runs, as their folders hold them.

    Raises:
        ValueError: Settings that cannot be run, or a folder that holds something else.
        SystemExit: With code 130, after an interrupt.
    """
    _check(settings, out)
    try:
        with quiet_libraries(), _progress(console) as progress:
            _run_arms(settings, out, progress)
    except (KeyboardInterrupt, SystemExit):  # Lightning turns the first into the second
        console.print("[yellow]Interrupted: what was measured so far follows.[/]")
        _write_report(settings, out, console)
        raise SystemExit(130) from None
    return _write_report(settings, out, console)


def _run_arms(settings: Settings, out: Path, progress: Progress) -> None:
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
    model = copy.deepcopy(pretrained)
    reference: Reference | None = None
    for optimizer in OPTIMIZERS:
        for control in CONTROLS:
            model.load_state_dict(pretrained.state_dict())
            arm = Arm(settings, optimizer, control, out, probe, reference)
            arm.fit(model, data, progress, bar)
            progress.update(bar, description=f"{arm.name}: null profile")
            arm.measure_null(pretrained, model)
            reference = arm.watch.reference


class Arm:
    """One of the four fits, with a folder of its own.

    Args:
        settings: What the demo runs.
        optimizer: ``"adamw"`` or ``"sgd"``.
        control: ``"standard"`` or ``"equal-step"``.
        out: The demo's folder.
        probe: What profiles are measured on.
        reference: The pretrained side that an earlier arm recorded: all start from the same weights.
    """

    def __init__(
        self,
        settings: Settings,
        optimizer: OptimizerName,
        control: str,
        out: Path,
        probe: Probe,
        reference: Reference | None,
    ) -> None:
        self.settings, self.optimizer, self.control, self.probe = settings, optimizer, control, probe
        self.name = f"{optimizer}-{control}"
        self.folder = out / self.name
        self.watch = DepthProfile(probe, measures=MEASURES)
        self.watch.reference = reference

    def fit(self, model: PreTrainedModel, data: PackedText, progress: Progress, bar: TaskID) -> None:
        """Fine-tunes ``model``, logging to CSV and to an offline W&B run in the arm's folder."""
        s = self.settings
        self.folder.mkdir()
        corpus = corpus_fingerprint(python_corpus("code"))
        facts = dataclasses.asdict(s) | {"corpus": "code of the installed Python standard library", "sha256": corpus}
        write_header(self.folder, "demo", "demo", 0, facts)
        pl.seed_everything(s.seed, verbose=False)
        lr = s.lr_adamw if self.optimizer == "adamw" else s.lr_sgd
        run = wandb.init(
            project="depthcb-demo",
            name=self.name,
            dir=self.folder,
            mode="offline",
            config={"backbone": s.backbone},
            settings=wandb.Settings(silent=True, console="off"),
        )
        control = [EqualStep()] if self.control == "equal-step" else []
        trainer = pl.Trainer(
            max_steps=s.steps,
            precision="bf16-mixed",
            gradient_clip_val=1.0,
            callbacks=[*control, UpdateRatioMonitor(), self.watch, _ProgressCallback(self.name, progress, bar)],
            logger=[CSVLogger(self.folder, name="", version=""), WandbLogger(experiment=run)],
            val_check_interval=s.validate_every,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        decay = WEIGHT_DECAY[self.optimizer]
        module = CausalLM(model, optimizer=self.optimizer, lr=lr, weight_decay=decay, warmup_steps=s.warmup_steps)
        try:
            trainer.fit(module, data)
        finally:
            run.finish()

    def measure_null(self, pretrained: PreTrainedModel, model: PreTrainedModel) -> None:
        """Measures what random changes of the same size would have done, and writes it beside the run's own record."""
        assert self.watch.reference is not None
        seeds = range(self.settings.null_seeds)
        measures = find_measures(MEASURES)
        draws = null_profiles(
            pretrained.base_model, model.base_model, self.probe, self.watch.reference, measures, seeds=seeds
        )
        write_null(self.folder, draws)


class _ProgressCallback(pl.Callback):
    """Moves the demo's one progress bar."""

    def __init__(self, name: str, progress: Progress, bar: TaskID) -> None:
        self.name, self.progress, self.bar = name, progress, bar

    def on_train_batch_start(self, *_: Any) -> None:
        self.progress.update(self.bar, description=f"{self.name}: training")

    def on_train_batch_end(self, *_: Any) -> None:
        self.progress.advance(self.bar)

    def on_validation_start(self, *_: Any) -> None:
        self.progress.update(self.bar, description=f"{self.name}: validating and probing")


def _check(settings: Settings, out: Path) -> None:
    if settings.steps < 1 or not 1 <= settings.validate_every <= settings.steps:
        raise ValueError(
            f"steps={settings.steps} with validate_every={settings.validate_every}: a fit needs at least one step and "
            "one validation."
        )
    earlier = any((out / name).is_dir() for name in _arms())
    if out.exists() and not earlier and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} exists and holds no earlier demo: choose another folder.")


def _arms() -> list[str]:
    return [f"{optimizer}-{control}" for optimizer in OPTIMIZERS for control in CONTROLS]


def _clear(out: Path) -> None:
    """An empty place for this run's files; only an earlier demo's are removed, and not before this one can start."""
    out.mkdir(parents=True, exist_ok=True)
    for name in _arms():
        shutil.rmtree(out / name, ignore_errors=True)
    for name in ("summary.json", "profiles.png", "report.html"):
        (out / name).unlink(missing_ok=True)


def _write_report(settings: Settings, out: Path, console: Console) -> list[Run]:
    try:
        runs = read_runs(out)
    except ValueError:
        console.print("Nothing was measured yet.")
        return []
    verdicts = [{"group": g.title, **dataclasses.asdict(g.verdict)} for g in groups(runs) if g.verdict]
    summary = {"verdicts": verdicts, "runs": [run.to_dict() for run in runs]}
    write_whole(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    title = f"Depth profile of {settings.backbone}"
    write_png(runs, out / "profiles.png", title)
    write_html(runs, out / "report.html", title)
    print_runs(runs, console)
    _print_files(out, console)
    return runs


def _print_files(out: Path, console: Console) -> None:
    runs = sorted(str(path) for path in out.glob("*/wandb/offline-run-*"))
    lines = [
        ("picture", f"{out / 'profiles.png'}"),
        ("report", f"{out / 'report.html'} (open it in a browser)"),
        ("all numbers", f"{out / 'summary.json'}, {out}/*/depthcb/*.jsonl, {out}/*/metrics.csv"),
        ("W&B offline", f"wandb leet {runs[0]}" if runs else "no run"),
        ("W&B upload", f"wandb sync --yes {out}/*/wandb/offline-run-*"),
    ]
    for label, text in lines:
        console.print(f"{label:>12}  {text}", highlight=False, soft_wrap=True)


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description:<40}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} steps"),
    )
    return Progress(*columns, TimeElapsedColumn(), console=console)
