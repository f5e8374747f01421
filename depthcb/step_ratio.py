"""Measures and imposes the step ratio ||dW|| / ||W|| of each layer, given only tensors.

All arithmetic is batched over parameters and stays on their device, without host synchronisation. If parameters are
sharded across processes (DTensor), each process works on its local shards and one all-reduce gives the global norms.
Every tensor is weighted by its share, 1 / (number of processes that hold the same values).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

#: How the imposed ratio is derived from the measured ones; see `imposed_ratios`.
Target = float | Sequence[float] | Callable[[Tensor, int], Tensor] | str  # str last: a command line tries them in order
#: Weights are summed in rows of this length, and in blocks of so many rows per thread, 1 MB in fp32, which stay in the
#: cache of its core.
ROW, BLOCK = 128, 2048
#: Number of elements below which tensors are summed together instead, which calls fewer functions.
SMALL = 2**14
#: Number of elements that an accelerator sums together at most, which needs as much memory.
TOGETHER = 2**24
#: Mean square in fp32 below which squares that vanish, each at most 1e-38, can change a sum by more than 1e-7.
LEAST_SQUARE = 1e-30
NAMED_TARGETS = ("mean", "median", "min", "geometric_mean")


class LayerSteps:
    """Copies of L layers' parameters from before the step, from which the update is computed after it.

    If several optimizers own parameters of the layers, a round lasts until each of these parameters' optimizers has
    stepped, so that layers are comparable; a parameter is copied just before its own optimizer steps. The buffers (one
    copy of every trainable parameter) are reused.

    Args:
        layers: The parameters of each layer; parameters that don't require a gradient when their optimizer steps are
            ignored.
        offload: Whether to keep the copies in main memory, pinned if the parameters are on a GPU of CUDA.
    """

    def __init__(self, layers: Sequence[Sequence[nn.Parameter]], offload: bool = False) -> None:
        self._layers, self._offload = layers, offload
        self._parameters = {p for layer in layers for p in layer}
        self._copies: dict[Tensor, Tensor] = {}
        #: The parameters whose optimizers have yet to step in this round; empty between rounds.
        self.waiting: set[Tensor] = set()
        #: The parameters that an optimizer has owned in any round.
        self.owned: set[Tensor] = set()
        self._open: list[list[nn.Parameter]] = [[] for _ in layers]

    @torch.no_grad()
    def begin(self, optimizer: torch.optim.Optimizer, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Copies the parameters that this optimizer is about to change, and starts a round if none is open."""
        owned = parameters_of(optimizer) & self._parameters
        if not owned:
            return
        if not self.waiting:
            self.waiting = owned.union(*map(parameters_of, optimizers)) & self._parameters
            self.owned |= self.waiting
            self._open = [[] for _ in self._layers]
        opened = {p for layer in self._open for p in layer}
        fresh: list[Tensor] = []
        for index, layer in enumerate(self._layers):
            new = [p for p in layer if p in owned and p.requires_grad and p not in opened]
            self._open[index] = [p for p in layer if p in {*self._open[index], *new}]
            fresh += new
        for parameter in fresh:
            if parameter not in self._copies:
                self._copies[parameter] = self._buffer(local(parameter))
        if fresh:
            torch._foreach_copy_([self._copies[p] for p in fresh], [local(p) for p in fresh], non_blocking=True)

    def _buffer(self, values: Tensor) -> Tensor:
        if not self._offload:
            return torch.empty_like(values)
        return torch.empty_like(values, device="cpu", pin_memory=values.device.type == "cuda")

    def finish(self, optimizer: torch.optim.Optimizer) -> list[int]:
        """Returns the layers of the round in depth order if this optimizer's step completes it, else an empty list."""
        if not self.waiting:
            return []
        self.waiting -= parameters_of(optimizer)
        return [] if self.waiting else [i for i, layer in enumerate(self._open) if layer]

    def stepping(self) -> set[int]:
        """Returns the layers that have begun a step in a round that is not complete."""
        return {i for i, layer in enumerate(self._open) if layer} if self.waiting else set()

    def opened(self, layers: Sequence[int]) -> list[list[nn.Parameter]]:
        """Returns the parameters of these layers that take part in this round."""
        return [self._open[i] for i in layers]

    def now(self, layers: Sequence[int]) -> list[list[Tensor]]:
        """Returns the current parameters of these layers, or this process's shards of them."""
        return [[local(p) for p in layer] for layer in self.opened(layers)]

    def before(self, layers: Sequence[int]) -> list[list[Tensor]]:
        """Returns the copies from before the step; callers may overwrite them until the next round."""
        return [[self._copies[p] for p in layer] for layer in self.opened(layers)]

    def shares(self, layers: Sequence[int]) -> tuple[float, ...] | None:
        """Returns the weight of each tensor in a sum over all processes; None if nothing is sharded."""
        return shares(self.opened(layers))


