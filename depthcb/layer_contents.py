"""What the layers of a stack consist of: what a record needs so that layers can be chosen within a budget later."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from depthcb.stack import LayerStack, clean_name


def layer_contents(stack: LayerStack) -> dict[str, Any]:
    """Returns the number of parameters of each layer, and the names of their linear modules.

    Args:
        stack: The layers.

    Returns:
        ``parameters``, one number per layer, with a tied tensor in its first layer; and ``linear``, the names of linear
        modules inside the layers, such as ``attention.self.query``, which is what peft calls ``target_modules``.

    Example:
        >>> layers = [nn.TransformerEncoderLayer(4, 2, 8) for _ in range(2)]
        >>> layer_contents(LayerStack.find(nn.Sequential(*layers)))
        {'parameters': [172, 172], 'linear': ['self_attn.out_proj', 'linear1', 'linear2']}
    """
    return {
        "parameters": [sum(p.numel() for p in layer) for layer in stack.parameters()],
        "linear": list(dict.fromkeys(name for layer in stack.modules for name in _linear(layer))),
    }


def _linear(layer: nn.Module) -> Iterator[str]:
    """Yields the names of a layer's linear modules; of one with adapters, the name of the whole."""
    modules = {clean_name(name): module for name, module in layer.named_modules()}
    adapted = [name for name, module in modules.items() if hasattr(module, "base_layer")]
    for name, module in modules.items():
        # GPT-2's linear module is transformers' Conv1D, which is not imported here.
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            yield next((outer for outer in adapted if name.startswith(f"{outer}.")), name)
