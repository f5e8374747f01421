"""Adapters (LoRA and its variants): a layer multiplies by the weight that they make of W0, not by their own tensors.

Modules are known by the methods that every adapter layer of ``peft`` has, so that the package itself is not needed.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from depthcb.stack import half_dtypes


def adapted_modules(layer: nn.Module) -> list[Any]:
    """The modules of a layer that hold a weight and adapters of it."""
    return [m for m in layer.modules() if hasattr(m, "get_base_layer") and hasattr(m, "merge")]


@torch.no_grad()
def effective_weights(module: Any) -> list[Tensor]:
    """What a module's active adapters make of its weights, W0 + BA with LoRA: new tensors, in fp32 at least [ours].

    The adapters' own ``merge``, applied to a copy, says what that is; so it holds for DoRA, LoHa or OFT too. A bias
    counts only where it trains.

    Raises:
        ValueError: The weights are quantised, or the adapters can't be merged.
    """
    kind, copied = type(module).__name__, copy.deepcopy(module)
    parameters = list(copied.get_base_layer().parameters())
    if not parameters or not all(p.is_floating_point() for p in parameters):
        raise ValueError(
            f"The weight under {kind} is quantised, so that its step ratio is not defined: load the model unquantised, "
            "or drop the monitor."
        )
    if len(adapted_modules(module)) > 1:
        raise ValueError(
            f"{kind} lies over other adapters: the step ratio is supported for one kind of adapter a module."
        )
    if half_dtypes(parameters):
        copied.float()  # W0 x and BA x are added as outputs, so a merge in half precision would lose small BA
    if not (module.merged or module.disable_adapters):
        try:
            copied.merge()
        except NotImplementedError as error:
            raise ValueError(
                f"The adapters of {kind} can't be merged into its weight, so that there is no step ratio: drop the "
                f"monitor ({error or 'not supported by peft'})."
            ) from error
    return [p.detach() for p in copied.get_base_layer().parameters() if p.dim() > 1 or p.requires_grad]
