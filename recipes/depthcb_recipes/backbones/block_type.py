"""Detects by a forward pass whether the blocks of a network are sequential or parallel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from depthcb import LayerStack
from depthcb.isolation import isolated
from depthcb_recipes.backbones.architectures import BlockType


def block_type(model: nn.Module) -> BlockType:
    """Detects the type of a network's first block [paper's distinction, our test].

    The output of the sublayer that runs first (attention or time mixing) is perturbed. In a *sequential* block, this
    changes the input of the next sublayer (the MLP); in a *parallel* block, it does not. A block with only one sublayer
    (Mamba) is *single*.

    Args:
        model: A model that takes token ids. It is run twice on 4 tokens and not modified.

    Raises:
        ValueError: If the first block does not run on token ids.

    Example:
        >>> from transformers import GPTNeoXConfig, GPTNeoXModel
        >>> sizes = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 32}
        >>> block_type(GPTNeoXModel(GPTNeoXConfig(**sizes, intermediate_size=32, use_parallel_residual=True)))
        'parallel'
    """
    block = LayerStack.find(model).modules[0]
    parts = [m for m in block.children() if any(p.dim() > 1 for p in m.parameters())]
    ran: list[tuple[nn.Module, Tensor]] = []
    perturbed: list[nn.Module] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        ran.append((module, value.detach().clone()))

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        if module not in perturbed:
            return output
        if isinstance(output, Tensor):
            return output + 1
        return (output[0] + 1, *output[1:])

    handles = [m.register_forward_pre_hook(before, with_kwargs=True) for m in parts]
    handles += [m.register_forward_hook(after) for m in parts]
    weight = next(model.parameters())
    ids = torch.arange(1, 5, device=weight.device)[None]
    try:
        with isolated(model):
            model(input_ids=ids)
            first = list(ran)
            if not first:
                raise ValueError(f"The first block of {type(model).__name__} does not run on token ids.")
            if len(first) == 1:
                return "single"
            ran.clear()
            perturbed.append(first[0][0])
            model(input_ids=ids)
    finally:
        for handle in handles:
            handle.remove()
    return "parallel" if torch.equal(first[1][1], ran[1][1]) else "sequential"
