"""The front end for Lightning Fabric: ``Fabric(callbacks=[EqualStep(), DepthProfile(batch)])``.

``fabric.setup(model, optimizer)`` tells the callbacks of the model. After ``fabric.setup_module``, which tells nobody,
and with several optimizers, your code does so before the first step; and it says when it validates and ends::

    fabric.call("on_after_setup", fabric=fabric, module=model, optimizers=[optimizer])
    fabric.call("on_validation_epoch_end", epoch=epoch)
    fabric.call("on_train_end")

The reference is recorded at the first step, so a checkpoint may be loaded before it. For a resume, put the callbacks
into the state of ``fabric.save`` and ``fabric.load``. An `on_exception` removes all hooks; so does the next set-up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from torch.optim import Optimizer

from depthcb.attached import Control, Profiling, Ratios
from depthcb.engine import ProfileRecorder, StepEqualizer, StepRatioMeter
from depthcb.engine.step_hooks import Hooked
from depthcb.fits import Fit, Member, Setting
from depthcb.signposts import NotForLightning, NotForTransformers, is_a, refuse_engines
from depthcb.warn import warn

if TYPE_CHECKING:
    from lightning.fabric import Fabric

M = TypeVar("M", bound=Member)
_SAY = "fabric.call('on_after_setup', fabric=fabric, module=model, optimizers=[...]) with all optimizers"


class _FabricCallback(NotForTransformers, NotForLightning, Hooked, Generic[M]):
    """Follows the steps of a model's optimizers until the end of the training.

    Args:
        member: The object in the fit.
        folder: The run's folder; None is that of the first logger.
        hparams: Settings that two runs must share to be compared as a pair.
    """

    setting: Setting | None = None
    started = False

    def __init__(self, member: M, folder: str | Path | None = None, hparams: Mapping[str, Any] | None = None) -> None:
        self.member, self.folder, self.hparams = member, folder, hparams
        member.release = self._unhook

    def on_after_setup(self, fabric: Fabric, module: Any, optimizers: Sequence[Any] = ()) -> None:
        refuse_engines(type(self).__name__, fabric.strategy)
        inner = module.module if is_a(module, "_FabricModule") else module
        if self.setting and self.setting.owner is fabric and self.setting.module is not inner and not optimizers:
            warn(f"{type(self).__name__} stays with the first model that was set up; for another one, {_SAY}.")
            return
        folder = self.folder
        if folder is None and fabric.loggers and fabric.is_global_zero:
            folder = getattr(fabric.logger, "log_dir", None)
        described: dict[str, Any] = {"strategy": type(fabric.strategy).__name__, "processes": fabric.world_size}
        described["precision"] = str(fabric.strategy.precision.precision)
        described |= {} if self.hparams is None else {"hparams": dict(self.hparams)}
        known = [getattr(optimizer, "optimizer", optimizer) for optimizer in optimizers]  # not Fabric's wrappers
        self.setting = Setting(inner, known, folder, fabric.loggers, None, described, fabric)
        self.started = False
        self.member.detach()  # from a run that failed, as whatever else is left of one
        Fit.clear(self.setting)
        self._hook(inner, known, self._before, self._after)

    def on_after_optimizer_step(self, strategy: Any, optimizer: Any) -> None:
        if self.setting is None:
            raise ValueError(f"{type(self).__name__} does not know the model: before the first step, {_SAY}.")

    def on_train_end(self) -> None:
        if not self.started:
            warn(f"{type(self).__name__}: no optimizer of the model has made a step.")
        self._unhook()
        self.setting = None
        self.member.finish()

    def on_exception(self) -> None:
        self._unhook()
        self.setting = None
        self.member.detach()

    def _before(self, optimizer: Optimizer) -> None:
        assert self.setting is not None
        if not self.started:
            self.setting.optimizers = self.setting.optimizers or [optimizer]
            self.member.start(self.setting, listen=False)
            self.started = True
        if not any(optimizer is other for other in self.setting.optimizers):
            raise ValueError(f"{type(optimizer).__name__} steps the model too: before the first step, {_SAY}.")
        self.member.engine.before_step(optimizer)

    def _after(self, optimizer: Optimizer) -> None:
        self.member.engine.after_step(optimizer)

    def state_dict(self) -> dict[str, Any]:
        return self.member.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.member.load_state_dict(state_dict)


class DepthProfile(_FabricCallback[Profiling]):
    """`depthcb.DepthProfile` for Fabric: measures wherever your loop calls ``on_validation_epoch_end``.

    Args:
        probe: Inputs to measure on: a batch, a list of batches, a Dataset or a DataLoader.
        options: Further arguments of `depthcb.engine.ProfileRecorder`, and ``folder`` and ``hparams``.
    """

    def __init__(
        self, probe: Any, layers: Any = None, *, folder: Any = None, hparams: Any = None, **options: Any
    ) -> None:
        #: The engine's object, with the profiles.
        self.recorder = ProfileRecorder(probe, **options)
        super().__init__(Profiling(self.recorder), folder, hparams)

    def _after(self, optimizer: Optimizer) -> None:
        if self.setting is not None and optimizer is self.setting.optimizers[-1]:
            self.recorder.steps_made += 1

    def on_validation_epoch_end(self, epoch: int = 0, metrics: Mapping[str, float] | None = None) -> None:
        if self.started:  # no profile before the first step
            self.member.measure(self.recorder.steps_made - 1, epoch, metrics or {})


class EqualStep(_FabricCallback[Control]):
    """`depthcb.EqualStep` for Fabric; ``every`` says which steps are logged. See there for the other arguments."""

    def __init__(self, *, every: int = 50, folder: Any = None, hparams: Any = None, **options: Any) -> None:
        #: The engine's object, with the mean ratios.
        self.equalizer = StepEqualizer(every=every, **options)
        super().__init__(Control(self.equalizer), folder, hparams)


class UpdateRatioMonitor(_FabricCallback[Ratios]):
    """`depthcb.UpdateRatioMonitor` for Fabric; ``every`` says which steps are logged."""

    def __init__(self, *, every: int = 50, folder: Any = None, hparams: Any = None, **options: Any) -> None:
        #: The engine's object, with the mean ratios.
        self.meter = StepRatioMeter(every=every, **options)
        super().__init__(Ratios(self.meter), folder, hparams)
