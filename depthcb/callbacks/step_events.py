"""An ``on_after_optimizer_step`` hook, which Lightning callbacks lack."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch.optim import Optimizer

from depthcb.engine.step_hooks import Hooked
from depthcb.signposts import NotForFabric, NotForTransformers, refuse_engines


class OptimizerStepCallback(NotForFabric, NotForTransformers, Hooked, Callback):
    """Base class of callbacks that act around every *real* optimizer step.

    Override `on_after_optimizer_step` (and `on_before_optimizer_closure`). They fire once per step that the optimizer
    really takes: not for accumulated batches, not for steps that an AMP scaler skips, once for LBFGS regardless of how
    often it calls its closure, and once per optimizer under manual optimization. From ``on_train_start`` until the fit
    ends, fails or is torn down they follow ``trainer.optimizers``, also if these are replaced, and any other optimizer
    of the module's parameters. Of an optimizer that wraps another one the outer ``step`` counts; if the wrapper is
    stepped through other methods (``first_step`` and ``second_step`` of SAM), that of the inner one. Subclasses that
    override ``on_train_start``, ``on_train_batch_start``, ``on_fit_end``, ``on_exception`` or ``teardown`` must call
    ``super()``.

    Raises:
        ValueError: At fit start, for a strategy that has its own optimizer step (DeepSpeed) or flattens parameters
            (FSDP1).

    Example:
        >>> from depthcb import OptimizerStepCallback
        >>> class CountSteps(OptimizerStepCallback):
        ...     steps = 0
        ...     def on_after_optimizer_step(self, trainer, pl_module, optimizer):
        ...         self.steps += 1
    """

    #: Label of its runs in comparisons, for callbacks that change the steps; None for callbacks that only observe.
    control: str | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if own := vars(cls).get("on_after_optimizer_step"):
            cls.on_after_optimizer_step = _signposted(own)  # type: ignore[method-assign]

    def on_before_optimizer_closure(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Called at the start of ``optimizer.step``, before the closure computes gradients and the weights change."""

    def on_after_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        """Called at the end of ``optimizer.step``: the new weights include momentum, weight decay and clipping."""

    def on_new_optimizers(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called before a batch if ``trainer.optimizers`` have been replaced or added to."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        refuse_sharding(self, trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        def before(optimizer: Optimizer) -> None:
            self.on_before_optimizer_closure(trainer, pl_module, optimizer)

        def after(optimizer: Optimizer) -> None:
            self.on_after_optimizer_step(trainer, pl_module, optimizer)

        self._hook(pl_module, trainer.optimizers, before, after)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._follow(trainer.optimizers):
            self.on_new_optimizers(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._unhook()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._unhook()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._unhook()


def _signposted(hook: Callable[..., None]) -> Callable[..., None]:
    """Returns a hook that tells Fabric, which calls one of the same name with other arguments, which class to use."""

    @functools.wraps(hook)
    def called(self: OptimizerStepCallback, *args: Any, **kwargs: Any) -> None:
        if "strategy" in kwargs:
            NotForFabric.on_after_optimizer_step(self)
        hook(self, *args, **kwargs)

    return called


def refuse_sharding(callback: Callback, trainer: pl.Trainer) -> None:
    """Raises an error for strategies that flatten the layers' parameters or step them in their own engine.

    Raises:
        ValueError: The strategy is DeepSpeed or FSDP1.
    """
    refuse_engines(type(callback).__name__, trainer.strategy)
