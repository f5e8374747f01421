"""Logging for the callbacks: to the Trainer's loggers, and to the record in the run's folder."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import lightning.pytorch as pl

from depthcb.callbacks.step_events import OptimizerStepCallback
from depthcb.engine.step_hooks import Sink
from depthcb.plain import plain
from depthcb.profile import Profile
from depthcb.recording import Counting, Named, Waiting, optimizer_settings, tolerated
from depthcb.run import Row, write_row
from depthcb.signposts import is_a
from depthcb.sinks import sink_of
from depthcb.site_names import BLOCK
from depthcb.unit_grid import UnitGrid

#: What the disk did not take in each Trainer's fit.
_WAITING: WeakKeyDictionary[pl.Trainer, Waiting] = WeakKeyDictionary()


def logged_step(trainer: pl.Trainer) -> int:
    """Returns the step number Lightning logs metrics with (``trainer.global_step`` counts each optimizer's steps)."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def first_step(trainer: pl.Trainer) -> int:
    """Returns the number of steps made before this fit: 0 unless it was resumed."""
    return logged_step(trainer) if trainer.global_step else 0


class LogSteps:
    """Says which steps to log: the first one at or after each batch that Lightning logs.

    It is a later one where the optimizer in question does not step in every batch, as the generator of a GAN.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self.every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # its logger connector sets it
        #: Number of batches with a step before this object was created.
        self.start = self._logged = logged_step(trainer)

    def due(self, batches: int) -> bool:
        """Returns whether a log is due after ``batches`` batches with a step."""
        return self.every > 0 and batches // self.every > self._logged // self.every

    def note(self, batches: int) -> None:
        """Notes a log after ``batches`` batches with a step."""
        self._logged = batches


def rows_of(callback: Counting, trainer: pl.Trainer) -> Sink:
    """Returns a sink that passes each row to all loggers of the Trainer and writes it to the callback's record.

    Loggers that draw get no columns of units smaller than layers: they would be hundreds of line charts.
    """
    of_small_unit = re.compile(re.escape(callback.name) + r"/(\w+/)?L\d+/.")

    def log(row: Mapping[str, float], step: int) -> None:
        small = {key for key in row if of_small_unit.match(key)}
        for logger in trainer.loggers:
            with tolerated(callback, f"log to the {type(logger).__name__}", "the record has these values"):
                drawn = small if small and sink_of(logger).draws else ()
                logger.log_metrics({key: value for key, value in row.items() if key not in drawn}, step=step)
        record_row(callback, trainer, {"step": step, **row})

    return log


def record_row(callback: Named, trainer: pl.Trainer, row: Row) -> None:
    """Writes a row to the callback's record, on the first process only."""
    write_record(callback, trainer, lambda folder: write_row(folder, callback.name, row))


def write_record(callback: Named, trainer: pl.Trainer, write: Callable[[Path], None]) -> None:
    """Writes to the run's folder, on the first process only; what its disk does not take waits in memory.

    Args:
        callback: The callback that writes.
        trainer: The Trainer.
        write: Writes to a folder. If it raises an `OSError`, it is called again before the callback's next write.
    """
    folder = run_folder(trainer)
    if folder is None:
        return
    remedy = "use another save_dir, or logger=False for no records"
    _WAITING.setdefault(trainer, Waiting(remedy)).write(callback, folder, write)


def write_waiting(trainer: pl.Trainer) -> None:
    """Writes what the disk did not take before, if it takes it now."""
    if trainer in _WAITING:
        _WAITING[trainer].retry()


def unwritten(callback: Named, trainer: pl.Trainer) -> int:
    """Returns how many writes of the callback wait."""
    return _WAITING[trainer].count(callback) if trainer in _WAITING else 0


def forget_waiting(trainer: pl.Trainer) -> None:
    """Drops what an earlier fit of the Trainer could not write."""
    _WAITING.pop(trainer, None)


def log_pictures(
    callback: Counting,
    trainer: pl.Trainer,
    by_measure: Mapping[str, Sequence[Profile]],
    step: int,
    sites: Mapping[str, Profile],
) -> None:
    """Logs plots of the profiles so far to the loggers that support them, on the first process only."""
    everywhere = {BLOCK: next(iter(by_measure.values()))[-1], **sites} if sites else {}
    for logger in trainer.loggers if trainer.is_global_zero else ():
        with tolerated(callback, f"log plots to the {type(logger).__name__}", "`depthcb report` draws them later"):
            try:
                sink_of(logger).pictures(callback.name, by_measure, step)
                if everywhere:
                    sink_of(logger).sites(callback.name, everywhere, step)
            except ModuleNotFoundError as error:
                raise ModuleNotFoundError(f"{error.name} is not installed: pip install 'depthcb[wandb]'") from error


def log_units(callback: Counting, trainer: pl.Trainer, grid: UnitGrid, step: int) -> None:
    """Logs a heatmap of step ratios to the loggers that draw, on the first process only."""
    for logger in trainer.loggers if trainer.is_global_zero else ():
        with tolerated(callback, f"log plots to the {type(logger).__name__}", "`depthcb report` draws them later"):
            try:
                sink_of(logger).units(callback.name, grid, step)
            except ModuleNotFoundError as error:
                raise ModuleNotFoundError(f"{error.name} is not installed: pip install 'depthcb[wandb]'") from error


def deserves_pictures(count: int) -> bool:
    """Returns whether to draw for the count-th time: the first 32 times, then every 2nd, 4th, ... as counts double."""
    every: int = 2 ** max(0, (count - 1).bit_length() - 5)
    return count % every == 0


def run_folder(trainer: pl.Trainer) -> Path | None:
    """Returns the run's folder: that of the first logger.

    Falls back to a local folder of the same name if the logger's is remote. Returns None without a logger, and on all
    processes but the first.
    """
    loggers = [logger for logger in trainer.loggers if not is_a(logger, "DummyLogger")]
    if not loggers or not trainer.is_global_zero:
        return None
    own = getattr(loggers[0], "log_dir", None)  # with TensorBoard's sub_dir, and variables expanded
    if isinstance(own, str) and "://" not in own:
        return Path(own).expanduser()
    roots = (loggers[0].save_dir, trainer.default_root_dir, ".")
    local = next(root for root in roots if root is not None and "://" not in str(root))  # not a bucket
    version = loggers[0].version
    folder = Path(local) / str(loggers[0].name) / (version if isinstance(version, str) else f"version_{version}")
    return folder.expanduser()


def callbacks_of(trainer: pl.Trainer) -> list[pl.Callback]:
    """Returns the Trainer's own list of callbacks."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # its callback connector sets it
    return callbacks


def control_of(trainer: pl.Trainer) -> str:
    """Returns the label of the control that the run is trained under."""
    controls = [c.control for c in callbacks_of(trainer) if isinstance(c, OptimizerStepCallback) and c.control]
    return controls[0] if controls else "standard"


def fit_settings(trainer: pl.Trainer, pl_module: pl.LightningModule, redact: Collection[str]) -> dict[str, Any]:
    """Returns the settings that two runs must share to be compared as a pair."""
    return {
        "module": type(pl_module).__qualname__,
        "hparams": plain(dict(pl_module.hparams), redact),
        "optimizers": [optimizer_settings(optimizer) for optimizer in trainer.optimizers],
        "max_steps": trainer.max_steps,
        "max_epochs": trainer.max_epochs,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "gradient_clip_val": trainer.gradient_clip_val,
        "precision": str(trainer.precision),
        "strategy": type(trainer.strategy).__name__,
        "accelerator": type(trainer.accelerator).__name__,
        "processes": trainer.world_size,
    }
