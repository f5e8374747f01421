"""The rounding error of a probe pass: what changes seem to be there although no weight has moved."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from depthcb.batches import batch_size, examples_of
from depthcb.feeding import Call, run_call
from depthcb.layout import Layout
from depthcb.probe import Probe
from depthcb.similarity import Measure, sketch
from depthcb.stack import LayerStack

#: Share of the probe's examples that is also run in float64, and the smallest number of them.
SHARE, FEWEST = 0.1, 16
#: A float64 copy of one parameter may take at most this many bytes.
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
        float64, one would take more than 4 GB in it, the device or the model does not support it, or its forward draws
        random numbers, which are others in float64.
    """
    parameters = [*model.parameters(), *model.buffers()]
    floating = [p for p in parameters if p.is_floating_point()]
    if any(isinstance(p, DTensor) or p.dtype == torch.float64 or 8 * p.numel() > MOST_MEMORY for p in floating):
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
    """Runs a call with float64 weights, of which one operation's at a time are in memory; the model stays as it is."""
    with _Doubled([*model.parameters(), *model.buffers()]):
        return run_call(model, call.mapped(_doubled))


class _Doubled(TorchFunctionMode):
    """Gives each operation float64 copies of the weights among its arguments."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self._weights = {id(weight) for weight in weights if weight.is_floating_point()}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.embedding:  # its rows are few, and rounding has no part in finding them
            return _doubled(func(*args, **kwargs))
        if func == Tensor.dtype.__get__:  # type: ignore[attr-defined]
            return torch.float64 if id(args[0]) in self._weights else func(*args)
        if getattr(func, "__name__", "") == "__get__":  # a shape, a device
            return func(*args, **kwargs)
        args, kwargs = tree_map(self._copy, (args, kwargs))
        return func(*args, **kwargs)

    def _copy(self, value: Any) -> Any:
        return value.double() if id(value) in self._weights else value


def _doubled(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
