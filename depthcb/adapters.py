"""Adapters (LoRA and its variants): a layer's effective weight is W0 merged with its adapters.

Adapter modules are detected by the methods that every ``peft`` layer has, so ``peft`` itself is not required.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from depthcb.stack import half_dtypes


def adapted_modules(layer: nn.Module) -> list[Any]:
    """Returns the modules of a layer that hold a base weight and its adapters."""
    return [m for m in layer.modules() if hasattr(m, "get_base_layer") and hasattr(m, "merge")]


@torch.no_grad()
def effective_weights(module: Any) -> list[Tensor]:
    """Returns a module's weights with its active adapters merged, W0 + BA for LoRA: new tensors, at least fp32 [ours].

    Calls the adapters' own ``merge`` on a copy, so DoRA, LoHa and OFT work too. Biases are included only if trainable.

    Raises:
        ValueError: The weights are quantised, or the adapters can't be merged.
    """
    kind, copied = type(module).__name__, copy.deepcopy(module)
    parameters = list(copied.get_base_layer().parameters())
    if not parameters or not all(p.is_floating_point() for p in parameters):
        raise ValueError(
            f"The base weight of {kind} is quantised, so its step ratio is undefined: load the model unquantised or "
            "remove the monitor."
        )
    if len(adapted_modules(module)) > 1:
        raise ValueError(
            f"{kind} wraps another adapter layer: the step ratio is supported for one kind of adapter per module."
        )
    if half_dtypes(parameters):
        copied.float()  # the forward adds W0 x and BA x, but merging in half precision would round a small BA away
    if not (module.merged or module.disable_adapters):
        try:
            copied.merge()
        except NotImplementedError as error:
            raise ValueError(
                f"The adapters of {kind} can't be merged into its weight, so its step ratio is undefined: remove the "
                f"monitor ({error or 'not supported by peft'})."
            ) from error
    return [p.detach() for p in copied.get_base_layer().parameters() if p.dim() > 1 or p.requires_grad]
