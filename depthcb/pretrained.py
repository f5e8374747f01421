"""A copy of a model's pretrained weights, for the null and for net changes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from depthcb.stack import LayerStack


@dataclass(frozen=True)
class PretrainedWeights:
    """The parameters and buffers of a model before training; of a sharded model, this process's part.

    Args:
        tensors: Copies by name.

    Example:
        >>> model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)])
        >>> weights = PretrainedWeights.of(model)
        >>> weights.net_change(model, LayerStack.find(model))
        [0.0, 0.0, 0.0]
    """

    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module, copy: bool = True) -> Self:
        """Takes the current weights of a model to the CPU.

        Args:
            model: The model at its pretrained weights.
            copy: Whether to copy them (memory: all parameters and buffers once, on the CPU); False is for a model that
                is never trained.
        """
        reshard(model)
        local = {name: _local(tensor) for name, tensor in _tensors(model)}
        return cls({name: tensor.to("cpu", copy=True) if copy else tensor for name, tensor in local.items()})

    def before(self, name: str, tensor: Tensor) -> Tensor:
        """Returns the pretrained values of one of the model's tensors, with its device, dtype and sharding.

        Raises:
            ValueError: They were not taken.
        """
        kept = self.tensors.get(name)
        if kept is None or kept.shape != _local(tensor).shape:
            raise ValueError(
                f"{name} of the model has no pretrained weights of its shape: take them from the same model, before "
                "it is trained."
            )
        kept = kept.to(tensor.device, tensor.dtype)
        if not isinstance(tensor, DTensor):
            return kept
        return DTensor.from_local(
            kept, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
        )

    @contextlib.contextmanager
    def restored_in(self, model: nn.Module) -> Iterator[None]:
        """Puts the pretrained weights into a model; on exit the model has its own again. Memory: one more copy."""
        reshard(model)
        tensors = _tensors(model)
        own = [(tensor, tensor.detach().clone()) for _, tensor in tensors]
        with torch.no_grad():
            try:
                for name, tensor in tensors:
                    tensor.copy_(self.before(name, tensor))
                yield
            finally:
                for tensor, values in own:
                    tensor.copy_(values)

    @torch.no_grad()
    def net_change(self, model: nn.Module, stack: LayerStack) -> list[float]:
        """Returns the norm of each layer's change since pretraining, divided by its norm then [ours].

        Args:
            model: The model.
            stack: Its layers.
        """
        reshard(model)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        found = []
        for layer in stack.parameters():
            before = [self.before(names[id(p)], p) for p in layer]
            moved = sum(norm(p.detach() - b) ** 2 for p, b in zip(layer, before, strict=True))
            found.append((moved / sum(norm(b) ** 2 for b in before)) ** 0.5)
        return found


def reshard(model: nn.Module) -> None:
    """Releases the whole parameters that FSDP2 gathered for a forward, so that the model shows its shards again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def norm(tensor: Tensor) -> float:
    """Returns the norm in float64, over all processes of a sharded tensor."""
    found = torch.linalg.vector_norm(tensor.double())
    return float(found.full_tensor() if isinstance(found, DTensor) else found)


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _local(tensor: Tensor) -> Tensor:
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    return tensor.detach()
