"""Freezes the layers whose change since pretraining has stopped moving."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import nn
from torch.optim import LBFGS

from depthcb.callbacks.depth_profile import DepthProfile
from depthcb.callbacks.logging import callbacks_of, first_step, logged_step, record_row
from depthcb.callbacks.recorded import RecordedCallback, open_record
from depthcb.engine.step_hooks import checkpoint_errors
from depthcb.plain import SECRETS
from depthcb.stack import LayerStack


class FreezeByChange(RecordedCallback):
    """Freezes layers whose change since pretraining has stopped moving between validations [ours].

    It changes the training, and nothing but a training without it says what that does to the loss: compare both. At
    every ``every``-th measurement of the Trainer's `DepthProfile` that comes before it in the list of callbacks, each
    layer's change c (by the profile's first measure) is compared with what it was ``every`` measurements before. The
    layer is frozen until the end of the fit if ``|c_now - c_before| < below * c_now``. At least one layer keeps
    training.

    A frozen parameter has ``requires_grad=False`` and no gradient, so that the optimizer skips it: neither momentum nor
    weight decay moves it, and parameter groups and optimizer state stay as they are. After the fit all parameters
    require gradients again. Time is saved mostly by freezing the layers nearest to the input, since the backward pass
    must reach the first one that trains. A layer's change can still move when it is frozen, by the layers before it.

    ==================  ================================================================================================
    logged key          meaning (once per validation, in the row of ``val/...``)
    ==================  ================================================================================================
    ``freeze/layers``   number of frozen layers
    ==================  ================================================================================================

    The record in the logger's folder has each check: what moved by how much, and what was frozen. Resumed runs freeze
    the same layers again, and are bit for bit what an uninterrupted run is. Under DDP it needs
    ``strategy="ddp_find_unused_parameters_true"``; sharded strategies are refused.

    Args:
        every: Number of measurements between two checks.
        below: Relative movement of a layer's change, as a fraction, below which it is frozen.
        name: Prefix of the logged keys and name of the record.
        redact: Hyperparameters whose values are kept out of the record, see `DepthProfile`.

    Raises:
        ValueError: At construction, an argument is out of range; at fit start, there is no `DepthProfile` before it, or
            the strategy or the optimizer cannot leave out parameters.

    Example:
        >>> import lightning.pytorch as pl
        >>> from depthcb import DepthProfile, FreezeByChange
        >>> callbacks = [DepthProfile(), FreezeByChange(every=2, below=0.05)]
        >>> trainer = pl.Trainer(callbacks=callbacks, logger=False, enable_checkpointing=False)
    """

    def __init__(
        self, every: int = 1, below: float = 0.05, name: str = "freeze", redact: Collection[str] = SECRETS
    ) -> None:
        if every < 1:
            raise ValueError(f"FreezeByChange(every={every}): it must be at least 1.")
        if not 0 < below < math.inf:
            raise ValueError(f"FreezeByChange(below={below}): it must be a positive number, such as 0.05.")
        self.every, self.below, self.name, self.redact = every, below, name, redact
        self.reset()

    def reset(self) -> None:
        """Forgets all layers and times: the next fit starts with none frozen."""
        #: The step at which each frozen layer was frozen, by its name.
        self.frozen: dict[str, int] = {}
        #: Batches and seconds by number of frozen layers, without the first batch of each.
        self.times: dict[int, tuple[int, float]] = {}
        self._measurements = 0
        self._before: Sequence[float] | None = None
        self._still: list[nn.Parameter] = []
        self._began: float | None = None
        self._fresh = True

    @property
    def steering(self) -> Mapping[str, Any]:
        return {"every": self.every, "below": self.below}

    @property
    def saved_seconds(self) -> float | None:
        """Time that freezing has saved so far, see `saved_seconds`."""
        return saved_seconds(self.times)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self._watch = self._profile_before(trainer)
        strategy = trainer.strategy
        leaves_out = isinstance(strategy, DDPStrategy) and strategy._ddp_kwargs.get("find_unused_parameters")
        if not leaves_out and not isinstance(strategy, SingleDeviceStrategy):
            raise ValueError(
                f"FreezeByChange does not work with {type(strategy).__name__} as it is, which expects a gradient of "
                "every parameter: use one device, or strategy='ddp_find_unused_parameters_true'."
            )

    def _profile_before(self, trainer: pl.Trainer) -> DepthProfile:
        callbacks = callbacks_of(trainer)
        before = [c for c in callbacks[: callbacks.index(self)] if isinstance(c, DepthProfile)]
        if not before:
            raise ValueError("FreezeByChange decides by a DepthProfile: put one before it in the list of callbacks.")
        return before[0]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if any(isinstance(optimizer, LBFGS) for optimizer in trainer.optimizers):
            raise ValueError("FreezeByChange does not work with LBFGS, which moves parameters without a gradient too.")
        if not first_step(trainer):  # not resumed
            self.reset()
        stack = LayerStack.find(pl_module, self._watch.recorder.layers)
        self._layers = dict(zip(stack.names, stack.parameters(), strict=True))
        unknown = self.frozen.keys() - self._layers.keys()
        if unknown:
            raise ValueError(
                f"FreezeByChange: the checkpoint has frozen {min(unknown)!r}, which this model does not have."
            )
        for layer in self.frozen:
            self._hold(layer)
        open_record(self, trainer, pl_module, {**self.steering, "layers": list(stack.names), "frozen": self.frozen})

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        profiles, step = self._watch.profiles, logged_step(trainer)
        if profiles and profiles[-1].step == step:
            self._measurements += 1
            if self._measurements % self.every == 0:
                self._check(trainer, profiles[-1].change, step)
        pl_module.log(f"{self.name}/layers", float(len(self.frozen)), sync_dist=True, reduce_fx="max")

    def _check(self, trainer: pl.Trainer, change: Sequence[float], step: int) -> None:
        """Freezes what has stopped moving since the last check."""
        before, self._before = self._before, tuple(change)
        if before is None:
            return
        moved = dict(zip(self._layers, movement(before, change), strict=True))
        training = [name for name in self._layers if any(p.requires_grad for p in self._layers[name])]
        chosen = stopped({name: moved[name] for name in training}, self.below)
        for name in trainer.strategy.broadcast(chosen):
            self.frozen[name] = step
            self._hold(name)
        row = {"step": step, "moved": list(moved.values()), "froze": chosen, "frozen": list(self.frozen)}
        record_row(self, trainer, row)
        if chosen:
            self._fresh = True
            rank_zero_info(f"FreezeByChange: step {step}: froze {', '.join(chosen)}.")

    def _hold(self, layer: str) -> None:
        """Makes the optimizer skip a layer."""
        for parameter in self._layers[layer]:
            if parameter.requires_grad:
                parameter.requires_grad_(False)
                parameter.grad = None
                self._still.append(parameter)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._began = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self._began is None:
            return
        count, seconds = self.times.get(len(self.frozen), (0, 0.0))
        if not self._fresh:  # the first batch of a fit, and after a change, is slower
            self.times[len(self.frozen)] = count + 1, seconds + time.perf_counter() - self._began
        self._began, self._fresh = None, False

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        saved = self.saved_seconds
        end = {"saved_seconds": saved, "frozen": self.frozen}
        record_row(self, trainer, {"step": logged_step(trainer), "end": end})
        if saved is not None:
            rank_zero_info(f"FreezeByChange: {len(self.frozen)} layers frozen; about {saved:.1f} s of training saved.")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_end(trainer, pl_module)
        self._release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        while self._still:
            self._still.pop().requires_grad_(True)

    def state_dict(self) -> dict[str, Any]:
        before = None if self._before is None else list(self._before)
        return {
            "frozen": dict(self.frozen), "before": before, "measurements": self._measurements,
            "times": {frozen: list(known) for frozen, known in self.times.items()},
        }  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.reset()
        with checkpoint_errors(f"FreezeByChange {self.name!r}"):
            self.frozen = {str(name): int(step) for name, step in state_dict["frozen"].items()}
            self._before, self._measurements = state_dict["before"], int(state_dict["measurements"])
            self.times = {int(f): (int(n), float(s)) for f, (n, s) in state_dict["times"].items()}


def movement(before: Sequence[float], now: Sequence[float]) -> list[float]:
    """Returns how far each layer's change has moved, as a fraction of what it is now; infinite where it is 0.

    Example:
        >>> movement([0.1, 0.2, 0.0], [0.2, 0.19, 0.0])
        [0.5, 0.05263157894736847, inf]
    """
    return [abs(b - a) / abs(b) if b else math.inf for a, b in zip(before, now, strict=True)]


def stopped(moved: Mapping[str, float], below: float) -> list[str]:
    """Returns the layers that have moved less than ``below``, without the one that moved most if these are all.

    Example:
        >>> stopped({"a": 0.01, "b": 0.3}, 0.05), stopped({"a": 0.01, "b": 0.03}, 0.05)
        (['a'], ['a'])
    """
    chosen = [layer for layer, by in moved.items() if by < below]
    if chosen and len(chosen) == len(moved):
        chosen.remove(max(moved, key=moved.__getitem__))
    return chosen


def saved_seconds(times: Mapping[int, tuple[int, float]]) -> float | None:
    """Returns the time that freezing has saved, as batches with frozen layers x how much faster they were.

    Args:
        times: Batches and seconds by number of frozen layers.

    Returns:
        Seconds; negative if batches became slower, None before both kinds are known.

    Example:
        >>> saved_seconds({0: (10, 5.0), 2: (20, 6.0), 3: (10, 2.0)})
        7.0
    """
    if 0 not in times or len(times) < 2:
        return None
    usual = times[0][1] / times[0][0]
    return sum(count * usual - seconds for frozen, (count, seconds) in times.items() if frozen)
