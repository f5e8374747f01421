"""The demo: depth profiles of standard and equal-step fits, under SGD with momentum and, if time allows, AdamW."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import wandb
from lightning.pytorch.loggers import WandbLogger
from rich.console import Console
from transformers import PreTrainedModel

from depthcb import DepthProfile
from depthcb.plain import plain
from depthcb.pretrained import PretrainedWeights
from depthcb.probe import Probe
from depthcb.report import print_runs, write_html, write_png
from depthcb.report.groups import conclusions
from depthcb.run import CONTROLS, Run, read_runs, write_header
from depthcb_recipes.data.corpus import corpus_fingerprint, python_corpus
from depthcb_recipes.data.packed_text import PackedText
from depthcb_recipes.demo.plan import DEMO_MEASURES, Plan, make_plan
from depthcb_recipes.demo.sizes import MINUTES, Settings
from depthcb_recipes.fit_progress import FitProgress
from depthcb_recipes.machine import release_memory
from depthcb_recipes.objectives.causal_lm import CausalLM
from depthcb_recipes.objectives.objective import Objective, OptimizerName
from depthcb_recipes.progress import Progress
from depthcb_recipes.publish import write_whole
from depthcb_recipes.silence import silent_libraries
from depthcb_recipes.stopping import stoppable
from depthcb_recipes.studies.grid import RunConfig
from depthcb_recipes.studies.result import FINISHED, Result, write_result
from depthcb_recipes.studies.runner import fit


def run_demo(
    sizes: Settings | Sequence[Settings],
    out: Path,
    console: Console,
    *,
    minutes: float = MINUTES,
    started: float | None = None,
    replicate: bool = False,
) -> list[Run]:
    """Runs the fits and writes a report to ``out``; when interrupted, on what was measured so far.

    Args:
        sizes: What to run; of several, the first that fits the machine's memory and, by its measured speed, the time.
        out: Folder for ``summary.json``, ``profiles.png``, ``report.html`` and one folder per run.
        console: Where progress, tables and verdicts are printed.
        minutes: Time budget for the whole demo, by which one of several sizes is chosen.
        started: Start of that time, in seconds of `time.monotonic`; None for now.
        replicate: Whether to spend the time that is left on more seeds.

    Returns:
        The runs, as read from their folders.

    Raises:
        ValueError: Invalid settings, too little memory, or a folder with something else in it.
        SystemExit: Code 130 or 143, after Ctrl-C or SIGTERM.
    """
    sizes = [sizes] if isinstance(sizes, Settings) else list(sizes)
    for settings in sizes:
        _check(settings, out)
    started = time.monotonic() if started is None else started
    with stoppable(lambda: console.print("Interrupted before anything was measured.")) as stop, silent_libraries():
        plan = make_plan(sizes, console, minutes, started, replicate)
        _clear(out, plan.settings)
        stop.last_words = functools.partial(_write_what_there_is, plan, out, console)
        planned = plan.costs.seconds(plan.settings) if plan.costs else None
        with Progress(plan.settings.fits * plan.settings.steps, console, planned) as progress:
            _run_arms(plan, out, progress)
        return _write_report(plan, out, console)


def _run_arms(plan: Plan, out: Path, progress: Progress) -> None:
    progress.now("reading the Python library")
    settings = plan.settings
    corpus = corpus_fingerprint(python_corpus("code"))
    facts = dataclasses.asdict(settings) | {"precision_reason": plan.precision.reason}
    facts |= {"corpus": "code of the installed Python standard library", "sha256": corpus}
    probes = {seed: _probe(plan, seed) for seed in range(settings.seeds)}
    model = copy.deepcopy(plan.pretrained)
    for name, config in arms(settings).items():
        folder = out / name
        folder.mkdir()
        model.load_state_dict(plan.pretrained.state_dict())
        run_arm(name, config, folder, plan, model, probes[config.seed], progress, facts)
        release_memory()


def _probe(plan: Plan, seed: int) -> Probe:
    """Returns the probe of the fits with one seed, from the validation documents of their data."""
    text, settings = PackedText(plan.tokenizer, seed=seed), plan.settings
    batches = text.probe_batches(rows=settings.probe_rows, block_size=settings.probe_length)
    return Probe.collect(batches, settings.probe_rows)


def arms(settings: Settings) -> dict[str, RunConfig]:
    """Returns the demo's study: its runs by the names of their folders, one pair after another.

    Args:
        settings: The demo's size.
    """
    return {
        f"{optimizer}-{control}" + (f"-seed{seed}" if settings.seeds > 1 else ""): RunConfig(
            settings.backbone,
            "causal_lm",
            optimizer,
            control,
            seed,
            threads=torch.get_num_threads(),
            null_seeds=settings.null_seeds,
            options=_options(settings, optimizer),
        )
        for optimizer in settings.optimizers
        for seed in range(settings.seeds)
        for control in CONTROLS
    }


def _options(settings: Settings, optimizer: OptimizerName) -> dict[str, Any]:
    """Returns the options of ``depthcb fit`` that all runs with one optimizer share."""
    return {
        "model.lr": settings.lr_adamw if optimizer == "adamw" else settings.lr_sgd,
        "model.warmup_steps": settings.warmup_steps,
        "data.block_size": settings.block_size,
        "data.batch_size": settings.batch_size,
        "data.val_rows": settings.val_blocks,
        "data.train_rows": settings.steps * settings.batch_size,
        "trainer.max_steps": settings.steps,
        "trainer.val_check_interval": settings.validate_every,
        "trainer.log_every_n_steps": 1,
        "trainer.precision": settings.precision,
        "trainer.accelerator": "auto",
        "trainer.callbacks": [{"class_path": "depthcb.UpdateRatioMonitor"}],  # `run_arm` adds the depth profile
    }


class FactsRecord(pl.Callback):
    """Writes a record of the demo's settings beside those of the callbacks, once the fit has made older ones void.

    Args:
        folder: The run's folder.
        facts: The settings.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any]) -> None:
        self.folder, self.facts = folder, facts

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        write_header(self.folder, "demo", "demo", 0, self.facts)


