"""What the rules that need no finished run can read of a model and its data: the first steps of the training."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from depthcb.callbacks.logging import callbacks_of
from depthcb.run import Run, read_runs
from depthcb_recipes.advice.source import TRAINER
from depthcb_recipes.backbones.loading import pretraining
from depthcb_recipes.fit import fit_cli
from depthcb_recipes.silence import silent_libraries, silent_transformers
from depthcb_recipes.stopping import stoppable
from depthcb_recipes.studies.grid import RunConfig
from depthcb_recipes.studies.runner import configuration

#: Rule and callback, for the one measurement that takes longer than a few steps.
_DISTANCE = ("objective distance", "ObjectiveDistanceMonitor")
#: What the rules read: the layers' names and sizes, and the first steps.
_WATCH = (
    {"class_path": "depthcb.UpdateRatioMonitor", "init_args": {"extras": ["grad_norm"]}},
    {"class_path": "depthcb.DepthProfile", "init_args": {"probe_rows": 64}},
)


def first_steps(base: RunConfig, rules: Sequence[str]) -> tuple[Run, RunConfig]:
    """Makes the first steps of a training, up to the first one that it logs, and leaves nothing behind.

    Args:
        base: The training.
        rules: Names of the rules that are asked. The objective distance is measured for its own rule alone, and if the
            training's configuration has an `ObjectiveDistanceMonitor`.

    Returns:
        The record of these steps, which has no profile after them, and the training with all its options.

    Raises:
        ValueError: The configuration cannot be run.
    """
    folder = Path(tempfile.mkdtemp(prefix="depthcb-advise-"))

    def forget() -> None:
        shutil.rmtree(folder, ignore_errors=True)

    def stopped() -> None:
        forget()
        print("Stopped: nothing is left of it.", flush=True)

    try:
        with stoppable(stopped), silent_libraries(), silent_transformers():
            trainer = configuration(base, folder)["trainer"]
            cli = fit_cli(configuration(_shortened(base, trainer, rules), folder), run=False, exit_on_error=False)
            told = f"Making the first {cli.trainer.max_steps} steps of {_name(base)}."
            if any(type(c).__name__ == _DISTANCE[1] for c in callbacks_of(cli.trainer)):
                _check_distance(base.model)
                told += (
                    " The objective distance takes the most time of it: name other rules with --rules to do without."
                )
            print(told, flush=True)
            cli.trainer.fit(cli.model, cli.datamodule)
            (run,) = read_runs(folder)
    finally:
        forget()
    known = {f"trainer.{name}": trainer[name] for name in TRAINER if name in trainer}
    options = {**known, **base.options, "model.lr": cli.model.hparams["lr"]}
    return dataclasses.replace(run, name=_name(base)), dataclasses.replace(base, options=options)


def _check_distance(model: str) -> None:
    """Raises a ValueError if the pretraining objective is not known."""
    try:
        pretraining(model)
    except ValueError as error:
        raise ValueError(f"{error} Name the rules to ask with --rules, without {_DISTANCE[0]}.") from error


def _shortened(base: RunConfig, trainer: dict[str, Any], rules: Sequence[str]) -> RunConfig:
    """Returns the training up to its first logged step, without validation."""
    rule, monitor = _DISTANCE
    measured = [c for c in trainer["callbacks"] or () if rule in rules and c["class_path"].endswith(monitor)]
    own = {
        "trainer.callbacks": [*measured, *_WATCH],
        "trainer.max_steps": trainer["log_every_n_steps"],
        "trainer.val_check_interval": sys.maxsize,
        "trainer.check_val_every_n_epoch": None,
    }
    return dataclasses.replace(base, options={**base.options, **own})


def _name(base: RunConfig) -> str:
    return f"{Path(base.model).name} {base.objective}"
