"""A forward that is a functools.partial has no qualified name, and finding the module to feed failed on it."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from depthcb import LayerStack
from depthcb.probe import Probe


def scaled(model: nn.Module, x: Tensor, by: float) -> Tensor:
    out: Tensor = nn.Sequential.forward(model, x * by)  # type: ignore[arg-type]
    return out


def test_it_is_called_as_it_is() -> None:
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), torch.randn(4, 3)
    model.forward = partial(scaled, model, by=2.0)  # type: ignore[method-assign]
    first, _ = Probe((x,)).record(model, LayerStack.find(model)).rows
    with torch.no_grad():
        torch.testing.assert_close(first, model[0](2 * x))