def run_arm(
    name: str,
    config: RunConfig,
    folder: Path,
    plan: Plan,
    model: PreTrainedModel,
    probe: Probe,
    progress: Progress,
    facts: Mapping[str, Any],
) -> None:
    """Runs one fit and its null, logging to CSV and to an offline W&B run in its folder.

    Args:
        name: The run's name.
        config: The run.
        folder: The run's folder.
        plan: The demo's plan.
        model: A copy of the pretrained network, which is trained.
        probe: The probe of the profiles.
        progress: The progress of the whole demo.
        facts: What the record says of the demo.
    """
    costs = plan.costs
    each = (costs.step_seconds(plan.settings), costs.validation_seconds(plan.settings)) if costs else (0.0, 0.0)

    def before(trainer: pl.Trainer, module: Objective) -> None:
        module.take(model)
        weights = PretrainedWeights.of(CausalLM(plan.pretrained), copy=False)
        watch = DepthProfile(probe, measures=DEMO_MEASURES, pretrained=weights)
        trainer.loggers = [*trainer.loggers, _offline_logger(name, config, folder)]
        trainer.callbacks += [watch, FactsRecord(folder, facts), FitProgress(name, progress, *each)]  # type: ignore[attr-defined]

    try:
        figures = fit(config, folder, plan.precision, before=before)
    finally:
        wandb.finish()
    write_result(folder, Result(FINISHED, config, figures))
    if costs:
        progress.advance(seconds=costs.null_seconds(plan.settings))


def _offline_logger(name: str, config: RunConfig, folder: Path) -> WandbLogger:
    run = wandb.init(
        project="depthcb-demo",
        name=name,
        dir=folder,
        mode="offline",
        config={"backbone": config.model},
        settings=wandb.Settings(silent=True, console="off"),
    )
    return WandbLogger(experiment=run)


def _check(settings: Settings, out: Path) -> None:
    if settings.steps < 1 or not 1 <= settings.validate_every <= settings.steps:
        raise ValueError(
            f"steps={settings.steps} with validate_every={settings.validate_every}: a fit needs at least one step and "
            "one validation."
        )
    earlier = any((out / name).is_dir() for name in arms(settings))
    if out.exists() and not earlier and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} exists and holds no earlier demo: choose another folder.")


def _clear(out: Path, settings: Settings) -> None:
    """Removes an earlier demo's files, once this one can start, and nothing else."""
    out.mkdir(parents=True, exist_ok=True)
    for name in arms(settings):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in ("summary.json", "profiles.png", "report.html"):
        (out / name).unlink(missing_ok=True)


def _write_what_there_is(plan: Plan, out: Path, console: Console) -> None:
    console.print("[yellow]Interrupted. This is what was measured so far:[/]")
    console.print(f"`depthcb report {out}` shows it again.", highlight=False, soft_wrap=True)
    _write_report(plan, out, console)


def _write_report(plan: Plan, out: Path, console: Console) -> list[Run]:
    try:
        runs = read_runs(out)
    except ValueError:
        console.print("Nothing was measured yet.")
        return []
    summary = {**plan.to_dict(), **conclusions(runs), "runs": [run.to_dict() for run in runs]}
    write_whole(out / "summary.json", json.dumps(plain(summary), indent=1, allow_nan=False) + "\n")
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
