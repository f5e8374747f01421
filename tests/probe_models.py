"""Small models with known activations, and short ways to record them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from depthcb import LayerStack
from depthcb.probe import Probe, Recording

WIDTH = 6


class Mixer(nn.Module):
    """A block over (B, T, d) that mixes positions: all of them, or only earlier ones."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal, self.mix = causal, nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        weights = mask[:, None, :].to(x.dtype) * (torch.ones(x.shape[1], x.shape[1]).tril() if self.causal else 1)
        return x + self.mix(weights @ x / weights.sum(dim=-1, keepdim=True).clamp(min=1))


class Reader(nn.Module):
    """A small language model with known activations."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, WIDTH)
        self.blocks = nn.ModuleList(Mixer(causal) for _ in range(3))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x, mask)
        return x


def record(model: nn.Module, *batches: Any, **options: Any) -> Recording:
    return Probe(tuple(batches), **options).record(model, LayerStack.find(model))


def ids(rows: int = 5, length: int = 7, seed: int = 0) -> Tensor:
    return torch.randint(1, 20, (rows, length), generator=torch.Generator().manual_seed(seed))


class TakesXY(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)
