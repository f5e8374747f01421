"""The main job in one go: two depth profiles, standard and equal-step, under AdamW and under SGD with momentum."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import wandb
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from rich.console import Console
from transformers import PreTrainedModel

from depthcb import DepthProfile, EqualStep, UpdateRatioMonitor
from depthcb.null import null_profiles
from depthcb.probe import Probe
from depthcb.reference import Reference
from depthcb.report import print_runs, write_html, write_png
from depthcb.report.groups import groups
from depthcb.run import Run, read_runs, write_header, write_null
from depthcb.similarity import find_measures
from depthcb_recipes.data.corpus import corpus_fingerprint, python_corpus
from depthcb_recipes.data.packed_text import PackedText
from depthcb_recipes.demo.plan import DEMO_MEASURES, Plan, make_plan
from depthcb_recipes.demo.sizes import (
    CONTROLS,
    FITS,
    MINUTES,
    OPTIMIZERS,
    Settings,
)
from depthcb_recipes.fit_progress import FitProgress
from depthcb_recipes.machine import release_memory
from depthcb_recipes.objectives.causal_lm import CausalLM
from depthcb_recipes.objectives.objective import OptimizerName
from depthcb_recipes.progress import Progress
from depthcb_recipes.publish import write_whole
from depthcb_recipes.silence import quiet_libraries
from depthcb_recipes.stopping import stoppable

#: Coupled decay would rule the clipped gradient of SGD and equalize the step ratios by itself.
WEIGHT_DECAY: dict[OptimizerName, float] = {"adamw": 0.01, "sgd": 0.0}


def run_demo(
    sizes: Settings | Sequence[Settings],
    out: Path,
    console: Console,
    *,
    minutes: float = MINUTES,
    started: float | None = None,
) -> list[Run]:
    """Runs the four fits and leaves a report in ``out``, of what was measured so far when interrupted.

    Args:
        sizes: What to run; of several the first that the machine has memory and, as measured, time for.
        out: Folder for ``summary.json``, ``profiles.png``, ``report.html`` and one folder per run; made if missing.
        console: Where progress, tables and verdicts are printed.
        minutes: What the whole may take; it decides among several sizes.
        started: Since when, in seconds of `time.monotonic`; None for now.

    Returns:
        The runs, as their folders hold them.

    Raises:
        ValueError: Settings that cannot be run, too little memory, or a folder that holds something else.
        SystemExit: With code 130 or 143, after Ctrl-C or SIGTERM.
    """
    sizes = [sizes] if isinstance(sizes, Settings) else list(sizes)
    for settings in sizes:
        _check(settings, out)
    started = time.monotonic() if started is None else started
    with stoppable(lambda: console.print("Interrupted before anything was measured.")) as stop, quiet_libraries():
        plan = make_plan(sizes, console, minutes, started)
        _clear(out)
        stop.last_words = functools.partial(_write_what_there_is, plan, out, console)
        planned = plan.costs.seconds(plan.settings) if plan.costs else None
        with Progress(FITS * plan.settings.steps, console, planned) as progress:
            _run_arms(plan, out, progress)
        return _write_report(plan, out, console)


def _run_arms(plan: Plan, out: Path, progress: Progress) -> None:
    settings = plan.settings
    progress.now("reading the Python library")
    data = PackedText(
        plan.tokenizer,
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
    model = copy.deepcopy(plan.pretrained)
    reference: Reference | None = None
    for optimizer in OPTIMIZERS:
        for control in CONTROLS:
            model.load_state_dict(plan.pretrained.state_dict())
            arm = Arm(plan, optimizer, control, out, probe, reference)
            arm.fit(model, data, progress)
            arm.measure_null(model, progress)
            reference = arm.watch.reference
            del arm
            release_memory()


class Arm:
    """One of the four fits, with a folder of its own.

    Args:
        plan: What the demo runs.
        optimizer: ``"adamw"`` or ``"sgd"``.
        control: ``"standard"`` or ``"equal-step"``.
        out: The demo's folder.
        probe: What profiles are measured on.
        reference: The pretrained side that an earlier arm recorded: all start from the same weights.
    """

    def __init__(
        self,
        plan: Plan,
        optimizer: OptimizerName,
        control: str,
        out: Path,
        probe: Probe,
        reference: Reference | None,
    ) -> None:
        self.plan, self.optimizer, self.control, self.probe = plan, optimizer, control, probe
        self.name = f"{optimizer}-{control}"
        self.folder = out / self.name
        self.watch = DepthProfile(probe, measures=DEMO_MEASURES)
        self.watch.reference = reference

    def fit(self, model: PreTrainedModel, data: PackedText, progress: Progress) -> None:
        """Fine-tunes ``model``, logging to CSV and to an offline W&B run in the arm's folder."""
        s, costs = self.plan.settings, self.plan.costs
        self.folder.mkdir()
        corpus = corpus_fingerprint(python_corpus("code"))
        facts = dataclasses.asdict(s) | {"precision_reason": self.plan.precision.reason}
        facts |= {"corpus": "code of the installed Python standard library", "sha256": corpus}
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
        each = (costs.step_seconds(s), costs.validation_seconds(s)) if costs else (0.0, 0.0)
        shown = FitProgress(self.name, progress, *each)
        trainer = pl.Trainer(
            max_steps=s.steps,
            devices=1,
            precision=s.precision,  # type: ignore[arg-type]  # Lightning checks it
            gradient_clip_val=1.0,
            callbacks=[*control, UpdateRatioMonitor(), self.watch, shown],
            logger=[CSVLogger(self.folder, name="", version=""), WandbLogger(experiment=run)],
            val_check_interval=s.validate_every,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        decay = WEIGHT_DECAY[self.optimizer]
        module = CausalLM(model, optimizer=self.optimizer, lr=lr, weight_decay=decay, warmup_steps=s.warmup_steps)
        try:
            trainer.fit(module, data)
        finally:
            run.finish()
            data.trainer = None  # the arms share their data, which would keep this one's optimizer and copies

    def measure_null(self, model: PreTrainedModel, progress: Progress) -> None:
        """Measures what random changes of the same size would have done, and writes it beside the run's own record."""
        assert self.watch.reference is not None
        progress.now(f"{self.name}: null profile")
        settings, costs, pretrained = self.plan.settings, self.plan.costs, self.plan.pretrained
        seeds = range(settings.null_seeds)
        measures = find_measures(DEMO_MEASURES)
        draws = null_profiles(
            pretrained.base_model, model.base_model, self.probe, self.watch.reference, measures, seeds=seeds
        )
        write_null(self.folder, draws)
        if costs:
            progress.advance(seconds=costs.null_seconds(settings))


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


def _write_what_there_is(plan: Plan, out: Path, console: Console) -> None:
    console.print("[yellow]Interrupted: what was measured so far follows.[/]")
    console.print(f"`depthcb report {out}` shows it again.", highlight=False, soft_wrap=True)
    _write_report(plan, out, console)


def _write_report(plan: Plan, out: Path, console: Console) -> list[Run]:
    try:
        runs = read_runs(out)
    except ValueError:
        console.print("Nothing was measured yet.")
        return []
    verdicts = [{"group": g.title, **dataclasses.asdict(g.verdict)} for g in groups(runs) if g.verdict]
    summary = {**plan.to_dict(), "verdicts": verdicts, "runs": [run.to_dict() for run in runs]}
    write_whole(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    title = f"Depth profile of {plan.settings.backbone}"
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
