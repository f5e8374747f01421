"""The distance between a new objective and the pretraining objective, measured before any training."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from depthcb.errors import NotFiniteError
from depthcb.isolation import isolated
from depthcb.stack import LayerStack

#: A module and a function that returns its mean loss on a batch under one objective.
Objective = tuple[nn.Module, Callable[[Any, Any], Tensor]]
#: Two disjoint sets of batches, which give independent estimates of the gradient.
Halves = tuple[Sequence[Any], Sequence[Any]]
Gradient = list[list[Tensor]]


@dataclass(frozen=True)
class ObjectiveDistance:
    """The distance between two objectives at the same weights: 0 for equal, 1 for orthogonal, 2 for opposite gradients.

    None means *unresolved*: batch noise dominates, because the gradients of one objective on the two halves disagree.

    Args:
        overall: The distance over all layers as one vector.
        per_layer: The distance in each layer, input side first.
        layer_names: Name of each layer's module.
        self_overall: The distance of the pretraining objective to itself on other data, as a baseline.
        self_per_layer: The same for each layer; empty if no other data were given.
    """

    overall: float | None
    per_layer: tuple[float | None, ...]
    layer_names: tuple[str, ...]
    self_overall: float | None = None
    self_per_layer: tuple[float | None, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-serialisable lists and numbers."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    def __str__(self) -> str:
        text = f"objective distance {_shown(self.overall)}"
        return f"{text}, to itself on other data {_shown(self.self_overall)}" if self.self_per_layer else text


def objective_distance(
    pretraining: Objective,
    new: Objective,
    halves: Halves,
    other_halves: Halves | None = None,
    *,
    layers: str | list[str] | None = None,
) -> ObjectiveDistance:
    """Computes 1 - cos of the stack's gradients under two objectives on the same texts [paper names it; formula ours].

    With u the gradient of the pretraining loss and v that of the new loss, each on two halves of the texts,

        cos = (<u1, v2> + <u2, v1>) / 2 / sqrt(<u1, u2> <v1, v2>)

    Each product combines independent batches, so that batch noise does not appear as distance. The estimate may lie
    outside [0, 2] and is not clamped. Gradients are computed in eval mode in the dtype of the weights, products in
    float64. Frozen parameters of the stack are included. Models, their gradients and random states are unchanged.
    Memory: four gradients of the stack.

    Args:
        pretraining: The pretrained model with its head, and ``(model, batch) -> mean loss``.
        new: The model under the new objective and its loss: the same module, or another one with the same stack and
            weights.
        halves: Two equally large sets of batches of the texts; a gradient is the mean over the batches of a half.
        other_halves: The same for other texts, to measure the pretraining objective's distance to itself.
        layers: The layers, as accepted by `LayerStack.find`.

    Raises:
        ValueError: The stacks differ in layers, shapes or weights; parameters are sharded; a half has no batches; or a
            loss or gradient is not finite.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(3)])
        >>> up, down = (lambda m, x: m(x).sum()), (lambda m, x: -m(x).sum())
        >>> halves = [torch.randn(8, 4)], [torch.randn(8, 4)]
        >>> round(objective_distance((model, up), (model, down), halves).overall, 6)
        2.0
    """
    stacks = [LayerStack.find(module, layers) for module, _ in (pretraining, new)]
    _check(stacks, halves, other_halves)
    u = [_gradient("pretraining", pretraining, stacks[0], half) for half in halves]
    v = [_gradient("new", new, stacks[1], half) for half in halves]
    overall, per_layer = _distances(u, v)
    names = tuple(stacks[0].names)
    if other_halves is None:
        return ObjectiveDistance(overall, per_layer, names)
    del v
    again = [_gradient("pretraining", pretraining, stacks[0], half) for half in other_halves]
    return ObjectiveDistance(overall, per_layer, names, *_distances(u, again))


def _distances(u: list[Gradient], v: list[Gradient]) -> tuple[float | None, tuple[float | None, ...]]:
    """Returns the distance overall and per layer."""
    products = [[(_dot(a, d) + _dot(b, c)) / 2, _dot(a, b), _dot(c, d)] for a, b, c, d in zip(*u, *v, strict=True)]
    whole = [math.fsum(column) for column in zip(*products, strict=True)]
    return _distance(*whole), tuple(_distance(*layer) for layer in products)


def _distance(across: float, within_u: float, within_v: float) -> float | None:
    if within_u <= 0 or within_v <= 0:
        return None
    return 1 - across / math.sqrt(within_u * within_v)


def _dot(a: list[Tensor], b: list[Tensor]) -> float:
    return math.fsum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))


def _gradient(name: str, objective: Objective, stack: LayerStack, batches: Sequence[Any]) -> Gradient:
    """Returns the mean gradient over batches as a list of tensors per layer; zeros for parameters the loss ignores."""
    module, loss_of = objective
    groups = stack.parameters()
    flat = [p for layer in groups for p in layer]
    sums = [torch.zeros_like(p) for p in flat]
    with isolated(module), _differentiable(flat), torch.enable_grad():
        for batch in batches:
            loss = loss_of(module, tree_map_only(Tensor, lambda t: t.to(flat[0].device), batch))
            if not loss.isfinite():
                raise NotFiniteError(
                    f"The {name} objective's loss is {loss.item()} before any training: check its batches."
                )
            for total, part in zip(sums, torch.autograd.grad(loss, flat, allow_unused=True), strict=True):
                if part is not None:
                    total += part / len(batches)
    parts = iter(sums)
    gradient = [[next(parts) for _ in layer] for layer in groups]
    for layer_name, layer in zip(stack.names, gradient, strict=True):
        if not all(t.isfinite().all() for t in layer):
            raise NotFiniteError(
                f"The {name} objective's gradient of layer {layer_name} is not finite: check its batches."
            )
    return gradient


@contextlib.contextmanager
def _differentiable(parameters: list[nn.Parameter]) -> Iterator[None]:
    frozen = [p for p in parameters if not p.requires_grad]
    for p in frozen:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


def _check(stacks: list[LayerStack], halves: Halves, other_halves: Halves | None) -> None:
    if not all(len(half) for pair in (halves, other_halves or halves) for half in pair):
        raise ValueError("Each half needs at least one batch: pass two lists of batches.")
    if len(stacks[0]) != len(stacks[1]):
        raise ValueError(
            f"The objectives' models have {len(stacks[0])} and {len(stacks[1])} layers: they must share one stack."
        )
    for name, a, b in zip(stacks[0].names, stacks[0].parameters(), stacks[1].parameters(), strict=True):
        if any(isinstance(p, DTensor) for p in (*a, *b)):
            raise ValueError(f"Layer {name} is sharded across processes: measure the distance on one process.")
        if [p.shape for p in a] != [p.shape for p in b]:
            raise ValueError(
                f"Layer {name} has different shapes under the new objective: the two must share one stack."
            )
        if not all(torch.equal(p.detach().to(q.device), q.detach()) for p, q in zip(a, b, strict=True)):
            raise ValueError(
                f"Layer {name} has different weights under the new objective: the distance is measured at the "
                "pretrained weights, before any step."
            )


def _shown(distance: float | None) -> str:
    return "unresolved" if distance is None else f"{distance:.3f}"
