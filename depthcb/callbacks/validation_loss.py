"""The loss that a module's ``validation_step`` returns, as a function of the module and a batch."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn


def validation_loss(transfer: Callable[[Any], Any]) -> Callable[[nn.Module, Any], Tensor]:
    """Returns a loss for `depthcb.restore_profile`.

    Args:
        transfer: ``batch -> batch``: what happens to a batch on the way to the module.
    """

    def loss(module: Any, batch: Any) -> Tensor:
        step = module.validation_step
        moved = transfer(copy.deepcopy(batch))  # the step may work in place
        more = len(inspect.signature(step).parameters) - 1  # batch_idx, dataloader_idx
        returned = step(moved, *([0] * more))
        value = returned.get("loss") if isinstance(returned, Mapping) else returned
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise ValueError(
                f"DepthProfile(worth=True): {type(module).__name__}.validation_step returns "
                f"{type(returned).__name__}, not a loss: return the loss from it, or call depthcb.restore_profile with "
                "one after the fit."
            )
        return value.reshape(())

    return loss
