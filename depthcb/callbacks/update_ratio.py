"""Watches ||dW|| / ||W|| per layer and touches nothing."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from depthcb.adapters import adapted_modules, effective_weights
from depthcb.callbacks.logged import is_log_step, log_row, logged_step, open_record
from depthcb.callbacks.step_events import OptimizerStepCallback, damage_named
from depthcb.stack import LayerStack
from depthcb.step_ratio import LayerSteps, MeanRatios, shares, step_ratios


class UpdateRatioMonitor(OptimizerStepCallback):
    """Logs each layer's step ratio ||dW|| / ||W|| [paper] as the optimizer, or a callback before this one, left it.

    A layer with adapters is measured by the weights that they make, W0 + BA with LoRA [ours].
    Placed after `EqualStep` in the Trainer's list it sees the controlled step, placed before it the optimizer's own.
    Between log steps it does nothing at all; from the first one on it keeps one more copy of the layers' parameters.

    ==========================  ===================================================================================
    logged key                  meaning (every ``log_every_n_steps``; layers without an update are left out)
    ==========================  ===================================================================================
    ``update_ratio/L00``        realised step ratio of layer 0 (fraction of the layer's norm)
    ``update_ratio/spread``     max / min over the layers
    ==========================  ===================================================================================

    Args:
        layers: The layers, as `LayerStack.find` takes them; None finds them.
        name: First part of the logged keys; two monitors in one Trainer need two names.

    Example:
        >>> import lightning.pytorch as pl
        >>> from depthcb import UpdateRatioMonitor
        >>> trainer = pl.Trainer(callbacks=[UpdateRatioMonitor()], logger=False, enable_checkpointing=False)
    """

    def __init__(self, layers: str | list[str] | None = None, name: str = "update_ratio") -> None:
        self.layers = layers
        self.name = name
        #: Names of the watched layers, known from fit start on.
        self.names: tuple[str, ...] = ()
        #: Mean ratio of each layer over the logged steps.
        self.mean = MeanRatios(0)

    @property
    def state_key(self) -> str:
        return self._generate_state_key(name=self.name)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not later: after a forward, FSDP shows gathered parameters in place of the shards that the optimizer owns.
        stack = LayerStack.find(pl_module, self.layers)
        self.names = stack.names
        self._steps = LayerSteps(stack.parameters())
        self._adapted = [adapted_modules(layer) for layer in stack.modules]
        if any(self._adapted) and shares(stack.parameters()) is not None:
            raise ValueError(
                "UpdateRatioMonitor: adapters on parameters in pieces (FSDP2, tensor parallelism) are not "
                "supported: use strategy='ddp' or 'auto'."
            )
        self._effective_weights()  # refuses what can't be measured before any training

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == 0 or len(self.mean.sums) != len(self.names):  # not resumed, or another model
            self.mean = MeanRatios(len(self.names))
        open_record(self, "UpdateRatioMonitor", trainer, pl_module, {"layers": self.names})
        super().on_train_start(trainer, pl_module)

    def on_before_optimizer_closure(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if not is_log_step(trainer):
            return
        if not self._steps.waiting:
            self._weights = self._effective_weights()
        self._steps.begin(optimizer, trainer.optimizers)

    def on_after_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        done = self._steps.finish(optimizer, trainer.optimizers)
        if not done:
            return
        ratios = dict(zip(done, self._measure(done).tolist(), strict=True))
        broken = [self.names[i] for i, ratio in ratios.items() if not math.isfinite(ratio)]
        if broken:
            rank_zero_warn(f"UpdateRatioMonitor: the step ratio of layer {', '.join(broken)} is not finite.")
        updated = {i: ratio for i, ratio in ratios.items() if ratio > 0 and math.isfinite(ratio)}
        if not updated:
            return
        row = {f"{self.name}/L{i:02d}": ratio for i, ratio in updated.items()}
        row[f"{self.name}/spread"] = max(updated.values()) / min(updated.values())
        log_row(self, trainer, row, logged_step(trainer))
        self.mean.note(updated)

    def _measure(self, done: list[int]) -> Tensor:
        """Step ratios of the layers in ``done``; adapters count by the weights that they make, not by their own."""
        if not any(self._adapted):
            return step_ratios(self._steps.now(done), self._steps.before(done), self._steps.shares(done))
        own = {p for layer in self._adapted for m in layer for p in m.parameters()}
        opened, now, before = self._steps.opened(done), self._steps.now(done), self._steps.before(done)
        made = self._effective_weights()
        for i, parameters, *sides in zip(done, opened, now, before, strict=True):
            for side, weights in zip(sides, (made[i], self._weights[i]), strict=True):
                side[:] = [t for p, t in zip(parameters, side, strict=True) if p not in own] + weights
        return step_ratios(now, before)

    def _effective_weights(self) -> list[list[Tensor]]:
        return [[weight for m in layer for weight in effective_weights(m)] for layer in self._adapted]

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        with damage_named(self):
            self.mean.load_state_dict(state_dict["mean"])
