"""The probe stored the tensor a block returned or received, which in-place blocks then overwrote."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from depthcb import LayerStack
from depthcb.probe import Probe


class InPlace(nn.Module):
    """Blocks that return their input tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Adds() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Adds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x += self.linear(x)
        return x


def test_each_layer_is_seen_as_it_was_when_it_returned() -> None:
    model, x = InPlace(), torch.randn(4, 3)
    probe = Probe((x.clone(),))
    stack = LayerStack.find(model)
    for _ in range(2):  # the second time from the same inputs
        rows, y = probe.record(model, stack).rows, x.clone()
        with torch.no_grad():
            for block, seen in zip(model.blocks, rows, strict=True):
                torch.testing.assert_close(seen, block(y))
    assert torch.equal(probe.batches[0], x)
