"""The rounding error of a probe pass: what changes seem to be there although no weight has moved."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from depthcb.batches import batch_size, examples_of
from depthcb.feeding import Call
from depthcb.layout import Layout
from depthcb.probe import Probe
from depthcb.similarity import Measure, sketch
from depthcb.stack import LayerStack

#: Share of the probe's examples that is also run in float64, and the smallest number of them.
SHARE, FEWEST = 0.1, 16
#: A float64 copy of the parameters may take at most this many bytes.
MOST_MEMORY = 4 * 2**30


def rounding_floor(
    probe: Probe, model: nn.Module, stack: LayerStack, layout: Layout, measures: Sequence[Measure]
) -> dict[str, tuple[float, ...]]:
    """Measures the change between the same model in float64 and in its own precision, on a tenth of the probe [ours].

    Args:
        probe: The probe.
        model: The model, which is not changed.
        stack: Its layers.
        layout: How to read its layers' outputs.
        measures: The measures.

    Returns:
        The floor of each layer by measure; empty if it could not be measured: the parameters are sharded or already
        float64, would take more than 4 GB in it, the device or the model does not support it, or its forward draws
        random numbers, which are others in float64.
    """
    parameters = [*model.parameters(), *model.buffers()]
    floating = [p for p in parameters if p.is_floating_point()]
    too_large = sum(8 * p.numel() for p in floating) > MOST_MEMORY
    if too_large or any(isinstance(p, DTensor) or p.dtype == torch.float64 for p in floating):
        return {}
    few = _first(probe, max(FEWEST, math.ceil(SHARE * sum(map(batch_size, probe.batches)))))
    try:
        rounded = few.record(model, stack, layout).rows
        redrawn = dataclasses.replace(few, forward_seed=few.forward_seed + 1).record(model, stack, layout).rows
        if not all(map(torch.equal, rounded, redrawn)):
            return {}
        exact = few.record(model, stack, layout, _in_double).rows
        found = {
            m.name: tuple(
                float(m(sketch(m.needs, a), sketch(m.needs, b.double()))) for a, b in zip(exact, rounded, strict=True)
            )
            for m in measures
        }
    except (RuntimeError, TypeError, ValueError):  # no float64 on the device, mixed precisions, too few rows
        return {}
    return {name: floors for name, floors in found.items() if all(map(math.isfinite, floors))}


def _first(probe: Probe, examples: int) -> Probe:
    """Returns a probe of the first examples."""
    batches: list[Any] = []
    for batch in probe.batches:
        left = examples - sum(map(batch_size, batches))
        if left > 0:
            batches.append(examples_of(batch, 0, left))
    return dataclasses.replace(probe, batches=tuple(batches))


def _in_double(model: nn.Module, call: Call) -> Any:
    """Runs a call with float64 weights, without changing the model."""
    runner = _Runner(model, call)
    tensors = {**dict(runner.named_parameters()), **dict(runner.named_buffers())}
    double = {name: _doubled(tensor) for name, tensor in tensors.items()}
    owners: list[Any] = [owner for m in runner.modules() for owner in (m._parameters, m._buffers)]
    held = [dict(owner) for owner in owners]
    try:
        return torch.func.functional_call(runner, double, (call.mapped(_doubled).payload,))
    finally:
        # A forward that parametrizes (peft's stacked experts) has registered others.
        for owner, before in zip(owners, held, strict=True):
            owner.clear()
            owner.update(before)


def _doubled(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


class _Runner(nn.Module):
    def __init__(self, model: nn.Module, call: Call) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, payload: Any) -> Any:
        return self.call.run(payload)
