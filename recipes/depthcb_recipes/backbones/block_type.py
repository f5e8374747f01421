"""Whether a network's blocks are sequential or parallel, found by trying."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from depthcb import LayerStack
from depthcb.isolation import isolated

BlockType = Literal["sequential", "parallel", "single"]


def block_type(model: nn.Module) -> BlockType:
    """How the parts of a network's first block are wired [paper's distinction, our test].

    The output of the part that runs first (attention, or the mixing over time) is changed: in a *sequential* block the
    part that runs next (the MLP) then reads something else, in a *parallel* one it reads the same residual stream as
    before. A block with one part alone (Mamba) is *single*.

    Args:
        model: Reads token ids; left as it was. Its block runs twice on 4 tokens.

    Raises:
        ValueError: The first block is never reached by token ids.

    Example:
        >>> from transformers import GPTNeoXConfig, GPTNeoXModel
        >>> sizes = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 32}
        >>> block_type(GPTNeoXModel(GPTNeoXConfig(**sizes, intermediate_size=32, use_parallel_residual=True)))
        'parallel'
    """
    block = LayerStack.find(model).modules[0]
    parts = [m for m in block.children() if any(p.dim() > 1 for p in m.parameters())]
    ran: list[tuple[nn.Module, Tensor]] = []
    change: list[nn.Module] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        ran.append((module, given.detach().clone()))

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        if module not in change:
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
                raise ValueError(f"Token ids never reach the first block of {type(model).__name__}.")
            if len(first) == 1:
                return "single"
            ran.clear()
            change.append(first[0][0])
            model(input_ids=ids)
    finally:
        for handle in handles:
            handle.remove()
    return "parallel" if torch.equal(first[1][1], ran[1][1]) else "sequential"
