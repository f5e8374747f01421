"""What the records of one fit share: the weights that it started from, and which callbacks it had when."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from depthcb.callbacks.logging import (
    callbacks_of,
    control_of,
    first_step,
    fit_settings,
    forget_waiting,
    run_folder,
    unwritten,
    write_record,
    write_waiting,
)
from depthcb.fingerprint import weights_fingerprint
from depthcb.plain import dumps, plain
from depthcb.recording import tell_losses, tolerated
from depthcb.run import Row, null_names, void_records, write_header
from depthcb.signposts import NotForFabric, NotForTransformers
from depthcb.sinks import sink_of

#: The entry of a checkpoint that has the fit's history.
KEY = "depthcb"


class StateKey(str):
    """Names a callback's state in a checkpoint; raises an error when compared with the equal key of another callback.

    A Trainer's constructor makes that comparison, before any hook, and its own message doesn't know of ``name=``.
    """

    owner: RecordedCallback
    __hash__ = str.__hash__

    def __new__(cls, key: str, owner: RecordedCallback) -> StateKey:
        self = super().__new__(cls, key)
        self.owner = owner
        return self

    def __eq__(self, other: object) -> bool:
        equal = super().__eq__(other)
        if equal is True and isinstance(other, StateKey) and other.owner is not self.owner:
            refuse_name(self.owner, other.owner)
        return equal  # NotImplemented for what is no string

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (str(self),)


class RecordedCallback(NotForFabric, NotForTransformers, Callback):
    """Base class of the callbacks that leave a record; their checkpoints have the history of the fit.

    A run that was resumed with other callbacks is thus known as a mixed one, in whichever folder its record continues.

    Raises:
        ValueError: Two callbacks of a Trainer have the same name, or would write to the same record.
    """

    name: str
    #: Names of settings whose values are not written down, see `depthcb.plain.plain`.
    redact: Collection[str]
    #: The fit's history so far: its initial weights and its parts; None before training.
    history: dict[str, Any] | None = None

    @property
    def state_key(self) -> str:
        return StateKey(self._generate_state_key(name=self.name), self)

    @property
    def lost(self) -> Counter[str]:
        """How often a logger or the record failed in this fit, by what could not be done."""
        # Created on first use, so that subclasses need not call this class's constructor.
        found: Counter[str] = self.__dict__.setdefault("_lost", Counter())
        return found

    @property
    def steering(self) -> Mapping[str, Any]:
        """The settings by which the callback changes the training; empty for callbacks that only observe."""
        return {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if isinstance(self.redact, str):
            raise ValueError(f"{type(self).__name__}: redact={self.redact!r} is text: pass a list of words.")
        for other in recorded_callbacks(trainer):
            taken = [name.casefold() for name in (other.name, *null_names(other.name))]
            if other is not self and self.name.casefold() in taken:
                refuse_name(self, other)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_end(trainer, pl_module)
        write_waiting(trainer)
        tell_losses(self, unwritten(self, trainer), run_folder(trainer))

    def redacted(self, trainer: pl.Trainer) -> set[str]:
        """Returns the words of all recorded callbacks: what one of them keeps out is in none of their records."""
        return {word for callback in recorded_callbacks(trainer) for word in callback.redact}

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["callbacks"] = {str(key): state for key, state in checkpoint["callbacks"].items()}
        if self.history is not None:
            checkpoint[KEY] = self.history

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.history = checkpoint.get(KEY)

    def continue_history(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Adds this fit to the history, on all processes; returns whether this is the fit's first recorded callback."""
        first = recorded_callbacks(trainer)[0]
        if first is not self:
            self.history = first.history
            return False
        step, past = first_step(trainer), self.history
        if not step:
            past = {"initial_weights": weights_fingerprint(pl_module), "parts": []}
        elif past is None:  # a checkpoint of version 0.1, or of a fit without these callbacks
            past = {"initial_weights": None, "parts": []}
        redact, present = self.redacted(trainer), recorded_callbacks(trainer)
        part = {
            "step": step,
            "callbacks": {c.name: [kind_of(c), plain(c.steering, redact)] for c in present},
            "hparams": hashlib.sha256(dumps(plain(dict(pl_module.hparams), redact)).encode()).hexdigest(),
        }
        self.history = {**past, "parts": [*past["parts"], part]}
        return True


def refuse_name(one: RecordedCallback, other: RecordedCallback) -> NoReturn:
    """Raises an error for two callbacks with the same name."""
    raise ValueError(
        f"{type(one).__name__} and {type(other).__name__} would write to the same record, {one.name!r}: "
        "give one of them another name=."
    )


def recorded_callbacks(trainer: pl.Trainer) -> list[RecordedCallback]:
    """Returns the Trainer's recorded callbacks, in its order."""
    return [c for c in callbacks_of(trainer) if isinstance(c, RecordedCallback)]


def kind_of(callback: RecordedCallback) -> str:
    """Returns the name of a callback's depthcb class, also for user subclasses."""
    return next(k.__name__ for k in type(callback).__mro__ if k.__module__.startswith("depthcb."))


def open_record(callback: RecordedCallback, trainer: pl.Trainer, pl_module: pl.LightningModule, settings: Row) -> None:
    """Starts the callback's record of this fit and configures the loggers' sinks.

    The fit's first callback also makes all records of the folder void that do not belong to this fit. All processes
    must call this; only the first one writes.

    Args:
        callback: The callback.
        trainer: The Trainer.
        pl_module: The module being trained.
        settings: The callback's resolved settings.

    Raises:
        ValueError: A record of an earlier fit cannot be made void.
    """
    callback.lost.clear()
    is_first = callback.continue_history(trainer, pl_module)
    folder = run_folder(trainer)
    if folder is None:
        return
    assert callback.history is not None
    step, redact = first_step(trainer), callback.redacted(trainer)
    settings = plain(settings, redact)
    if is_first:
        forget_waiting(trainer)
        void_records(folder, step)
    fit = fit_settings(trainer, pl_module, redact) | {"initial_weights": callback.history["initial_weights"]}
    parts = callback.history["parts"]
    named = ""
    with tolerated(callback, "ask the logger for the run's name", "the folder's is used"):
        named = sink_of(trainer.loggers[0]).run_name()
    write_record(
        callback,
        trainer,
        lambda folder: write_header(folder, callback.name, kind_of(callback), step, settings, fit, parts, named=named),
    )
    for logger in trainer.loggers:
        with tolerated(callback, f"configure the {type(logger).__name__}", "the record has the settings"):
            sink_of(logger).configure(callback.name, settings, control_of(trainer))
