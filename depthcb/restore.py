"""What each layer's change is worth: the loss with single layers put back to their pretrained weights.

A profile shows how far representations moved; this shows what the change does to an objective. Layers are exchanged in
place, one tensor at a time, between the tuned model and the pretrained weights, so that neither is copied.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from depthcb.batches import moved_to
from depthcb.intervals import mean_interval
from depthcb.isolation import generators_of, isolated, seeded
from depthcb.pretrained import PretrainedWeights
from depthcb.stack import LayerStack, clean_name
from depthcb.worth import RestoreProfile

Loss = Callable[[nn.Module, Any], Tensor]
#: Fewest batches that an interval over batches is given for.
FEWEST_BATCHES = 2


def restore_profile(
    pretrained: nn.Module | PretrainedWeights,
    tuned: nn.Module,
    batches: Sequence[Any],
    loss: Loss,
    *,
    layers: str | Sequence[str] | None = None,
) -> RestoreProfile:
    """Measures what the change of each layer is worth to a loss [ours].

    Takes 4 L + 1 passes over the batches, in fp32 and eval mode, without gradients. Both models are as they were
    afterwards, bit for bit, also after an error or Ctrl-C; random states are untouched, and a loss that draws random
    numbers draws the same ones each time. Memory: one tensor.

    Args:
        pretrained: The model before tuning, or its weights.
        tuned: The model after it.
        batches: At least 2; each has the same weight.
        loss: ``(model, batch) -> scalar tensor``, such as ``lambda model, batch: model(**batch).loss``.
        layers: The layers, as accepted by `LayerStack.find`; None searches for them. A tensor that several layers share
            belongs to the first of them.

    Raises:
        ValueError: There are fewer than 2 batches; a layer has no pretrained counterpart of the same tensors;
            parameters are sharded; or a loss is not finite.

    Example:
        >>> before, after = (nn.Sequential(*[nn.Linear(3, 3) for _ in range(3)]) for _ in range(2))
        >>> batches = list(torch.randn(4, 8, 3))
        >>> found = restore_profile(before, after, batches, lambda model, x: model(x).square().mean())
        >>> found.batches, len(found.worth)
        (4, 3)
    """
    if len(batches) < FEWEST_BATCHES:
        raise ValueError(f"restore_profile: {len(batches)} batches: an interval needs at least {FEWEST_BATCHES}.")
    stack = LayerStack.find(tuned, layers)
    with isolated(tuned), _Exchange(stack, _counterparts(pretrained, tuned, stack, layers)) as exchange:
        measure = _Measure(tuned, batches, loss)
        order = range(len(stack))
        base = measure("the tuned model")
        restored = []
        for i in order:
            with exchange.during(i):
                restored.append(measure(f"layer {stack.names[i]!r} restored") - base)
        from_input, from_output, transplanted = [], [], []
        for i in order:
            exchange.layer(i)
            from_input.append(measure(f"the layers up to {stack.names[i]!r} restored") - base)
        bottom = from_input[-1] + base
        for i in order:
            with exchange.during(i):
                transplanted.append(measure(f"layer {stack.names[i]!r} transplanted") - bottom)
        for i in order:  # what is pretrained begins one layer later each time
            from_output.append(
                from_input[-1] if i == 0 else measure(f"the layers from {stack.names[i]!r} restored") - base
            )
            exchange.layer(i)
    return RestoreProfile(
        layer_names=stack.names,
        restored=tuple(map(mean_interval, restored)),
        restored_from_input=tuple(map(mean_interval, from_input)),
        restored_from_output=tuple(map(mean_interval, from_output)),
        transplanted=tuple(map(mean_interval, transplanted)),
        tuned_loss=float(base.mean()),
        pretrained_loss=float(bottom.mean()),
        batches=len(batches),
    )


class _Measure:
    """The losses of all batches, with the same random numbers each time."""

    def __init__(self, model: nn.Module, batches: Sequence[Any], loss: Loss) -> None:
        self.model, self.batches, self.loss = model, batches, loss
        self.generators = generators_of(model)
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def __call__(self, what: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Returns one loss per batch."""
        found = []
        for seed, batch in enumerate(self.batches):
            with seeded(self.generators, seed):
                value = self.loss(self.model, moved_to(batch, self.device))
            found.append(float(value))
            if not math.isfinite(found[-1]):
                raise ValueError(f"restore_profile: the loss of batch {seed} is {found[-1]} with {what}.")
        return np.array(found)


