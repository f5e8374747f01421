"""A training run outside of Lightning's Trainer: what is attached to its module, and the record that they share.

The front ends for plain loops, Fabric and transformers say *when*; this module knows no framework. Steps are numbered
from 0, and a measurement has the number of the last step before it, as in records of Lightning's Trainer.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from depthcb.engine.step_hooks import Sink, StepHooks, checkpoint_errors
from depthcb.fingerprint import weights_fingerprint
from depthcb.plain import SECRETS, dumps, plain
from depthcb.recording import (
    Waiting,
    optimizer_settings,
    sink_for,
    tell_losses,
    tolerated,
)
from depthcb.run import FOLDER, Row, null_names, void_records, write_header, write_row
from depthcb.signposts import refuse_engines


@dataclass
class Setting:
    """What a front end knows of a fit.

    Args:
        module: The module being trained, without a wrapper such as DDP.
        optimizers: All optimizers that own parameters of it.
        folder: The run's folder; None writes no record.
        sinks: Receive rows: see `sink_for`.
        seed: The seed, if it is known.
        described: What two runs must share to be compared as a pair, besides the optimizers.
        owner: The trainer, for two fits of one module in a row.
    """

    module: nn.Module
    optimizers: Sequence[Optimizer]
    folder: str | Path | None = None
    sinks: Sequence[Any] = ()
    seed: object = None
    described: Mapping[str, Any] = field(default_factory=dict)
    owner: object = None


#: The fits that go on, by the id of their module, which they keep alive.
_FITS: WeakValueDictionary[int, Fit] = WeakValueDictionary()


class Fit:
    """What watches and controls one training run, and where their rows go.

    The record is opened with the first row, when everything is attached; what is attached or removed later begins
    another part of the fit, so that the run is known as a mixed one.
    """

    def __init__(self, setting: Setting) -> None:
        self.module, self.owner = setting.module, setting.owner
        #: The number of steps made before this fit: 0 unless it was resumed.
        self.step = 0
        self.folder: Path | None = None
        self.sinks: list[tuple[Any, Sink]] = []
        self.members: list[Member] = []
        self.history: dict[str, Any] | None = None
        self._initial = weights_fingerprint(setting.module)
        self.seed: object = None
        self._described: dict[str, Any] = {
            "module": type(setting.module).__qualname__,
            "hparams": {},
            "optimizers": [optimizer_settings(o) for o in setting.optimizers],
        }
        self._waiting = Waiting("pass another folder")
        self._opened: list[Member] = []
        self._changed = 0

    @classmethod
    def clear(cls, setting: Setting) -> None:
        """Removes what an earlier fit of the module has left attached, because it failed."""
        fit = _FITS.get(id(setting.module))
        for member in list(fit.members) if fit is not None and fit.owner is not setting.owner else ():
            member.detach()

    @classmethod
    def join(cls, member: Member, setting: Setting) -> Fit:
        """Adds a member to the fit of a module that goes on, or to a new one.

        Raises:
            ValueError: A member of the fit has the same name, or the fit has another folder.
        """
        cls.clear(setting)
        fit = _FITS.get(id(setting.module))
        if fit is None:
            fit = _FITS[id(setting.module)] = cls(setting)
        taken = {name.casefold() for other in fit.members for name in (other.name, *null_names(other.name))}
        if member.name.casefold() in taken:
            raise ValueError(f"Two of the run's records would have the name {member.name!r}: pass another name=.")
        if setting.folder is not None:
            if fit.folder not in (None, Path(setting.folder)):
                raise ValueError(f"folder={setting.folder}: this fit already has its record in {fit.folder}.")
            fit.folder = Path(setting.folder)
        fit.sinks += [(s, sink_for(s)) for s in setting.sinks if not any(s is other for other, _ in fit.sinks)]
        fit.seed = setting.seed if fit.seed is None else fit.seed
        fit._described |= setting.described
        fit.members.append(member)
        fit._changed = fit.steps
        if not fit._opened:
            fit.step = fit.steps
        for other in fit.members:  # one that was not in the earlier part of a resumed run counts its steps too
            other.engine.steps_made = fit.steps  # type: ignore[attr-defined]
        return fit

    @property
    def steps(self) -> int:
        """The number of steps made so far."""
        return max((member.steps for member in self.members), default=self.step)

    @property
    def counts(self) -> bool:
        """Whether a member counts the steps."""
        return any(member.kind != "DepthProfile" for member in self.members)

    @property
    def writes(self) -> bool:
        """Whether this is the first process."""
        return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0

    def leave(self, member: Member) -> None:
        """Removes a member; the fit ends with its last one."""
        self._changed = max(self._changed, self.steps)
        self.members.remove(member)
        if not self.members:
            _FITS.pop(id(self.module), None)

    def log(self, member: Member, row: Mapping[str, float], step: int) -> None:
        """Passes a row of numbers to all sinks, on the first process."""
        remedy = "the record has these values" if self.folder else "repair it for the next run"
        for target, sink in self.sinks if self.writes else ():
            with tolerated(member, f"log to the {type(target).__name__}", remedy):
                sink(row, step)
        if member.sink is not None:
            member.sink(row, step)

    def record(self, member: Member, row: Row) -> None:
        """Writes a row to a member's record; opens the records first if anything was attached or removed."""
        self.open(row["step"])
        self.write(member, lambda folder: write_row(folder, member.name, row))

    def write(self, member: Member, write: Callable[[Path], None]) -> None:
        """Writes to the run's folder, on the first process only."""
        if self.folder is not None and self.writes:
            self._waiting.write(member, self.folder, write)

    def open(self, step: int) -> None:
        """Opens the records for what is attached, unless they are open; ``step`` is the number of the last step."""
        if self._opened and (self._opened == self.members or step < self._changed):
            return
        start = self._changed if self._opened else self.step
        self._opened = list(self.members)
        known = [m.history for m in self.members if m.history] if self.step else []
        new: dict[str, Any] = {"initial_weights": None if self.step else self._initial, "parts": []}
        past = self.history or (known or [new])[0]
        redact = {word for member in self.members for word in member.redact}
        described = plain(self._described, redact)
        part = {
            "step": start,
            "callbacks": {m.name: [m.kind, plain(m.steering, redact)] for m in self.members},
            "hparams": hashlib.sha256(dumps(described["hparams"]).encode()).hexdigest(),
        }
        self.history = {**past, "parts": [*(p for p in past["parts"] if p["step"] < start), part]}
        if self.folder is None or not self.writes:
            return
        void_records(self.folder, start)
        fit, parts = described | {"initial_weights": past["initial_weights"]}, self.history["parts"]
        for member in self.members:
            settings = plain(member.settings, redact)
            arguments = (member.name, member.kind, start, settings, fit, parts, self.seed)
            self.write(member, lambda folder, given=arguments: write_header(folder, *given))  # type: ignore[misc]
            for row in member.past if start else ():
                self.write(member, lambda folder, m=member, row=row: write_row(folder, m.name, row))  # type: ignore[misc]

    def end(self, member: Member) -> None:
        """Writes what waits, and warns of what could not be done."""
        self._waiting.retry()
        tell_losses(member, self._waiting.count(member), self.folder)


