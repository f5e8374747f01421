"""The engine's objects in a fit outside of Lightning's Trainer: what each of them leaves in the record."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from depthcb.engine.equalizer import StepEqualizer
from depthcb.engine.profile_recorder import ProfileRecorder
from depthcb.engine.step_ratio_meter import StepRatioMeter
from depthcb.fits import Member, Setting
from depthcb.plain import SECRETS
from depthcb.pretrained import reshard
from depthcb.profile import Profile, Profiles
from depthcb.recording import past_rows, profile_settings
from depthcb.run import Row, profile_row, write_null, write_row


class Profiling(Member):
    """A `ProfileRecorder` in a fit."""

    kind = "DepthProfile"
    engine: ProfileRecorder

    def __init__(self, recorder: ProfileRecorder, redact: Collection[str] = SECRETS) -> None:
        super().__init__(recorder, recorder.name, redact)
        #: Where the probe comes from if none was given.
        self.source: Any = None

    @property
    def settings(self) -> Mapping[str, Any]:
        return profile_settings(self.engine)

    @property
    def past(self) -> Sequence[Row]:
        return past_rows(self.engine)

    def listen(self, setting: Setting) -> None:
        """Does nothing: `measure` is called instead."""

    def prepare(self, setting: Setting) -> None:
        self._began = time.perf_counter()
        self.engine.prepare(setting.module, source=self.source)
        reshard(setting.module)  # between backward and step, FSDP2 would keep gathered weights that the step makes old

    def log(self, row: Mapping[str, float], step: int) -> None:
        assert self.fit is not None
        self.fit.log(self, row, step)

    def restore(self, folder: Path, step: int) -> None:
        super().restore(folder, step)
        if step and self.engine.reference is None:
            raise ValueError(
                f"DepthProfile {self.name!r}: {folder} has no reference of an earlier run with this callback, and the "
                "resumed weights are not the pretrained ones: use the same output folder, or compare checkpoints with "
                "`depthcb compare`."
            )

    def forget(self, step: int) -> None:  # another fit with the same object keeps its reference
        everywhere = [self.engine.profiles_by_measure, *self.engine.profiles_by_site.values()]
        for by_measure in everywhere if step else ():
            for measure, profiles in by_measure.items():
                by_measure[measure] = Profiles(p for p in profiles if p.step < step)

    def measure(self, step: int | None, epoch: int, metrics: Mapping[str, Any]) -> dict[str, Profile]:
        """Measures after the step of this number; see `Watch.measure`."""
        if self.fit is None:
            raise ValueError(f"DepthProfile {self.name!r}: nothing is attached, so there is nothing to measure.")
        if step is None and not self.fit.counts:
            raise ValueError("measure() needs the step's number, because watch() was given no optimizer: pass step=.")
        self.engine.steps_made = self.fit.steps if step is None else step + 1
        profiles = self.engine.measure(self.engine.steps_made - 1, epoch)
        reshard(self.fit.module)
        numbers = {key: float(value) for key, value in metrics.items() if not isinstance(value, str)}
        row = profile_row(profiles, self.engine.latest_sites) | {"metrics": numbers}
        self.fit.record(self, row | ({"net_change": self.engine.net_change} if self.engine.net_change else {}))
        return profiles

    def finish(self) -> None:
        fit = self.fit
        try:
            if fit is not None:
                null = self.engine.measure_null()
                fit.open(fit.steps - 1)
                if null is not None:
                    fit.write(self, lambda folder: write_null(folder, null, self.name))
                end = {"seconds": time.perf_counter() - self._began, "probe_seconds": self.engine.seconds}
                lost = {"lost": dict(self.lost)} if self.lost else {}
                row = {"step": fit.steps, "end": {**end, **lost}}
                fit.write(self, lambda folder: write_row(folder, self.name, row))
            super().finish()
        finally:
            self.detach()


class Control(Member):
    """A `StepEqualizer` in a fit."""

    kind = "EqualStep"
    engine: StepEqualizer

    def __init__(self, equalizer: StepEqualizer, redact: Collection[str] = SECRETS) -> None:
        super().__init__(equalizer, equalizer.name, redact)

    @property
    def settings(self) -> Mapping[str, Any]:
        return self.steering

    @property
    def steering(self) -> Mapping[str, Any]:
        engine = self.engine
        return {"layers": engine.names, "target": engine.target, "outside": engine.outside, "decay": engine.decay}

    def prepare(self, setting: Setting) -> None:
        super().prepare(setting)
        self.engine.note_weights()

    def finish(self) -> None:
        try:
            self.engine.check_first_step()
            super().finish()
        finally:
            self.detach()


class Ratios(Member):
    """A `StepRatioMeter` in a fit."""

    kind = "UpdateRatioMonitor"
    engine: StepRatioMeter

    def __init__(self, meter: StepRatioMeter, redact: Collection[str] = SECRETS) -> None:
        super().__init__(meter, meter.name, redact)

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"layers": self.engine.names}


class Attachment:
    """What a ``with`` block attaches to a module and its optimizers, and removes whatever happens.

    On a normal end, everything that is still waiting is logged and the record is marked as finished.
    """

    def __init__(self, setting: Setting, members: Sequence[Member]) -> None:
        self._setting, self._members = setting, members

    def __enter__(self) -> Self:
        started: list[Member] = []
        try:
            for member in self._members:
                started.append(member)
                member.start(self._setting)
        except BaseException:
            for member in started:
                member.detach()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            for member in self._members if error is None else ():
                member.finish()
        finally:
            for member in self._members:
                member.detach()

    def state_dict(self) -> dict[str, Any]:
        """Returns tensors, lists and scalars only, for your checkpoint."""
        return {member.name: member.state_dict() for member in self._members}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores the state, before the ``with`` block: a resumed run keeps its reference and its step numbers.

        Raises:
            ValueError: The state is damaged.
        """
        for member in self._members:
            member.load_state_dict(state_dict.get(member.name, {}))


class Watch(Attachment):
    """The profiles and step ratios of a plain loop; see `depthcb.watch`."""

    def __init__(self, setting: Setting, profiling: Profiling, ratios: Ratios | None) -> None:
        super().__init__(setting, [profiling, *([ratios] if ratios else [])])
        self._profiling = profiling

    @property
    def recorder(self) -> ProfileRecorder:
        """The engine's object, with the reference, the probe and the profiles of each measure."""
        return self._profiling.engine

    @property
    def profiles(self) -> Profiles:
        """The first measure's profiles so far, oldest first."""
        return self.recorder.profiles

    def measure(
        self, step: int | None = None, epoch: int = 0, metrics: Mapping[str, float] | None = None
    ) -> dict[str, Profile]:
        """Measures the module as it is, logs the numbers and writes them to the record.

        Args:
            step: Number of the last step, from 0; None counts the optimizers' steps (-1 before the first).
            epoch: Number of the epoch, from 0.
            metrics: Other numbers for the record, such as a validation loss.

        Returns:
            One profile per measure.

        Raises:
            ValueError: It is called outside the ``with`` block, or activations are not finite.
        """
        return self._profiling.measure(step, epoch, metrics or {})


class EqualSteps(Attachment):
    """The equal-step control of a plain loop; see `depthcb.equal_step`."""

    @property
    def equalizer(self) -> StepEqualizer:
        """The engine's object, with the mean ratios."""
        engine = self._members[0].engine
        assert isinstance(engine, StepEqualizer)
        return engine
