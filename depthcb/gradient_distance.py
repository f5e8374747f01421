"""The distance between a new objective and the pretraining objective, measured before any training."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from depthcb.errors import NotFiniteError
from depthcb.isolation import isolated
from depthcb.profile import FloatArray, Interval
from depthcb.stack import LayerStack

#: A module and a function that returns its mean loss on a batch under one objective.
Objective = tuple[nn.Module, Callable[[Any, Any], Tensor]]
#: Groups of batches, whose gradients are compared across groups only.
GROUPS = 6
#: Memory of the groups' gradients, in bytes, above which they are kept in bfloat16. Its rounding is independent in each
#: coordinate and cancels in inner products.
MOST_MEMORY = 2**30

Gradient = list[list[Tensor]]


@dataclass(frozen=True)
class ObjectiveDistance:
    """The distance between two objectives at the same weights: 0 for equal, 1 for orthogonal, 2 for opposite gradients.

    None means *unresolved*: batch noise dominates, so that one objective's gradients on different batches disagree.

    Args:
        overall: The distance over all layers as one vector.
        interval: Its 95 % interval over batches; None if unresolved.
        per_layer: The distance in each layer, input side first.
        layer_names: Name of each layer's module.
        per_layer_intervals: The interval of each layer's distance.
        batches: Number of batches used.
        procrustes_uncorrected: Procrustes distance of the mean gradients, in [0, 1]; None if it was not asked for.
        per_layer_procrustes_uncorrected: The same in each layer; empty if it was not asked for.
    """

    overall: float | None
    interval: Interval | None
    per_layer: tuple[float | None, ...]
    layer_names: tuple[str, ...]
    per_layer_intervals: tuple[Interval | None, ...] = ()
    batches: int = 0
    procrustes_uncorrected: float | None = None
    per_layer_procrustes_uncorrected: tuple[float | None, ...] = ()

    @property
    def width(self) -> float:
        """Width of the overall interval; infinite if unresolved."""
        return math.inf if self.interval is None else self.interval[1] - self.interval[0]

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-serialisable lists and numbers."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    def __str__(self) -> str:
        if self.overall is None or self.interval is None:
            return f"objective distance unresolved after {self.batches} batches"
        low, high = self.interval
        return f"objective distance {self.overall:.3f} [{low:.3f}, {high:.3f}] after {self.batches} batches"


def objective_distance(
    pretraining: Objective,
    new: Objective,
    batches: Iterable[Any],
    *,
    layers: str | list[str] | None = None,
    width: float = 0.2,
    most_batches: int = 96,
    procrustes: bool = False,
) -> ObjectiveDistance:
    """Computes 1 - cos of the stack's gradients under two objectives on the same texts [paper names it; formula ours].

    The batches are dealt to 6 groups. With u_g the gradient of the pretraining loss on group g and v_g that of the new
    loss,

        cos = mean <u_g, v_h> / sqrt(mean <u_g, u_h> mean <v_g, v_h>), each over all g != h.

    Each product combines independent batches, so that batch noise does not appear as distance. The interval is the
    delete-one-group jackknife's. The estimate may lie outside [0, 2] and is not clamped. Gradients are computed in eval
    mode in the dtype of the weights, products in float64. Frozen parameters of the stack are included. Models, their
    gradients and random states are unchanged. Memory on the CPU: twelve gradients of the stack, in bfloat16 if they
    would take more than 1 GB.

    Args:
        pretraining: The pretrained model with its head, and ``(model, batch) -> mean loss``.
        new: The model under the new objective and its loss: the same module, or another one with the same stack and
            weights.
        batches: Batches of the texts, at least 6, read as needed.
        layers: The layers, as accepted by `LayerStack.find`.
        width: Batches are added, 6 at a time, until the overall interval is narrower than this.
        most_batches: The largest number of batches.
        procrustes: Whether to compute the Procrustes distance too, see `procrustes_distance`. It takes one singular
            value decomposition per matrix.

    Raises:
        ValueError: The stacks differ in layers, shapes or weights; parameters are sharded; there are fewer than 6
            batches; or a loss or gradient is not finite.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(3)])
        >>> up, down = (lambda m, x: m(x).sum()), (lambda m, x: -m(x).sum())
        >>> found = objective_distance((model, up), (model, down), [torch.randn(8, 4) for _ in range(6)])
        >>> round(found.overall, 6), found.batches
        (2.0, 6)
    """
    if most_batches < GROUPS:
        raise ValueError(f"most_batches={most_batches}: the distance needs at least {GROUPS} batches.")
    stacks = [LayerStack.find(module, layers) for module, _ in (pretraining, new)]
    _check(stacks)
    sums = [_GroupSums(stack) for stack in stacks]
    found: ObjectiveDistance | None = None
    for rounds, group in enumerate(_rounds(batches, most_batches), start=1):
        for index, batch in enumerate(group):
            sums[0].add(index, _gradient("pretraining", pretraining, stacks[0], batch))
            sums[1].add(index, _gradient("new", new, stacks[1], batch))
        found = _distance_of(sums[0].layers, sums[1].layers, tuple(stacks[0].names), rounds * GROUPS)
        if found.width < width:
            break
    if found is None:
        raise ValueError(f"There are fewer than {GROUPS} batches: the objective distance needs more or smaller ones.")
    if procrustes:
        shapes = [[p.shape for p in layer] for layer in stacks[0].parameters()]
        found = dataclasses.replace(found, **_procrustes(sums[0].layers, sums[1].layers, shapes))
    return found


def _rounds(batches: Iterable[Any], most: int) -> Iterator[list[Any]]:
    """Yields the batches in complete rounds of one per group."""
    remaining = iter(batches)
    for _ in range(most // GROUPS):
        group = list(itertools.islice(remaining, GROUPS))
        if len(group) < GROUPS:
            return
        yield group


class _GroupSums:
    """Sums of a stack's gradients by group of batches, on the CPU: one (groups, n_l) tensor per layer."""

    def __init__(self, stack: LayerStack) -> None:
        sizes = [sum(p.numel() for p in layer) for layer in stack.parameters()]
        dtype = torch.float32 if 2 * GROUPS * 4 * sum(sizes) <= MOST_MEMORY else torch.bfloat16
        double = any(p.dtype == torch.float64 for layer in stack.parameters() for p in layer)
        self.layers = [torch.zeros(GROUPS, size, dtype=torch.float64 if double else dtype) for size in sizes]

    def add(self, group: int, gradient: Gradient) -> None:
        """Adds the gradient of one batch."""
        for sums, parts in zip(self.layers, gradient, strict=True):
            sums[group] += torch.cat([part.flatten() for part in parts]).to(sums.device, sums.dtype)


