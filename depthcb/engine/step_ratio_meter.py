"""Measures ||dW|| / ||W|| of each layer and touches nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from depthcb.adapters import adapted_modules, effective_weights
from depthcb.engine.step_hooks import StepHooks, damage_named
from depthcb.engine.warn import warn
from depthcb.profile import layer_key
from depthcb.stack import LayerStack
from depthcb.step_ratio import LayerSteps, MeanRatios, shares, step_ratios


class StepRatioMeter(StepHooks):
    """Measures each layer's step ratio ||dW|| / ||W|| [paper] as the optimizer, or whatever acted before, left it.

    `depthcb.UpdateRatioMonitor`, which does this in a Trainer, says what is logged.

    Args:
        layers: The layers, as `LayerStack.find` takes them; None finds them.
        name: First part of the logged keys.
        every: Steps between measured ones, where no Trainer says which.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(4, 4, bias=False) for _ in range(2)])
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1.0)
        >>> meter = StepRatioMeter()
        >>> with meter.attach(model, [optimizer]):
        ...     (0 * model(torch.ones(2, 4))).sum().backward()
        ...     _ = optimizer.step()  # decay alone: every weight shrinks by a tenth
        >>> [round(ratio, 6) for ratio in meter.mean.values()]
        [0.1, 0.1]
    """

    def __init__(self, layers: str | list[str] | None = None, name: str = "update_ratio", every: int = 1) -> None:
        self.layers, self.name, self.every = layers, name, every
        #: Names of the measured layers, known once it is prepared.
        self.names: tuple[str, ...] = ()
        self.reset()

    def reset(self) -> None:
        """Starts to count and to average anew."""
        #: Mean ratio of each layer over the measured steps.
        self.mean = MeanRatios(len(self.names))
        self.steps_made = 0

    def prepare(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Finds the layers.

        Raises:
            ValueError: Layers that cannot be found, or adapters that cannot be measured.
        """
        stack = LayerStack.find(module, self.layers)
        self.names = stack.names
        if len(self.mean.sums) != len(self.names):  # another model than before
            self.reset()
        self._optimizers = optimizers
        self._steps = LayerSteps(stack.parameters())
        self._adapted = [adapted_modules(layer) for layer in stack.modules]
        if any(self._adapted) and shares(stack.parameters()) is not None:
            raise ValueError(
                "UpdateRatioMonitor: adapters on sharded parameters (FSDP2, tensor parallelism) are not "
                "supported: use strategy='ddp' or 'auto'."
            )
        self._effective_weights()  # refuses what can't be measured before any training

    def before_step(self, optimizer: Optimizer) -> None:
        """Copies what this optimizer is about to change, where the step is to be measured."""
        if self._steps.waiting or (self.steps_made + 1) % self.every == 0:
            self.begin(optimizer)
        elif optimizer is self._optimizers[-1]:
            self.steps_made += 1

    def after_step(self, optimizer: Optimizer) -> None:
        """Measures the step, numbered from 0."""
        self.measure(optimizer, self.steps_made)

    def begin(self, optimizer: Optimizer) -> None:
        """Copies what this optimizer is about to change, opening a round of steps if none is open."""
        if not self._steps.waiting:
            self._weights = self._effective_weights()
        self._steps.begin(optimizer, self._optimizers)

    def measure(self, optimizer: Optimizer, step: int) -> None:
        """Measures the round of steps that this optimizer's step is the last of; nothing without `begin`.

        Args:
            optimizer: The optimizer that has stepped.
            step: The step's number, for the sink.
        """
        done = self._steps.finish(optimizer, self._optimizers)
        if not done:
            return
        self.steps_made += 1
        ratios = dict(zip(done, self._ratios(done).tolist(), strict=True))
        broken = [self.names[i] for i, ratio in ratios.items() if not math.isfinite(ratio)]
        if broken:
            warn(f"UpdateRatioMonitor: the step ratio of layer {', '.join(broken)} is not finite.")
        updated = {i: ratio for i, ratio in ratios.items() if ratio > 0 and math.isfinite(ratio)}
        if not updated:
            return
        row = {f"{self.name}/{layer_key(i)}": ratio for i, ratio in updated.items()}
        row[f"{self.name}/spread"] = max(updated.values()) / min(updated.values())
        if self.log is not None:
            self.log(row, step)
        self.mean.note(updated)

    def state_dict(self) -> dict[str, Any]:
        """Numbers and lists only."""
        return {"mean": self.mean.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on from a state.

        Raises:
            ValueError: The state is damaged.
        """
        with damage_named(f"UpdateRatioMonitor {self.name!r}"):
            self.mean.load_state_dict(state_dict["mean"])

    def _ratios(self, done: list[int]) -> Tensor:
        """(K,) step ratios of the K layers in ``done``; adapters count by the weights that they make."""
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
