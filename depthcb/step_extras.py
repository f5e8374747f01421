"""What a step is made of, beside its ratio: the gradient, weight decay, rounding, and how far the weights got.

The sums are computed in pieces of at most 2^20 numbers, in float64 on a CPU, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from depthcb.step_ratio import local, sum_dtype

Extra = Literal["grad_norm", "cos_gradient", "cos_weight", "unchanged", "net_change"]
EXTRAS: tuple[Extra, ...] = get_args(Extra)
#: Those that read the gradient.
OF_GRADIENT = ("grad_norm", "cos_gradient")
PIECE = 2**20


def check_extras(extras: Sequence[str]) -> None:
    """Raises an error for an unknown extra.

    Raises:
        ValueError: Names it.
    """
    unknown = [extra for extra in extras if extra not in EXTRAS]
    if isinstance(extras, str) or unknown:
        raise ValueError(f"extras={extras!r} is unknown: use a list of {', '.join(EXTRAS)}.")


def gradient(parameter: Tensor) -> Tensor | None:
    """Returns a parameter's gradient, or this process's shard of it."""
    found = parameter.grad
    if isinstance(found, DTensor) and isinstance(parameter, DTensor) and found.placements != parameter.placements:
        found = found.redistribute(placements=parameter.placements)
    return None if found is None else local(found)


@torch.no_grad()
def extra_sums(
    now: Iterable[Tensor], before: Iterable[Tensor], gradients: Iterable[Tensor | None], start: Iterable[Tensor | None]
) -> Tensor:
    """Computes this process's part of the sums behind the extras, for each of T tensors.

    Args:
        now: The tensors, or this process's shards of them.
        before: Their values from before the step; on any device.
        gradients: Their gradients; None counts as 0.
        start: Their values at the start of training; None if they are not needed.

    Returns:
        (9, T) sums; W is ``before`` and D is ``now - before``: ||W||^2, ||D||^2, ||g||^2, <D, g>, <D, W>, the number of
        values that did not change, the number of all, ||now - start||^2 and ||start||^2.
    """
    columns = [_of_tensor(*tensors) for tensors in zip(now, before, gradients, start, strict=True)]
    return torch.stack([column.to(columns[0].device) for column in columns], dim=1)


def _of_tensor(now: Tensor, before: Tensor, slope: Tensor | None, start: Tensor | None) -> Tensor:
    dtype, device = sum_dtype(now.device), now.device
    sums = torch.zeros(9, dtype=dtype, device=device)
    for n, b, g, s in zip(*(_pieces(t, now.numel(), device, dtype) for t in (now, before, slope, start)), strict=True):
        assert n is not None
        assert b is not None
        step = n - b
        zero = sums.new_zeros(())
        sums += torch.stack(
            [
                b @ b,
                step @ step,
                zero if g is None else g @ g,
                zero if g is None else step @ g,
                step @ b,
                (step == 0).sum(),
                torch.full_like(zero, n.numel()),
                zero if s is None else (n - s) @ (n - s),
                zero if s is None else s @ s,
            ]
        )
    return sums


def _pieces(tensor: Tensor | None, size: int, device: torch.device, dtype: torch.dtype) -> Iterator[Tensor | None]:
    flat = None if tensor is None else tensor.reshape(-1)
    for at in range(0, size, PIECE):
        yield None if flat is None else flat[at : at + PIECE].to(device, dtype)


def extra_values(extra: Extra, sums: Tensor) -> list[float]:
    """Returns an extra of L units; NaN where it is undefined (no gradient, or no step) [ours].

    Args:
        extra: ``"grad_norm"``: ||g||. ``"cos_gradient"``: <D, -g> / (||D|| ||g||). ``"cos_weight"``:
            <D, -W> / (||D|| ||W||). ``"unchanged"``: share of the values that did not change. ``"net_change"``:
            ||now - start|| / ||start||.
        sums: (9, L) globally reduced sums of `extra_sums`.

    Example:
        >>> now, before, slope = torch.tensor([0.9, 2.0]), torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
        >>> sums = extra_sums([now], [before], [slope], [None])
        >>> [round(extra_values(extra, sums)[0], 6) for extra in ("grad_norm", "cos_gradient", "unchanged")]
        [5.0, 0.6, 0.5]
    """
    weight, step, slope, step_slope, step_weight, same, count, net, start = sums
    found = {
        "grad_norm": torch.where(slope > 0, slope.sqrt(), torch.nan),
        "cos_gradient": -step_slope / (step * slope).sqrt(),
        "cos_weight": -step_weight / (step * weight).sqrt(),
        "unchanged": same / count,
        "net_change": (net / start).sqrt(),
    }
    values: list[float] = found[extra].tolist()
    return values