def _distance_of(u: Sequence[Tensor], v: Sequence[Tensor], names: tuple[str, ...], batches: int) -> ObjectiveDistance:
    """Returns the distances with their intervals, given each layer's group sums under both objectives."""
    per_layer = np.stack([_products(a, b) for a, b in zip(u, v, strict=True)])
    overall, interval = _with_interval(per_layer.sum(axis=0))
    layers = [_with_interval(products) for products in per_layer]
    distances, intervals = zip(*layers, strict=True)
    return ObjectiveDistance(overall, interval, distances, names, intervals, batches)


def _products(u: Tensor, v: Tensor) -> FloatArray:
    """Returns the (3, G, G) inner products <u_g, v_h>, <u_g, u_h> and <v_g, v_h>, with 0 where g = h."""
    a, b = u.double(), v.double()
    found: FloatArray = torch.stack([a @ b.T, a @ a.T, b @ b.T]).numpy()
    found[:, range(GROUPS), range(GROUPS)] = 0
    return found


def _with_interval(products: FloatArray) -> tuple[float | None, Interval | None]:
    """Returns the distance and its jackknife interval over the groups, given the (3, G, G) products."""
    overall = _distance(*products.sum(axis=(1, 2)))
    without = [_distance(*np.delete(np.delete(products, g, 1), g, 2).sum(axis=(1, 2))) for g in range(GROUPS)]
    known = [d for d in without if d is not None]
    if overall is None or len(known) < GROUPS:
        return overall, None
    error = math.sqrt((GROUPS - 1) * float(np.var(known)))
    half = float(stats.t.ppf(0.975, GROUPS - 1)) * error
    return overall, (overall - half, overall + half)


