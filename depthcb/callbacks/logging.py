"""Logging for the callbacks: to the Trainer's loggers, and to the record in the run's folder."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
from torch.optim import Optimizer

from depthcb.callbacks.step_events import OptimizerStepCallback, is_a
from depthcb.engine.step_hooks import Sink
from depthcb.plain import plain
from depthcb.profile import Profile
from depthcb.run import Row, write_row
from depthcb.sinks import sink_of
from depthcb.site_names import BLOCK
from depthcb.unit_grid import UnitGrid
from depthcb.warn import warn


class Named(Protocol):
    """A callback with a name that is unique in its run."""

    name: str


class Counting(Named, Protocol):
    """A callback that counts what it could not do."""

    @property
    def lost(self) -> Counter[str]:
        """How often it could not do what, in this fit."""
        ...


#: What the disk did not take in each Trainer's fit, oldest first: who writes it, and how.
_WAITING: WeakKeyDictionary[pl.Trainer, list[tuple[Named, Callable[[], None]]]] = WeakKeyDictionary()


@contextmanager
def tolerated(callback: Counting, what: str, remedy: str) -> Iterator[None]:
    """Counts an error instead of raising it, so that a full disk or a broken logger doesn't end a fit; warns once.

    Args:
        callback: The callback.
        what: What is tried, such as "write the record in logs/version_0".
        remedy: What the user can do about it.
    """
    try:
        yield
    except Exception as error:
        if not callback.lost[what]:
            warn(
                f"{type(callback).__name__} {callback.name!r} cannot {what} ({type(error).__name__}: {error}). "
                f"Training goes on without it: {remedy}."
            )
        callback.lost[what] += 1


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
    waiting = _WAITING.setdefault(trainer, [])
    fresh = not waiting
    waiting.append((callback, lambda: write(folder)))
    error = write_waiting(trainer)
    if error is not None and fresh:
        warn(
            f"{type(callback).__name__} {callback.name!r} cannot write its record in {folder} "
            f"({error.strerror or error}). Training goes on, and the record waits in memory: make room there, or make "
            "it writable, before the fit ends. Next time, use another save_dir, or logger=False for no records."
        )


def write_waiting(trainer: pl.Trainer) -> OSError | None:
    """Writes what the disk did not take before; returns the last error if it still does not."""
    waiting, last = _WAITING.get(trainer, []), None
    stuck: list[Named] = []
    for item in list(waiting):
        owner, write = item
        if any(owner is other for other in stuck):  # its rows stay in order
            continue
        try:
            write()
        except OSError as error:
            stuck.append(owner)
            last = error
        else:
            waiting.remove(item)
    return last


def unwritten(callback: Named, trainer: pl.Trainer) -> int:
    """Returns how many writes of the callback wait."""
    return sum(owner is callback for owner, _ in _WAITING.get(trainer, ()))


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
    """Returns the settings of the first parameter group, and of the others what differs, with each one's size.

    Learning rates are those before any scheduler.
    """
    first, *others = [_group(group) for group in optimizer.param_groups]
    found = {"class": type(optimizer).__qualname__, **first}
    if others:
        found["groups"] = [{k: v for k, v in group.items() if v != first.get(k)} for group in others]
    return found


def _group(group: dict[str, Any]) -> dict[str, Any]:
    settings = {k: v for k, v in group.items() if k not in ("params", "initial_lr") and v is not None}
    lr = group.get("initial_lr", group.get("lr"))
    settings |= {"parameters": len(group["params"])} | ({} if lr is None else {"lr": float(lr)})
    return {k: plain(v) for k, v in settings.items()}
