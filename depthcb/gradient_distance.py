"""How far a new objective is from the one per model was pretrained with, before any training."""

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
from depthcb.isolation import undisturbed
from depthcb.stack import LayerStack

#: A module and the mean loss that one of its objectives gives a batch.
Objective = tuple[nn.Module, Callable[[Any, Any], Tensor]]
#: Two sets of batches, each giving an estimate of the gradient of its own.
Halves = tuple[Sequence[Any], Sequence[Any]]
Gradient = list[list[Tensor]]


@dataclass(frozen=True)
class ObjectiveDistance:
    """The distance between two objectives at one set of weights: 0 the same direction, 1 none in common, 2 opposite.

    None means *unresolved*: the two halves' gradients of one objective don't agree, so that batch noise hides it.

    Args:
        overall: Over all layers as one vector.
        per_layer: Of each layer, input side first.
        layer_names: Name of each layer's module.
        self_overall: The pretraining objective's distance to itself on other data: what counts as near.
        self_per_layer: The same of each layer; empty where no other data were given.
    """

    overall: float | None
    per_layer: tuple[float | None, ...]
    layer_names: tuple[str, ...]
    self_overall: float | None = None
    self_per_layer: tuple[float | None, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON."""
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
    """1 - cos of the stack's gradients under two objectives, on the same texts [paper names it; formula ours].

    With u the gradient of the pretraining loss and v that of the new one, each on two halves of the texts,

        cos = (<u1, v2> + <u2, v1>) / 2 / sqrt(<u1, u2> <v1, v2>)

    in which no product meets the same batch noise twice, so that noise does not pass for distance. An estimate may
    leave [0, 2]; it is not clamped. Gradients are taken in eval mode in the weights' own dtype, products in float64.
    Frozen parameters of the stack count too. Models, their gradients and random streams are left as they were. Memory:
    four gradients of the stack.

    Args:
        pretraining: The pretrained model with its head, and ``(model, batch) -> mean loss``.
        new: The model under the new objective and its loss: the same module, or another of the same stack and weights.
        halves: Two equally large sets of batches of the texts; a gradient is the mean over its batches.
        other_halves: The same of other texts, for the pretraining objective's distance to itself.
        layers: The layers, as `LayerStack.find` takes them.

    Raises:
        ValueError: Stacks that differ in layers, shapes or weights; sharded parameters; a half without batches; a loss
            or gradient that is not finite.

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
    """Overall and per layer."""
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
    """The mean gradient over batches, a list of tensors per layer; zeros where a loss does not reach."""
    module, loss_of = objective
    groups = stack.parameters()
    flat = [p for layer in groups for p in layer]
    sums = [torch.zeros_like(p) for p in flat]
    with undisturbed(module), _differentiable(flat), torch.enable_grad():
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
        raise ValueError("Each half needs at least one batch: give two lists of batches.")
    if len(stacks[0]) != len(stacks[1]):
        raise ValueError(
            f"The objectives' models have {len(stacks[0])} and {len(stacks[1])} layers: they must be one model."
        )
    for name, a, b in zip(stacks[0].names, stacks[0].parameters(), stacks[1].parameters(), strict=True):
        if any(isinstance(p, DTensor) for p in (*a, *b)):
            raise ValueError(f"Layer {name} is sharded over several processes: measure the distance on one process.")
        if [p.shape for p in a] != [p.shape for p in b]:
            raise ValueError(f"Layer {name} has other shapes under the new objective: the two must share one stack.")
        if not all(torch.equal(p.detach().to(q.device), q.detach()) for p, q in zip(a, b, strict=True)):
            raise ValueError(
                f"Layer {name} has other weights under the new objective: the distance is measured at the pretrained "
                "weights, before any step."
            )


def _shown(distance: float | None) -> str:
    return "unresolved" if distance is None else f"{distance:.3f}"
