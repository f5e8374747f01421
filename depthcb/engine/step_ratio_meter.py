"""Measures ||dW|| / ||W|| of each layer without changing the steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from depthcb.adapters import MadeWeights, made_weights
from depthcb.engine.step_hooks import StepHooks, checkpoint_errors, warn_replaced
from depthcb.profile import layer_key
from depthcb.stack import LayerStack
from depthcb.step_ratio import LayerSteps, MeanRatios, parameters_of, shares, step_ratios
from depthcb.warn import warn


class StepRatioMeter(StepHooks):
    """Measures each layer's step ratio ||dW|| / ||W|| [paper], after the optimizer and all earlier step hooks.

    `depthcb.UpdateRatioMonitor` does this in a Trainer; its documentation explains the logged keys.

    Args:
        layers: The layers, as accepted by `LayerStack.find`; None searches for them.
        name: Prefix of the logged keys.
        every: Measure every n-th step; ignored in a Trainer.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(4, 4, bias=False) for _ in range(2)])
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1.0)
        >>> meter = StepRatioMeter()
        >>> with meter.attach(model, [optimizer]):
        ...     (0 * model(torch.ones(2, 4))).sum().backward()
        ...     _ = optimizer.step()  # weight decay only: every weight shrinks by a tenth
        >>> [round(ratio, 6) for ratio in meter.mean.values()]
        [0.1, 0.1]
    """

    def __init__(self, layers: list[str] | str | None = None, name: str = "update_ratio", every: int = 1) -> None:
        self.layers, self.name, self.every = layers, name, every
        #: Names of the measured layers, available after `prepare`.
        self.names: tuple[str, ...] = ()
        self.reset()

    def reset(self) -> None:
        """Resets the step count and the means."""
        #: Mean ratio of each layer over the measured steps.
        self.mean = MeanRatios(len(self.names))
        self.steps_made = 0

    def prepare(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Finds the layers.

        Raises:
            ValueError: The layers cannot be found, or their adapters cannot be measured.
        """
        self._stack = stack = LayerStack.find(module, self.layers)
        self._known = stack.parameters()
        self.names = stack.names
        if len(self.mean.sums) != len(self.names):  # a different model
            self.reset()
        self._optimizers = optimizers
        self._steps = LayerSteps(stack.parameters())
        self._made = [made_weights(layer) for layer in stack.modules]
        if any(self._made) and shares(stack.parameters()) is not None:
            raise ValueError(
                "UpdateRatioMonitor: adapters on sharded parameters (FSDP2, tensor parallelism) are not "
                "supported, nor are parametrizations: use strategy='ddp' or 'auto'."
            )
        _values(self._made)  # fails before any training if the adapters can't be measured

    def before_step(self, optimizer: Optimizer) -> None:
        """Copies the parameters that this optimizer is about to change, if the step is to be measured."""
        if self.measuring or (self.steps_made + 1) % self.every == 0:
            self.begin(optimizer)
        elif not parameters_of(optimizer).isdisjoint(parameters_of(self._optimizers[-1])):
            self.steps_made += 1

    def after_step(self, optimizer: Optimizer) -> None:
        """Measures the step; steps are numbered from 0."""
        self.measure(optimizer, self.steps_made)

    @property
    def measuring(self) -> bool:
        """Whether a round of steps is open, so that the next optimizer's step must be measured too."""
        return bool(self._steps.waiting)

    def begin(self, optimizer: Optimizer) -> None:
        """Copies the parameters that this optimizer is about to change, and starts a round of steps if none is open."""
        opens = not self.measuring
        self._steps.begin(optimizer, self._optimizers)
        if opens and self.measuring:
            self._counted = [
                [m for m in layer if m.always or any(p.requires_grad for p in m.parameters)] for layer in self._made
            ]
            self._weights = _values(self._counted)

    def measure(self, optimizer: Optimizer, step: int) -> bool:
        """Measures the round of steps if this optimizer's step completes it; does nothing without a prior `begin`.

        Args:
            optimizer: The optimizer that has stepped.
            step: The step number, for the sink.

        Returns:
            Whether it measured a round.
        """
        done = self._steps.finish(optimizer)
        if not done:
            return False
        self.steps_made += 1
        warn_replaced("UpdateRatioMonitor", self._stack, self._known)
        ratios = dict(zip(done, self._ratios(done).tolist(), strict=True))
        broken = [self.names[i] for i, ratio in ratios.items() if not math.isfinite(ratio)]
        if broken:
            warn(f"UpdateRatioMonitor: the step ratio of layer {', '.join(broken)} is not finite.")
        updated = {i: ratio for i, ratio in ratios.items() if ratio > 0 and math.isfinite(ratio)}
        if not updated:
            return True
        row = {f"{self.name}/{layer_key(i)}": ratio for i, ratio in updated.items()}
        row[f"{self.name}/spread"] = max(updated.values()) / min(updated.values())
        if self.log is not None:
            self.log(row, step)
        self.mean.note(updated)
        return True

    def state_dict(self) -> dict[str, Any]:
        """Returns numbers and lists only."""
        return {"mean": self.mean.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores the state.

        Raises:
            ValueError: The state is damaged.
        """
        with checkpoint_errors(f"UpdateRatioMonitor {self.name!r}"):
            self.mean.load_state_dict(state_dict["mean"])

    def _ratios(self, done: list[int]) -> Tensor:
        """Returns the (K,) step ratios of the K layers in ``done``, using the weights that adapters make."""
        if not any(self._counted):
            return step_ratios(self._steps.now(done), self._steps.before(done), self._steps.shares(done))
        own = {p for layer in self._counted for made in layer for p in made.parameters}
        opened, now, before = self._steps.opened(done), self._steps.now(done), self._steps.before(done)
        weights = _values(self._counted)
        for i, parameters, *sides in zip(done, opened, now, before, strict=True):
            for side, made in zip(sides, (weights[i], self._weights[i]), strict=True):
                side[:] = [t for p, t in zip(parameters, side, strict=True) if p not in own] + made
        return step_ratios(now, before)


def _values(made: list[list[MadeWeights]]) -> list[list[Tensor]]:
    return [[value for weights in layer for value in weights.values()] for layer in made]