def _distance(across: float, within_u: float, within_v: float) -> float | None:
    if within_u <= 0 or within_v <= 0:
        return None
    return 1 - float(across) / math.sqrt(within_u * within_v)


def procrustes_distance(u: Sequence[Tensor], v: Sequence[Tensor]) -> float | None:
    """Computes the Procrustes distance of two lists of matrices, matrix by matrix [second-hand: Procrustes; form ours].

    For matrices U_m and V_m (out, in), each pair with its own best rotation R_m of the columns,

        1 - sum_m <U_m, V_m R_m> / sqrt(sum_m |U_m|^2 sum_m |V_m|^2),

    where <U_m, V_m R_m> is the nuclear norm |U_m' V_m|_*. So it is 1 - cos after the rotations, and never larger than
    without them: 0 if rotations map one onto the other, at most 1. *Uncorrected*: the nuclear norm is convex, so that
    noise in the gradients makes it larger on average, and no average over independent batches takes that out, as it
    does for `objective_distance`. More batches move it.

    Args:
        u: Matrices; tensors with more dimensions are flattened to (first dimension, rest), those with fewer left out.
        v: Matrices of the same shapes.

    Returns:
        The distance; None if all of one side's matrices are 0.

    Example:
        >>> import torch
        >>> g = torch.eye(3)
        >>> abs(procrustes_distance([g], [g.flip(1)])) < 1e-12, abs(procrustes_distance([g], [-g])) < 1e-12
        (True, True)
    """
    return _aligned(_alignments(u, v))


def _alignments(u: Sequence[Tensor], v: Sequence[Tensor]) -> FloatArray:
    """Returns (3,): the sums over the matrices of |U'V|_*, |U|^2 and |V|^2."""
    total = np.zeros(3)
    for a, b in zip(u, v, strict=True):
        if a.ndim < 2:
            continue
        a, b = (x.detach().double().flatten(1) for x in (a, b))
        norms = [float(x.square().sum()) for x in (a, b)]
        if a.shape[0] < a.shape[1]:  # A' = Q R and B' = S T give |A'B|_* = |R T'|_*, which is smaller
            a, b = (torch.linalg.qr(x.T, mode="r").R.T for x in (a, b))
        total += [float(torch.linalg.svdvals(a.T @ b).sum()), *norms]
    return total


def _aligned(sums: FloatArray) -> float | None:
    aligned, *squares = (float(value) for value in sums)
    if not all(squares):
        return None
    return 1 - aligned / math.sqrt(squares[0] * squares[1])


def _procrustes(u: Sequence[Tensor], v: Sequence[Tensor], shapes: Sequence[Sequence[torch.Size]]) -> dict[str, Any]:
    """Returns the fields of the Procrustes distance of the gradients' sums, given those by group and layer."""

    def parts(sums: Tensor, layer: Sequence[torch.Size]) -> list[Tensor]:
        whole = torch.split(sums.double().sum(dim=0), [shape.numel() for shape in layer])
        return [part.view(shape) for part, shape in zip(whole, layer, strict=True)]

    sums = [_alignments(parts(a, of), parts(b, of)) for a, b, of in zip(u, v, shapes, strict=True)]
    overall = _aligned(np.sum(sums, axis=0))
    return {"procrustes_uncorrected": overall, "per_layer_procrustes_uncorrected": tuple(map(_aligned, sums))}


def _gradient(name: str, objective: Objective, stack: LayerStack, batch: Any) -> Gradient:
    """Returns the gradient on a batch as a list of tensors per layer; zeros for parameters the loss ignores."""
    module, loss_of = objective
    groups = stack.parameters()
    flat = [p for layer in groups for p in layer]
    with isolated(module), _differentiable(flat), torch.enable_grad():
        loss = loss_of(module, tree_map_only(Tensor, lambda t: t.to(flat[0].device), batch))
        if not loss.isfinite():
            raise NotFiniteError(
                f"The {name} objective's loss is {loss.item()} before any training: check its batches."
            )
        found = torch.autograd.grad(loss, flat, allow_unused=True)
    parts = iter(torch.zeros_like(p) if g is None else g for p, g in zip(flat, found, strict=True))
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


def _check(stacks: list[LayerStack]) -> None:
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
