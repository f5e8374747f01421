"""Where and when callbacks log: the Trainer's loggers, and the record that a run leaves in its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import lightning.pytorch as pl
from lightning.pytorch.loggers.logger import DummyLogger
from torch.optim import Optimizer

from depthcb.callbacks.step_events import OptimizerStepCallback
from depthcb.engine.step_hooks import Sink
from depthcb.profile import Profile
from depthcb.run import Row, write_header, write_row
from depthcb.sinks import sink_of


class Named(Protocol):
    """A callback with a name of its own in a run."""

    name: str


def logged_step(trainer: pl.Trainer) -> int:
    """The step that Lightning stamps on the metrics logged now: ``trainer.global_step`` counts every optimizer."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def is_log_step(trainer: pl.Trainer) -> bool:
    """Whether Lightning logs the training batch that is running now."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # its logger connector sets it
    return every > 0 and (logged_step(trainer) + 1) % every == 0


def rows_of(callback: Named, trainer: pl.Trainer) -> Sink:
    """A sink that hands each row to every logger of the Trainer and writes it into the callback's record."""

    def log(row: Mapping[str, float], step: int) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(dict(row), step=step)
        record_row(callback, trainer, {"step": step, **row})

    return log


def open_record(callback: Named, kind: str, trainer: pl.Trainer, pl_module: pl.LightningModule, settings: Row) -> None:
    """Starts the callback's record of this fit, and tells W&B what it does; on the first process alone.

    Args:
        callback: The callback.
        kind: Its class in depthcb, which a subclass shares.
        trainer: The Trainer.
        pl_module: What is trained.
        settings: What the callback measures or does, as it was resolved.

    Raises:
        ValueError: The run's folder cannot be written.
    """
    folder = run_folder(trainer)
    if folder is None:
        return
    step = logged_step(trainer) if trainer.global_step else 0
    write_header(folder, callback.name, kind, step, settings, _fit(trainer, pl_module))
    for logger in trainer.loggers:
        sink_of(logger).configure(callback.name, settings, _control(trainer))


def record_row(callback: Named, trainer: pl.Trainer, row: Row) -> None:
    """Writes a row into the callback's record, on the first process."""
    folder = run_folder(trainer)
    if folder is not None:
        write_row(folder, callback.name, row)


def log_pictures(callback: Named, trainer: pl.Trainer, by_measure: Mapping[str, Sequence[Profile]], step: int) -> None:
    """Hands the profiles so far as pictures to the loggers that show some; on the first process.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    for logger in trainer.loggers if trainer.is_global_zero else ():
        sink_of(logger).pictures(callback.name, by_measure, step)


def run_folder(trainer: pl.Trainer) -> Path | None:
    """The run's folder: the first logger's, where Lightning puts the checkpoints too, or its name on this machine.

    None without a logger, and on all processes but the first.
    """
    loggers = [logger for logger in trainer.loggers if not isinstance(logger, DummyLogger)]
    if not loggers or not trainer.is_global_zero:
        return None
    roots = (loggers[0].save_dir, trainer.default_root_dir, ".")
    local = next(root for root in roots if root is not None and "://" not in str(root))  # not a bucket
    version = loggers[0].version
    return Path(local) / str(loggers[0].name) / (version if isinstance(version, str) else f"version_{version}")


def _control(trainer: pl.Trainer) -> str:
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # its callback connector sets it
    controls = [c.control for c in callbacks if isinstance(c, OptimizerStepCallback) and c.control]
    return controls[0] if controls else "standard"


def _fit(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
    """What two runs must share for their difference to be the control's."""
    return {
        "module": type(pl_module).__qualname__,
        "hparams": dict(pl_module.hparams),
        "optimizers": [_optimizer(optimizer) for optimizer in trainer.optimizers],
        "max_steps": trainer.max_steps,
        "max_epochs": trainer.max_epochs,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "gradient_clip_val": trainer.gradient_clip_val,
        "precision": str(trainer.precision),
        "strategy": type(trainer.strategy).__name__,
        "accelerator": type(trainer.accelerator).__name__,
        "processes": trainer.world_size,
    }


def _optimizer(optimizer: Optimizer) -> dict[str, Any]:
    """The first group's settings; the learning rate as it was before a scheduler's warm-up."""
    group = optimizer.param_groups[0]
    settings = {k: v for k, v in group.items() if isinstance(v, (bool, int, float, str, tuple)) and k != "initial_lr"}
    return {"class": type(optimizer).__qualname__, **settings, "lr": float(group.get("initial_lr", group["lr"]))}
