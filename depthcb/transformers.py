"""The front end for ``transformers.Trainer`` and TRL: ``Trainer(..., callbacks=[EqualStepCallback()])``.

Rows go to every integration of ``report_to`` that is on and to the record in ``output_dir``, beside which each callback
keeps a file for a resumed run. A profile can choose the best checkpoint: ``metric_for_best_model="depth/cka/slope"``.
Records number steps from 0: after step 9, ``global_step`` is 10. Hooks exist only while the optimizer makes a step.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from transformers import Trainer, TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from depthcb.attached import Control, Profiling, Ratios
from depthcb.engine import ProfileRecorder, StepEqualizer, StepRatioMeter
from depthcb.feeding import call_of_named
from depthcb.fits import Member, Setting
from depthcb.isolation import isolated_rng
from depthcb.recording import tolerated
from depthcb.signposts import NotForFabric, NotForLightning, is_a, unsupported
from depthcb.warn import warn

M = TypeVar("M", bound=Member)
# Arguments of a Trainer that say where it writes, and not how it trains.
_PLACES = ("output_dir", "run_name", "logging_dir", "report_to", "resume_from_checkpoint", "hub_model_id", "local_rank")


class _Callback(NotForFabric, NotForLightning, TrainerCallback, Generic[M]):
    """Attaches a member of the fit for the time of the training, and logs its rows."""

    def __init__(self, member: M) -> None:
        self.member, self._rows = member, list[Mapping[str, float]]()
        member.sink = lambda row, step: self._rows.append(row)

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, optimizer, engine = self._trainer(), kwargs["optimizer"], self.member.engine
        kinds = tuple(INTEGRATION_TO_CALLBACK.values())
        self._integrations: Any = [c for c in trainer.callback_handler.callbacks if isinstance(c, kinds)]
        while is_a(optimizer, "AcceleratedOptimizer"):
            optimizer = optimizer.optimizer
        hparams = {key: value for key, value in args.to_dict().items() if key not in _PLACES}
        described = {"trainer": type(trainer).__qualname__, "processes": args.world_size, "hparams": hparams}
        folder, self._rows = Path(args.output_dir), []
        self.setting = Setting(kwargs["model"], [optimizer], folder, (), args.seed, described, state)
        engine.every = state.logging_steps  # type: ignore[attr-defined]
        self.member.restore(folder, state.global_step)
        self.member.start(self.setting, listen=False)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.member.engine.steps_made = state.global_step  # type: ignore[attr-defined]
        self.member.listen(self.setting)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.member.engine.detach()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._flush(args, state, control)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.member.save()

    on_epoch_begin = on_save  # the first one when everything is attached

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.member.finish()

    def _flush(self, args: Any, state: Any, control: Any, prefix: str = "") -> None:
        """Logs rows as the Trainer does, but in its integrations alone: its history is in every checkpoint."""
        rows, self._rows = self._rows, []
        for integration in self._integrations:
            with tolerated(self.member, f"log by {type(integration).__name__}", "the record has these values"):
                for row in rows:
                    logs = {f"{prefix}{key}": value for key, value in row.items()}
                    integration.on_log(args, state, control, logs=logs, model=self.setting.module)

    def _trainer(self) -> Trainer:
        """Returns the Trainer that is calling, which transformers does not tell its callbacks."""
        callers = (info.frame.f_locals.get("self") for info in inspect.stack(context=0))
        trainer = next((caller for caller in callers if isinstance(caller, Trainer)), None)
        if trainer is None:
            raise ValueError(f"{type(self).__name__} was not called by a transformers.Trainer.")
        if trainer.is_deepspeed_enabled:
            raise unsupported(type(self).__name__, "DeepSpeed")
        if trainer.is_fsdp_enabled and trainer.accelerator.state.fsdp_plugin.fsdp_version == 1:
            raise unsupported(type(self).__name__, "FSDP1")
        return trainer


class DepthProfileCallback(_Callback[Profiling]):
    """`depthcb.DepthProfile` for ``transformers.Trainer``: measures at every evaluation during the training.

    The probe is drawn from the (first) evaluation dataset if none is given; ``options``: see `ProfileRecorder`.
    """

    def __init__(self, probe: Any = None, **options: Any) -> None:
        self.recorder = ProfileRecorder(probe, **options)
        self.recorder.feed = call_of_named
        super().__init__(Profiling(self.recorder))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, self._last = self._trainer(), state.global_step
        if self.recorder.probe is None and (data := trainer.eval_dataset) is not None:
            with isolated_rng():
                self.member.source = trainer.get_eval_dataloader(next(iter(data)) if isinstance(data, dict) else None)
        if args.eval_strategy == "no":
            warn(f"{type(self).__name__}: eval_strategy is 'no', so no profile is measured.")
        if self.recorder.pretrained is not None and args.load_best_model_at_end:
            raise ValueError("load_best_model_at_end: the null would be that of other weights: leave out pretrained=.")
        super().on_train_begin(args, state, control, **kwargs)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.member.fit is not None and state.global_step != self._last:  # else it is another evaluation dataset
            self._last = state.global_step
            self.member.measure(state.global_step - 1, math.ceil(state.epoch) - 1, kwargs["metrics"])
            kwargs["metrics"] |= {f"eval_{key}": value for row in self._rows for key, value in row.items()}
            self._flush(args, state, control, prefix="eval_")


class EqualStepCallback(_Callback[Control]):
    """`depthcb.EqualStep` for ``transformers.Trainer``; ``options`` are the arguments of `StepEqualizer`."""

    def __init__(self, **options: Any) -> None:
        self.equalizer = StepEqualizer(**options)
        super().__init__(Control(self.equalizer))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.equalizer.check_first_step()
        super().on_step_end(args, state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.equalizer.log_waiting()
        self._flush(args, state, control)


class UpdateRatioCallback(_Callback[Ratios]):
    """`depthcb.UpdateRatioMonitor` for ``transformers.Trainer``; ``options`` are those of `StepRatioMeter`."""

    def __init__(self, **options: Any) -> None:
        self.meter = StepRatioMeter(**options)
        super().__init__(Ratios(self.meter))
