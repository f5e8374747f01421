"""A LightningModule without a forward of its own, and numbers to fit it to."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader


class OneChild(nn.Module):
    """Every row gets the same output, or NaN in one layer."""

    def __init__(self, constant: bool = False, nan: bool = False) -> None:
        super().__init__()
        self.blocks = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
        self.constant, self.nan = constant, nan

    def forward(self, x: Tensor) -> Tensor:
        if self.constant:
            x = x * 0
        return self.blocks(x)


class Regression(pl.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.model(batch) ** 2).mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.model(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def numbers(rows: int = 16) -> Any:
    data = torch.randn(rows, 4, generator=torch.Generator().manual_seed(0))
    return DataLoader(list(data), batch_size=8), DataLoader(list(data), batch_size=8)
