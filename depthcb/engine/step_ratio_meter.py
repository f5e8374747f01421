"""Measures ||dW|| / ||W|| of each layer without changing the steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from depthcb.adapters import MadeWeights, made_weights
from depthcb.engine.step_hooks import StepHooks, checkpoint_errors, warn_replaced
from depthcb.pretrained import PretrainedWeights
from depthcb.stack import LayerStack
from depthcb.step_extras import OF_GRADIENT, Extra, check_extras, extra_sums, extra_values, gradient
from depthcb.step_ratio import (
    LayerSteps,
    MeanRatios,
    all_reduce,
    as_ratios,
    by_layer,
    local,
    matrix_spreads,
    parameters_of,
    shares,
    tensor_sums,
    weighted,
)
from depthcb.units import Groups, Unit, UnitKind, check_unit, find_units
from depthcb.warn import warn


class StepRatioMeter(StepHooks):
    """Measures each layer's step ratio ||dW|| / ||W|| [paper], after the optimizer and all earlier step hooks.

    `depthcb.UpdateRatioMonitor` does this in a Trainer; its documentation explains the logged keys.

    Args:
        layers: The layers, as accepted by `LayerStack.find`; None searches for them.
        name: Prefix of the logged keys.
        every: Measure every n-th step; ignored in a Trainer.
        unit: What is measured: ``"layer"``, ``"matrix"`` or ``"group"``; see `depthcb.units.find_units`. What is said
            of a layer here holds for each unit.
        groups: Globs that name groups.
        extras: What else to measure, from `depthcb.step_extras.EXTRAS`: each needs another pass over the weights.
        pretrained: The weights at the start, for ``"net_change"``.

    Raises:
        ValueError: ``unit`` or an extra is unknown.

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

    def __init__(
        self,
        layers: list[str] | str | None = None,
        name: str = "update_ratio",
        every: int = 1,
        unit: UnitKind = "layer",
        groups: Groups | None = None,
        extras: Sequence[Extra] = (),
        pretrained: PretrainedWeights | None = None,
    ) -> None:
        check_unit(unit, groups)
        check_extras(extras)
        self.extras, self.pretrained = tuple(extras), pretrained
        self.layers, self.name, self.every = layers, name, every
        self.unit: UnitKind = unit
        self.groups = groups
        #: Names of the measured layers or other units, available after `prepare`.
        self.names: tuple[str, ...] = ()
        #: Their names in logged keys, and the names of the layers that contain them.
        self.keys: tuple[str, ...] = ()
        self.layer_names: tuple[str, ...] = ()
        self.reset()

    def reset(self) -> None:
        """Resets the step count and the means."""
        #: Mean ratio of each layer over the measured steps.
        self.mean = MeanRatios(len(self.names))
        self.steps_made = 0
        self._told = False

    def prepare(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Finds the layers.

        Raises:
            ValueError: The layers cannot be found, or their adapters or the extras cannot be measured.
        """
        self._stack = stack = LayerStack.find(module, self.layers)
        self._known = stack.parameters()
        units = find_units(stack, self.unit, self.groups)
        self.names, self.keys = tuple(unit.name for unit in units), tuple(unit.key for unit in units)
        self.layer_names = stack.names
        if len(self.mean.sums) != len(self.names):  # a different model
            self.reset()
        self._optimizers = optimizers
        self._steps = LayerSteps([unit.parameters for unit in units])
        of_layers = self.unit == "layer"  # to which all that is made inside belongs
        self._made = [made_weights(layer) for layer in stack.modules] if of_layers else _made_in(stack, units)
        if any(self._made) and shares(stack.parameters()) is not None:
            raise ValueError(
                "UpdateRatioMonitor: adapters on sharded parameters (FSDP2, tensor parallelism) are not "
                "supported, nor are parametrizations: use strategy='ddp' or 'auto'."
            )
        if any(self._made) and self.extras:
            raise ValueError(
                "UpdateRatioMonitor: extras are not supported for adapters and parametrizations, whose weights have no "
                "gradient of their own: leave out extras=."
            )
        self._names_in_module = {p: name for name, p in module.named_parameters()}
        if "net_change" in self.extras and self.pretrained is None:
            raise ValueError(
                "UpdateRatioMonitor: net_change needs the pretrained weights: pass pretrained='cpu' to the Trainer's "
                "DepthProfile, or PretrainedWeights.of(model) as pretrained= to a StepRatioMeter."
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
        found, spreads, extras = self._measured(done)
        ratios = dict(zip(done, found, strict=True))
        broken = [self.names[i] for i, ratio in ratios.items() if not math.isfinite(ratio)]
        if broken:
            warn(f"UpdateRatioMonitor: the step ratio of layer {', '.join(broken)} is not finite.")
        updated = {i: ratio for i, ratio in ratios.items() if ratio > 0 and math.isfinite(ratio)}
        if not updated:
            return True
        row = {f"{self.name}/{self.keys[i]}": ratio for i, ratio in updated.items()}
        row[f"{self.name}/spread"] = max(updated.values()) / min(updated.values())
        for column, values in {"matrix_spread": spreads, **extras}.items():
            for i, value in zip(done, values, strict=True):
                if i in updated and math.isfinite(value):
                    row[f"{self.name}/{column}/{self.keys[i]}"] = value
        if self.log is not None:
            self.log(row, step)
        self.mean.note(updated)
        return True

    def state_dict(self) -> dict[str, Any]:
        """Returns numbers and lists only."""
        return {"steps_made": self.steps_made, "mean": self.mean.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores the state.

        Raises:
            ValueError: The state is damaged.
        """
        with checkpoint_errors(f"UpdateRatioMonitor {self.name!r}"):
            self.steps_made = int(state_dict.get("steps_made", 0))  # older checkpoints have none
            self.mean.load_state_dict(state_dict["mean"])

    def _measured(self, done: list[int]) -> tuple[list[float], list[float], dict[str, list[float]]]:
        """Measures the K layers in ``done``, by the weights that adapters make, with one collective call at most.

        Returns:
            Their step ratios, the spreads over their matrices, and the extras; NaN where something is undefined.
        """
        opened, now, before = self._steps.opened(done), self._steps.now(done), self._steps.before(done)
        parts = self._steps.shares(done)
        matrices: Sequence[Sequence[Tensor]] = opened
        if any(self._counted):
            own = {p for layer in self._counted for made in layer for p in made.parameters}
            weights = _values(self._counted)
            for i, parameters, *sides in zip(done, opened, now, before, strict=True):
                for side, made in zip(sides, (weights[i], self._weights[i]), strict=True):
                    side[:] = [t for p, t in zip(parameters, side, strict=True) if p not in own] + made
            matrices = now
        own_sums = [tensor_sums(now, before, parts)[0]]
        if self.extras:
            own_sums.append(weighted(self._extra_sums(opened, now, before), parts))
        sums, *more = all_reduce(own_sums, parts)
        spreads = matrix_spreads(as_ratios(sums).tolist(), matrices)
        extras: dict[str, list[float]] = {extra: extra_values(extra, by_layer(more[0], now)) for extra in self.extras}
        if more and not (more[0][2] > 0).any() and (sums[1] > 0).any():
            self._warn_cleared()
        ratios: list[float] = as_ratios(by_layer(sums, now)).tolist()
        return ratios, spreads, extras

    def _extra_sums(
        self, opened: list[list[nn.Parameter]], now: list[list[Tensor]], before: list[list[Tensor]]
    ) -> Tensor:
        """Returns the (9, T) sums of `extra_sums`; pretrained weights are on the device one tensor at a time."""
        flat: list[nn.Parameter] = [p for layer in opened for p in layer]
        kept = self.pretrained if "net_change" in self.extras else None
        start = (None if kept is None else local(kept.before(self._names_in_module[p], p)) for p in flat)
        gradients = map(gradient, flat) if not set(self.extras).isdisjoint(OF_GRADIENT) else [None] * len(flat)
        return extra_sums(chain.from_iterable(now), chain.from_iterable(before), gradients, start)

    def _warn_cleared(self) -> None:
        """Warns once if an optimizer's step leaves no gradients."""
        if not self._told and not set(self.extras).isdisjoint(OF_GRADIENT):
            self._told = True
            warn(
                "UpdateRatioMonitor: there are no gradients after the step, so the optimizer clears them in it: their "
                "norms and cosines are left out."
            )


def _made_in(stack: LayerStack, units: Sequence[Unit]) -> list[list[MadeWeights]]:
    """Returns the made weights of each unit.

    Raises:
        ValueError: A weight is made of parameters of several units.
    """
    unit_of = {p: i for i, unit in enumerate(units) for p in unit.parameters}
    found: list[list[MadeWeights]] = [[] for _ in units]
    for made in (made for layer in stack.modules for made in made_weights(layer)):
        indices = sorted({unit_of[p] for p in made.parameters if p in unit_of})
        if len(indices) > 1:
            raise ValueError(
                f"UpdateRatioMonitor: a weight is made of parameters of {' and '.join(units[i].name for i in indices)} "
                "by adapters or a parametrization, so these units have no step ratio of their own: use a larger unit=, "
                "such as 'layer'."
            )
        for i in indices:
            found[i].append(made)
    return found


def _values(made: list[list[MadeWeights]]) -> list[list[Tensor]]:
    return [[value for weights in layer for value in weights.values()] for layer in made]
