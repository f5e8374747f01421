"""Monitors ||dW|| / ||W|| per layer in a Trainer."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import lightning.pytorch as pl
from torch.optim import Optimizer

from depthcb.callbacks.logging import LogSteps, logged_step, rows_of
from depthcb.callbacks.recorded import RecordedCallback, open_record
from depthcb.callbacks.step_events import OptimizerStepCallback
from depthcb.engine.step_ratio_meter import StepRatioMeter
from depthcb.plain import SECRETS
from depthcb.step_ratio import MeanRatios


class UpdateRatioMonitor(RecordedCallback, OptimizerStepCallback):
    """Logs each layer's step ratio ||dW|| / ||W|| [paper], after the optimizer and all earlier callbacks.

    A layer with adapters is measured by its merged weights, W0 + BA for LoRA, and one with parametrizations (weight or
    spectral norm) by the weights that they make [ours]. Placed after `EqualStep` in the
    Trainer's list of callbacks it sees the controlled step, placed before it the optimizer's own step. It does nothing
    between log steps. Memory: one copy of the layers' parameters from the first log step on.

    ==========================  ===================================================================================
    logged key                  meaning (every ``log_every_n_steps``, or at the next step of the layers' optimizer;
                                layers without an update are left out)
    ==========================  ===================================================================================
    ``update_ratio/L00``        realised step ratio of layer 0 (fraction of the layer's norm)
    ``update_ratio/spread``     max / min over the layers
    ==========================  ===================================================================================

    Args:
        layers: The layers, as accepted by `LayerStack.find`; None searches for them.
        name: Prefix of the logged keys; must be unique if a Trainer has several monitors.
        redact: Hyperparameters whose values are kept out of the record, see `DepthProfile`.

    Example:
        >>> import lightning.pytorch as pl
        >>> from depthcb import UpdateRatioMonitor
        >>> trainer = pl.Trainer(callbacks=[UpdateRatioMonitor()], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        layers: list[str] | str | None = None,
        name: str = "update_ratio",
        redact: Collection[str] = SECRETS,
    ) -> None:
        self.name, self.redact = name, redact
        #: The underlying meter, which works without a Trainer.
        self.meter = StepRatioMeter(layers, name)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the monitored layers, available from fit start."""
        return self.meter.names

    @property
    def mean(self) -> MeanRatios:
        """Mean ratio of each layer over the logged steps."""
        return self.meter.mean

    @property
    def state_key(self) -> str:
        return self._generate_state_key(name=self.name)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not later: after a forward, FSDP exposes gathered parameters instead of the shards that the optimizer owns.
        self.meter.prepare(pl_module, trainer.optimizers)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == 0 or len(self.mean.sums) != len(self.names):  # not resumed, or a new model
            self.meter.reset()
        self.meter.log = rows_of(self, trainer)
        self._logs = LogSteps(trainer)
        open_record(self, trainer, pl_module, {"layers": self.names})
        super().on_train_start(trainer, pl_module)

    def on_new_optimizers(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.meter.prepare(pl_module, trainer.optimizers)

    def on_before_optimizer_closure(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self.meter.measuring or self._logs.due(logged_step(trainer) + 1):
            self.meter.begin(optimizer)

    def on_after_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        if self.meter.measure(optimizer, logged_step(trainer)):
            self._logs.note(logged_step(trainer) + 1)

    def state_dict(self) -> dict[str, Any]:
        return self.meter.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.meter.load_state_dict(state_dict)
