"""An objective whose second backward is a single call of at least 20 seconds; it marks when the call has started."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from depthcb_recipes import CausalLM

SECONDS = 20.0
SIZE = 1200


class LongBackward(CausalLM):
    """`CausalLM` with a chain of matrix products added to its loss."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss + chain() if batch_idx == 1 else loss

    def on_before_backward(self, loss: Tensor) -> None:
        if self.global_step == 1:
            Path(os.environ["MARK"]).write_text("begun")

    def on_after_backward(self) -> None:
        if self.global_step == 1:
            Path(os.environ["MARK"]).write_text("ended")


def chain() -> Any:
    """Returns a scalar whose backward takes long: twice the matrix products of its forward."""
    matrix = torch.eye(SIZE, requires_grad=True)
    product = matrix @ matrix
    start = time.perf_counter()
    product = product @ matrix
    count = int(SECONDS / 2 / (time.perf_counter() - start)) + 1
    for _ in range(2 * count):  # estimated from a single product, which may have been slow
        product = product @ matrix
        if time.perf_counter() - start > SECONDS / 2:
            break
    return product.sum()