class _Exchange:
    """Exchanges tensors of a model with their pretrained counterparts, and puts all back in the end.

    Args:
        stack: The layers.
        pairs: For each layer, its tensors and their counterparts.
    """

    def __init__(self, stack: LayerStack, pairs: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> None:
        self.stack, self.pairs = stack, pairs
        #: Which tensors are exchanged, and the values of the one that is being exchanged; assigned in one statement, so
        #: that Ctrl-C finds one or the other.
        self.state: tuple[frozenset[tuple[int, int]], tuple[int, int, Tensor] | None] = frozenset(), None

    def __enter__(self) -> _Exchange:
        return self

    def __exit__(self, *_: object) -> None:
        self._settle()
        for layer, index in self.state[0]:
            self._tensor(layer, index)

    def layer(self, layer: int) -> None:
        """Exchanges the tensors of a layer."""
        for index in range(len(self.pairs[layer])):
            self._tensor(layer, index)

    @contextlib.contextmanager
    def during(self, layer: int) -> Iterator[None]:
        """Exchanges the tensors of a layer for the time of the block; after an error, `__exit__` puts them back."""
        self.layer(layer)
        yield
        self.layer(layer)

    def _tensor(self, layer: int, index: int) -> None:
        own, other = self.pairs[layer][index]
        done = self.state[0]
        self.state = done, (layer, index, own.clone())
        self._swap(own, other)
        self.state = done ^ {(layer, index)}, None

    def _swap(self, own: Tensor, other: Tensor) -> None:
        assert self.state[1] is not None
        own.copy_(other)
        other.copy_(self.state[1][2])

    def _settle(self) -> None:
        """Completes or undoes an exchange that was interrupted between two copies."""
        done, interrupted = self.state
        if interrupted is None:
            return
        layer, index, kept = interrupted
        own, other = self.pairs[layer][index]
        if _same_bits(other, kept.to(other.device)):  # the second copy was made
            self.state = done ^ {(layer, index)}, None
        else:
            own.copy_(kept)
            self.state = done, None


def _same_bits(a: Tensor, b: Tensor) -> bool:
    views = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return torch.equal(*views)


def _counterparts(
    pretrained: nn.Module | PretrainedWeights, tuned: nn.Module, stack: LayerStack, layers: Any
) -> list[list[tuple[Tensor, Tensor]]]:
    """Returns, for each layer of the tuned model, its tensors with their pretrained counterparts."""
    own = [_tensors(name, layer) for name, layer in zip(stack.names, stack.modules, strict=True)]
    if isinstance(pretrained, PretrainedWeights):
        known = {clean_name(name): tensor for name, tensor in pretrained.tensors.items()}
        other = [{path: known.get(path) for path in named} for named in own]
    else:
        theirs = LayerStack.find(pretrained, layers)
        if len(theirs) != len(stack):
            raise ValueError(f"The pretrained model has {len(theirs)} layers, the tuned one {len(stack)}.")
        other = []
        for name, layer, named in zip(stack.names, theirs.modules, own, strict=True):
            found = _tensors(name, layer)
            extra = sorted(found.keys() ^ named.keys())
            if extra:
                raise ValueError(
                    f"Layer {name!r}: {extra[0]} is in one of the two models only: merge adapters, and compare models "
                    "of one architecture."
                )
            other.append({path: found[path] for path in named})
    pairs: list[list[tuple[Tensor, Tensor]]] = []
    seen: set[int] = set()
    for named, kept in zip(own, other, strict=True):
        fresh = {path: tensor for path, tensor in named.items() if id(tensor) not in seen}
        seen.update(map(id, fresh.values()))
        pairs.append([(tensor.detach(), _checked(path, tensor, kept[path])) for path, tensor in fresh.items()])
    return pairs


def _tensors(name: str, layer: nn.Module) -> dict[str, Tensor]:
    """Returns the parameters and buffers of a layer by clean name."""
    own = [*layer.named_parameters(), *layer.named_buffers()]
    return {f"{name}.{clean_name(path)}": tensor for path, tensor in own}


def _checked(path: str, tensor: Tensor, other: Tensor | None) -> Tensor:
    """Returns a counterpart that the tensor can be exchanged with."""
    if isinstance(tensor, DTensor):
        raise ValueError(f"{path} is sharded across processes: restore layers in one process, from a full checkpoint.")
    if other is None or other.shape != tensor.shape or other.dtype != tensor.dtype:
        found = "none" if other is None else f"one of shape {tuple(other.shape)} and {other.dtype}"
        raise ValueError(
            f"{path} of shape {tuple(tensor.shape)} and {tensor.dtype} needs a pretrained counterpart and has {found}: "
            "pass the pretrained weights of the same model, merge adapters first, and load both in one dtype."
        )
    return other.detach()