class Member:
    """An object of the engine in a fit.

    Args:
        engine: The object.
        redact: Words in the names of settings whose values are kept out of the records.
    """

    #: Class in the record.
    kind: ClassVar[str]

    def __init__(self, engine: StepHooks, name: str, redact: Collection[str] = SECRETS) -> None:
        if isinstance(redact, str):
            raise ValueError(f"redact={redact!r} is text: pass a list of words.")
        self.engine, self.name, self.redact = engine, name, redact
        self.lost: Counter[str] = Counter()
        #: Receives the rows of this member alone.
        self.sink: Sink | None = None
        #: Called when it leaves a fit, to remove the hooks of a front end.
        self.release: Callable[[], None] | None = None
        self.fit: Fit | None = None
        self.history: dict[str, Any] | None = None

    @property
    def steps(self) -> int:
        """The number of steps made so far, in all parts of the fit."""
        return int(self.engine.steps_made)  # type: ignore[attr-defined]

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings in the record."""
        return {}

    @property
    def steering(self) -> Mapping[str, Any]:
        """The settings by which it changes the training."""
        return {}

    @property
    def past(self) -> Sequence[Row]:
        """The rows of earlier parts of the fit, if they are known."""
        return ()

    def start(self, setting: Setting, listen: bool = True) -> None:
        """Joins the fit, checks everything before the first step, and acts on its steps from now on if ``listen``.

        Raises:
            ValueError: The module or the optimizers are not supported.
        """
        self.detach()
        self.lost.clear()
        refuse_engines(f"depthcb ({self.kind})", *setting.module.modules(), *setting.optimizers)
        steps = self.steps
        self.prepare(setting)
        self.engine.steps_made = steps  # type: ignore[attr-defined]  # another model's layers reset it
        self.fit = Fit.join(self, setting)
        self.engine.log = self.log
        if listen:
            self.listen(setting)

    def listen(self, setting: Setting) -> None:
        """Acts on the optimizers' steps from now on."""
        self.engine.listen(setting.module, setting.optimizers)

    def prepare(self, setting: Setting) -> None:
        """Sets up the engine's object."""
        self.engine.prepare(setting.module, setting.optimizers)

    def log(self, row: Mapping[str, float], step: int) -> None:
        """Receives the rows of the engine's object."""
        assert self.fit is not None
        self.fit.log(self, row, step)
        self.fit.record(self, {"step": step, **row})

    def finish(self) -> None:
        """Ends a fit that did not fail."""
        try:
            self.engine.finish()
            if self.fit is not None:
                self.fit.end(self)
        finally:
            self.detach()

    def detach(self) -> None:
        """Removes all hooks and leaves the fit."""
        self.engine.detach()
        if self.fit is not None:
            self.history = self.fit.history
            fit, self.fit = self.fit, None
            fit.leave(self)
            if self.release is not None:
                self.release()

    def state_dict(self) -> dict[str, Any]:
        """Returns tensors, lists and scalars only."""
        if self.fit is not None:
            self.fit.open(self.fit.steps - 1)
            self.history = self.fit.history
        engine: Any = self.engine
        return {"engine": engine.state_dict(), "steps": self.steps, "history": self.history}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores the state; to be called before the fit starts.

        Raises:
            ValueError: The state is damaged.
        """
        with checkpoint_errors(f"{self.kind} {self.name!r}"):
            engine: Any = self.engine
            engine.load_state_dict(state_dict["engine"])
            engine.steps_made, self.history = int(state_dict["steps"]), state_dict["history"]

    def save(self) -> None:
        """Writes the state to a file of the run's folder, on the first process."""
        if self.fit is not None and self.fit.folder is not None:
            state = self.state_dict()
            self.fit.write(self, lambda folder: _save(state, _file(folder, self.name)))

    def restore(self, folder: Path, step: int) -> None:
        """Restores what a run saved in this folder, to go on after ``step`` steps; 0 begins a new run."""
        path, engine = _file(folder, self.name), self.engine
        if step and path.exists():
            self.load_state_dict(torch.load(path, weights_only=True))
        if not step or self.steps != step:  # means of another run, or of steps that are to be made again
            self.forget(step)
        engine.steps_made = step  # type: ignore[attr-defined]

    def forget(self, step: int) -> None:
        """Forgets what is known of the steps from this one on."""
        self.engine.reset()  # type: ignore[attr-defined]


def _file(folder: Path, name: str) -> Path:
    return folder / FOLDER / f"{quote(name, safe='')}.pt"


def _save(state: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    torch.save(state, part)
    os.replace(part, path)  # a run that is killed here leaves the file as it was
