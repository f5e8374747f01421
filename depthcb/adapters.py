"""Low-rank adapters (LoRA): what the layer really multiplies with is W0 + BA, not the adapter's own tensors.

Modules are known by the two methods that every adapter layer of ``peft`` has, so that the package itself is not needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def adapted_modules(layer: nn.Module) -> list[Any]:
    """The modules of a layer that add a low-rank product to a weight."""
    return [m for m in layer.modules() if hasattr(m, "get_delta_weight") and hasattr(m, "get_base_layer")]


@torch.no_grad()
def effective_weight(module: Any) -> Tensor:
    """W0 + BA of all active adapters: a new tensor in the shape of W0.

    Raises:
        ValueError: W0 is stored in another form than its update (quantised).
    """
    weight: Tensor = module.get_base_layer().weight.detach().clone()
    for name in () if module.merged else module.active_adapters:
        if name not in module.lora_A and name not in getattr(module, "lora_embedding_A", {}):
            continue
        delta = module.get_delta_weight(name)
        if delta.shape != weight.shape:
            raise ValueError(
                f"The weight under an adapter has shape {tuple(weight.shape)}, its update {tuple(delta.shape)}: the "
                "step ratio of a quantised weight is not supported; load the model unquantised, or drop the monitor."
            )
        weight += delta
    return weight