class MeanRatios:
    """Running mean of the step ratio of each of L layers, in constant memory.

    >>> mean = MeanRatios(2)
    >>> mean.note({0: 0.1})
    >>> mean.note({0: 0.3, 1: 0.5})
    >>> mean.values()
    [0.2, 0.5]
    """

    def __init__(self, layers: int) -> None:
        self.sums, self.counts = [0.0] * layers, [0] * layers

    def note(self, ratios: Mapping[int, float]) -> None:
        """Adds one step: the ratio of each layer that was updated, by layer index."""
        for layer, ratio in ratios.items():
            self.sums[layer] += ratio
            self.counts[layer] += 1

    def values(self) -> list[float]:
        """Returns the means; 0 for a layer that was never updated."""
        return [total / count if count else 0.0 for total, count in zip(self.sums, self.counts, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums, "counts": self.counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        sums, counts = [float(s) for s in state["sums"]], [int(c) for c in state["counts"]]
        if len(sums) != len(counts):
            raise ValueError(f"{len(sums)} sums for {len(counts)} counts")
        self.sums, self.counts = sums, counts


@torch.no_grad()
def local(parameter: Tensor) -> Tensor:
    """Returns a view of the tensor, or of this process's possibly empty shard; in-place writes change the parameter.

    Complex numbers become pairs of real ones, which have the same norm.
    """
    values: Tensor = parameter.to_local() if isinstance(parameter, DTensor) else parameter.detach()
    return torch.view_as_real(values) if values.is_complex() else values


def shares(layers: Sequence[Sequence[Tensor]]) -> tuple[float, ...] | None:
    """Returns 1 / (number of processes that hold the same values) for each tensor; None if nothing is sharded."""
    flat = _flat(layers)
    if not any(isinstance(t, DTensor) for t in flat):
        return None
    return tuple(_shards(t) / dist.get_world_size() for t in flat)


def _shards(tensor: Tensor) -> int:
    """Returns the number of shards of a tensor."""
    if not isinstance(tensor, DTensor):
        return 1
    mesh = tensor.device_mesh
    return math.prod(mesh.size(dim) for dim, kind in enumerate(tensor.placements) if not kind.is_replicate())


@torch.no_grad()
def layer_norms(layers: Sequence[Sequence[Tensor]]) -> Tensor:
    """Returns the L2 norm of each layer's concatenated tensors: (L,), on the first tensor's device.

    Makes one collective call if tensors are sharded.

    >>> layer_norms([[torch.tensor([3.0]), torch.tensor([[4.0]])], [torch.tensor([1.0])]]).tolist()
    [5.0, 1.0]
    """
    parts = shares(layers)
    return all_reduce([_squares([[local(t) for t in layer] for layer in layers], parts)], parts)[0].sqrt()


@torch.no_grad()
def step_ratios(
    now: Sequence[Sequence[Tensor]],
    before: Sequence[Sequence[Tensor]],
    shares: tuple[float, ...] | None = None,
) -> Tensor:
    """Returns ||now - before|| / ||before|| of each layer: (L,) [paper].

    Args:
        now: The parameters of each of L layers, of any shapes, or this process's shards of them.
        before: The values from before the step, in the same shapes; on any device.
        shares: As returned by `LayerSteps.shares`; if given, makes one collective call.
    """
    sums, _ = step_sums(now, before, shares)
    return as_ratios(all_reduce([sums], shares)[0])


def step_sums(
    now: Sequence[Sequence[Tensor]], before: Sequence[Sequence[Tensor]], shares: tuple[float, ...] | None = None
) -> tuple[Tensor, list[int]]:
    """Returns the sums of `tensor_sums`, added up for each layer, (2, L), and the layers that may not be finite."""
    sums, suspects = tensor_sums(now, before, shares)
    return by_layer(sums, now), suspects


@torch.no_grad()
def tensor_sums(
    now: Sequence[Sequence[Tensor]],
    before: Sequence[Sequence[Tensor]],
    shares: tuple[float, ...] | None = None,
) -> tuple[Tensor, list[int]]:
    """Computes this process's part of the sums behind the step ratios, for each of the layers' T tensors.

    On a CPU, a sum depends on the values alone: equal tensors have equal sums, bit for bit.

    Args:
        now: As in `step_ratios`.
        before: As in `step_ratios`.
        shares: As in `step_ratios`.

    Returns:
        (2, T): ||before||^2 and ||now - before||^2, the second one not finite if ``now`` is not. And the layers that
        may not be finite: all of them on an accelerator, which is not waited for.
    """
    device = now[0][0].device
    if device.type == "cpu":
        columns, unsafe = _sums_on_cpu(_flat(now), _flat(before))
        of_layer = [i for i, layer in enumerate(now) for _ in layer]
        return weighted(columns, shares), sorted({of_layer[i] for i in unsafe})
    pairs = _together(_flat(now), _flat(before))
    parts = [_sums_together(n, b).to(device) for n, b in pairs]
    return weighted(torch.cat(parts, dim=1), shares), list(range(len(now)))


@torch.no_grad()
def rescaled_sums(
    now: Sequence[Sequence[Tensor]],
    before: Sequence[Sequence[Tensor]],
    scale: Tensor,
    shares: tuple[float, ...] | None = None,
) -> Tensor:
    """Rescales each layer's step as `rescale` does, and measures the outcome while it is in the cache of a CPU.

    Returns:
        (2, T): this process's part of ||now||^2 and ||now - before||^2 after that.
    """
    if now[0][0].device.type == "cpu":
        factors = [factor for layer, factor in zip(now, scale.unbind(), strict=True) for _ in layer]
        return weighted(_sums_on_cpu(_flat(now), _flat(before), factors)[0], shares)
    rescale(now, before, scale)
    pairs = _together(_flat(now), _flat(before))
    parts = [_sums_together(n, b, of_now=True).to(scale.device) for n, b in pairs]
    return weighted(torch.cat(parts, dim=1), shares)


def weighted(columns: Tensor, shares: tuple[float, ...] | None) -> Tensor:
    """Weights the columns of T tensors, (n, T), by their shares."""
    return columns if shares is None else columns * on_device(shares, columns.device, columns.dtype)


def by_layer(columns: Tensor, layers: Sequence[Sequence[Tensor]]) -> Tensor:
    """Adds up the columns, (n, T), of the T tensors of L layers: (n, L)."""
    found = torch.zeros(len(columns), len(layers), dtype=columns.dtype, device=columns.device)
    return found.index_add_(1, _layer_index(tuple(map(len, layers)), columns.device), columns)


def _sums_on_cpu(
    now: Sequence[Tensor], before: Sequence[Tensor], factors: Sequence[Tensor] | None = None
) -> tuple[Tensor, list[int]]:
    """Returns the sums of each tensor, as in `tensor_sums`, and the indices of those that are not finite.

    With ``factors``, one scalar per tensor, rescales the steps first; the sums are then those of `rescaled_sums`.
    """
    of_now = factors is not None
    block = BLOCK * torch.get_num_threads()
    scratch = {dtype: torch.empty(block, ROW, dtype=dtype) for dtype in {_summed_as(n) for n in now}}
    parts, least = [], []
    for n, b, factor in zip(now, before, factors or itertools.repeat(None, len(now)), strict=True):
        large = n.numel() >= SMALL
        if factor is not None and not (large and n.is_contiguous() and b.is_contiguous()):
            _interpolate(n, b, factor)
            factor = None
        parts.append(
            _row_norms(n, b, of_now, factor, scratch[_summed_as(n)]) if large else _pair(n.double(), b.double(), of_now)
        )
        least.append(n.numel() * LEAST_SQUARE if large else -1.0)
    found = _squares_of(parts)
    sure = found.isfinite() & (found > torch.tensor(least, dtype=torch.float64))
    doubtful = [i for i, flag in enumerate(sure.all(dim=0).tolist()) if not flag]
    for i in doubtful:
        if least[i] > 0 and not (sure[0, i] and torch.equal(now[i], before[i])):  # a step of 0 is no lost square
            exact = _squares_of([_pair(now[i].double(), before[i].double(), of_now)])[:, 0]
            found[:, i] = torch.where(sure[:, i], found[:, i], exact)
    return found, [i for i in doubtful if not found[:, i].isfinite().all()]


def _row_norms(
    now: Tensor, before: Tensor, of_now: bool, factor: Tensor | None, scratch: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the norms of pieces of a tensor and of its step, which is rescaled first if a factor is given.

    The pieces are short: 1M equal numbers summed in fp32 are off by 1e-4. Steps go to ``scratch``, (block, ROW).
    """
    sizes, steps = [], []
    for n, b in zip(_rows(now, len(scratch)), _rows(before, len(scratch)), strict=True):
        if factor is not None:
            _interpolate(n, b, factor)
        size, step = _pair(n.to(scratch.dtype), b.to(scratch.dtype), of_now, scratch[: len(n), : n.shape[1]])
        sizes.append(torch.linalg.vector_norm(size, dim=1))
        steps.append(torch.linalg.vector_norm(step, dim=1))
    return torch.cat(sizes), torch.cat(steps)


def _summed_as(tensor: Tensor) -> torch.dtype:
    """Returns the precision in which short pieces of a tensor are summed on a CPU."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _rows(tensor: Tensor, block: int) -> list[Tensor]:
    """Splits a tensor into blocks of at most so many rows of ROW numbers, and the rest: views, if it is contiguous."""
    flat = tensor.reshape(-1)
    whole = len(flat) // ROW * ROW
    blocks = torch.split(flat[:whole].view(-1, ROW), block)
    return [*blocks, flat[whole:][None]] if whole < len(flat) else list(blocks)


def _pair(now: Tensor, before: Tensor, of_now: bool, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns a tensor, as it is now or as it was before the step, and the step."""
    return now if of_now else before, torch.sub(now, before, out=out)


def _squares_of(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Returns the squared norms of pairs of tensors: (2, pairs), in float64."""
    norms = torch._foreach_norm([side for pair in parts for side in pair], dtype=torch.float64)
    return torch.stack(norms).view(-1, 2).mT.square()


def _together(now: list[Tensor], before: list[Tensor]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Yields runs of tensors with at most TOGETHER numbers, or one tensor, whatever their units."""
    start = size = 0
    for i, tensor in enumerate(now):
        if size and size + tensor.numel() > TOGETHER:
            yield now[start:i], before[start:i]
            start, size = i, 0
        size += tensor.numel()
    yield now[start:], before[start:]


def _sums_together(now: Sequence[Tensor], before: Sequence[Tensor], of_now: bool = False) -> Tensor:
    """Returns the sums of each tensor, as in `tensor_sums` or `rescaled_sums`, by few calls; writes the step."""
    device = now[0].device
    before = [_beside(b, n) for b, n in zip(before, now, strict=True)]
    now, before = ([t.to(torch.promote_types(t.dtype, torch.float32)) for t in ts] for ts in (now, before))
    norms = [torch._foreach_norm(side) for side in (now if of_now else before, torch._foreach_sub(before, now))]
    return torch.stack([torch.stack([n.to(device, torch.float32) for n in side]) for side in norms]).square_()


def all_reduce(sums: Sequence[Tensor], shares: tuple[float, ...] | None) -> list[Tensor]:
    """Sums over all processes in one collective call if ``shares`` is given, else returns the inputs."""
    if shares is None:
        return list(sums)
    joined = torch.cat([s.flatten() for s in sums])
    dist.all_reduce(joined)
    parts = torch.split(joined, [s.numel() for s in sums])
    return [part.view_as(s) for part, s in zip(parts, sums, strict=True)]


def as_ratios(squares: Tensor) -> Tensor:
    """Converts globally reduced `step_sums` (2, L) to step ratios (L,)."""
    sizes, moved = squares.sqrt()
    return torch.where(moved == 0, 0.0, moved / sizes)  # an all-zero layer that did not move gives 0, not NaN


def matrix_spreads(ratios: Sequence[float], layers: Sequence[Sequence[Tensor]]) -> list[float]:
    """Returns max / min of the step ratio over each layer's matrices: (L,); NaN with fewer than 2 that have one [ours].

    Args:
        ratios: (T,) step ratios of the layers' tensors; 0 for one without an update.
        layers: The tensors of L layers; those of two or more dimensions are matrices.

    Example:
        >>> layers = [[torch.ones(2, 2), torch.ones(2), torch.ones(2, 2)], [torch.ones(2, 2)]]
        >>> matrix_spreads([0.1, 9.0, 0.4, 0.1], layers)
        [4.0, nan]
    """
    of_tensor = iter(ratios)
    found = [[r for t, r in zip(layer, of_tensor) if t.dim() > 1 and 0 < r < math.inf] for layer in layers]  # noqa: B905
    return [max(known) / min(known) if len(known) > 1 else math.nan for known in found]


def _squares(layers: Sequence[Sequence[Tensor]], shares: tuple[float, ...] | None) -> Tensor:
    """Returns the sum of squares of each layer's tensors, weighted by their shares: (L,)."""
    flat = _flat(layers)
    device = flat[0].device
    dtype = sum_dtype(device)
    squares = torch.stack([n.to(device, dtype) for n in torch._foreach_norm(flat, 2, dtype=dtype)]).square()
    return by_layer(weighted(squares[None], shares), layers)[0]


@torch.no_grad()
def revert(now: Sequence[Sequence[Tensor]], before: Sequence[Sequence[Tensor]], broken: Tensor) -> None:
    """Restores layers with NaN or infinite parameters to ``before``, where ``broken``, (L,) booleans, is set."""
    for layer, copies, flag in zip(now, before, broken.unbind(), strict=True):
        for parameter, copy in zip(layer, copies, strict=True):
            torch.where(flag.to(parameter.device), _beside(copy, parameter), parameter, out=parameter)


@torch.no_grad()
def rescale(now: Sequence[Sequence[Tensor]], before: Sequence[Sequence[Tensor]], scale: Tensor) -> None:
    """Rescales each layer's step: now <- before + scale * (now - before).

    A scale of 1 is bit-exact, and an interrupt leaves either the old or the new weights.

    Args:
        now: The parameters of each of L layers, of any shapes; changed in place.
        before: The values from before the step, in the same shapes.
        scale: (L,) factors.
    """
    for layer, copies, factor in zip(now, before, scale.unbind(), strict=True):
        for parameter, copy in zip(layer, copies, strict=True):
            _interpolate(parameter, copy, factor)


def _interpolate(now: Tensor, before: Tensor, factor: Tensor) -> None:
    """Rescales the step of one tensor in place."""
    factor = factor.to(now.device, torch.promote_types(now.dtype, torch.float32))
    before = _beside(before, now)
    if now.dtype == factor.dtype:
        torch.lerp(before, now, factor, out=now)
    else:  # the factor must not be rounded to half precision
        now.copy_(torch.lerp(before.to(factor.dtype), now.to(factor.dtype), factor))


def _beside(copy: Tensor, parameter: Tensor) -> Tensor:
    """Returns the copy on the device of the parameter."""
    return copy.to(parameter.device, non_blocking=True)


def imposed_ratios(target: Target, ratios: Tensor, step: int) -> Tensor:
    """Returns the step ratio to impose on each of L layers: (L,).

    Args:
        target: ``"mean"`` over the layers with an update [paper: "equalizes"; the mean is ours], ``"median"``,
            ``"min"``, ``"geometric_mean"``; a float, imposed as is; L weights w, giving w_l / mean(w) times the
            mean ratio of the layers with an update; or a callable ``(ratios, step) -> ratios`` [all ours].
        ratios: Measured ratios (L,); 0 for a layer without an update.
        step: Number of steps made before this one.

    Raises:
        ValueError: A callable returned the wrong shape.

    Example:
        >>> imposed_ratios("mean", torch.tensor([0.1, 0.3, 0.0]), 0).tolist()
        [0.20000000298023224, 0.20000000298023224, 0.20000000298023224]
    """
    if callable(target):
        wanted = torch.as_tensor(target(ratios, step), dtype=ratios.dtype, device=ratios.device)
        if wanted.shape != ratios.shape:
            raise ValueError(f"target(ratios, step) returned shape {tuple(wanted.shape)}, not {tuple(ratios.shape)}.")
        return wanted
    if isinstance(target, (int, float)):
        return torch.full_like(ratios, float(target))
    updated = ratios > 0
    count = updated.sum()
    mean = ratios.sum() / count
    if target == "median":
        ordered = torch.where(updated, ratios, torch.inf).sort().values
        middle = torch.stack([(count - 1) // 2, count // 2]).clamp(0, len(ratios) - 1)
        return ordered.index_select(0, middle).mean().expand_as(ratios)
    if target == "min":
        return torch.where(updated, ratios, torch.inf).min().expand_as(ratios)
    if target == "geometric_mean":
        return (torch.where(updated, ratios, 1.0).log().sum() / count).exp().expand_as(ratios)
    if target == "mean":
        return mean.expand_as(ratios)
    weights = torch.tensor(target, dtype=ratios.dtype, device=ratios.device)
    return weights / weights.mean() * mean


def check_target(target: Target, layers: int | None = None) -> None:
    """Validates a target.

    Args:
        target: As accepted by `imposed_ratios`.
        layers: Number of controlled layers, if already known.

    Raises:
        ValueError: An unknown name, a number that is not finite and positive, or a sequence of the wrong length.
    """
    if callable(target):
        return
    if isinstance(target, str):
        if target not in NAMED_TARGETS:
            raise ValueError(
                f"target={target!r} is unknown: use one of {NAMED_TARGETS}, a number, or one number per layer."
            )
        return
    numbers = [float(target)] if isinstance(target, (int, float)) else [float(t) for t in target]
    for number in numbers:
        if not 0 < number < float("inf"):
            raise ValueError(f"target contains {number}: a step ratio must be finite and positive.")
    if not isinstance(target, (int, float)) and layers is not None and len(numbers) != layers:
        raise ValueError(f"target has {len(numbers)} numbers for {layers} controlled layers: give one per layer.")


def sum_dtype(device: torch.device) -> torch.dtype:
    """Returns the dtype in which sums over weights are added up."""
    return torch.float64 if device.type == "cpu" else torch.float32


def _flat(layers: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [t for layer in layers for t in layer]


def _layer_index(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """Returns the index of the layer that each tensor of a flat list belongs to."""
    return on_device(tuple(i for i, count in enumerate(counts) for _ in range(count)), device, torch.int64)


@functools.lru_cache(maxsize=16)
def on_device(numbers: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Returns the numbers as a tensor, cached so that they are copied to a GPU only once."""
    return torch.tensor(numbers, dtype=dtype, device=device)


def parameters_of(optimizer: torch.optim.Optimizer) -> set[Tensor]:
    """Returns the parameters that an optimizer owns now."""
    return {p for group in optimizer.param_groups for p in group["params"]}
