"""A task in which two layers alone can lower the validation loss, although the others get gradients as large."""

from __future__ import annotations

import copy
import dataclasses
import io
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from studies import FIGURES
from support import fit
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from depthcb import DepthProfile, UpdateRatioMonitor
from depthcb.advice import LAST, propose
from depthcb.run import StepRatios, read_runs
from depthcb_recipes.advice.arms import arms
from depthcb_recipes.advice.printed import print_trained
from depthcb_recipes.advice.trained import trained_table
from depthcb_recipes.studies.grid import RunConfig
from depthcb_recipes.studies.result import FINISHED, Result, write_result
from depthcb_recipes.studies.store import Store

LAYERS, WIDTH, BATCH, SEEDS = 6, 16, 8, 4
TEACHABLE = (2, 3)


class Block(nn.Module):
    """Reads the input part of the stream, and adds to a part of its own."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.part = slice((index + 1) * WIDTH, (index + 2) * WIDTH)
        self.write = nn.Linear(WIDTH, WIDTH, bias=False)
        nn.init.normal_(self.write.weight, std=0.01)  # unlearning it gains nothing

    def forward(self, stream: Tensor) -> Tensor:
        written = stream.clone()
        written[:, self.part] += self.write(stream[:, :WIDTH])
        return written


class Planted(pl.LightningModule):
    """Each layer is to predict a target of its own; those of the layers 2 and 3 depend on the input, others are noise."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*[Block(i) for i in range(LAYERS)])

    def forward(self, x: Tensor) -> Tensor:
        stream: Tensor = self.blocks(torch.cat([x, x.new_zeros(len(x), LAYERS * WIDTH)], dim=1))
        return stream

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self(batch[0])[:, WIDTH:], batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.training_step(batch, batch_idx)
        self.log("val/loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def examples(count: int, seed: int) -> TensorDataset:
    rng, teacher = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(99)
    x = torch.randn(count, WIDTH, generator=rng)
    targets = 1.5 * torch.randn(count, LAYERS, WIDTH, generator=rng)
    for layer in TEACHABLE:
        targets[:, layer] = x @ torch.randn(WIDTH, WIDTH, generator=teacher) / WIDTH**0.5
    return TensorDataset(x, targets.flatten(1))


def data(seed: int = 0) -> tuple[DataLoader[Any], DataLoader[Any]]:
    order = torch.Generator().manual_seed(seed)
    return (
        DataLoader(examples(64, 0), BATCH, shuffle=True, generator=order),
        DataLoader(examples(256, 1), 32),
    )


def pretrained() -> Planted:
    torch.manual_seed(0)
    return Planted()


def trained_loss(layers: tuple[int, ...], seed: int) -> float:
    """The validation loss of the layers trained alone, by a loop of its own."""
    module, (train, val) = pretrained(), data(seed)
    for i, block in enumerate(module.blocks):
        block.requires_grad_(i in layers)
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1.0)
    for _ in range(5):
        for batch in train:
            optimizer.zero_grad()
            module.training_step(batch, 0).backward()
            optimizer.step()
    with torch.no_grad():
        return float(np.mean([module.training_step(batch, 0).item() for batch in val]))


@pytest.mark.filterwarnings("ignore:.*plain CKA sees fewer.*")
def test_worth_finds_the_layers_that_can_learn_and_the_report_says_that_the_last_do_not(tmp_path: Path) -> None:
    monitor, watch = UpdateRatioMonitor(extras=["grad_norm"]), DepthProfile(pretrained="cpu", worth=True, null_draws=1)
    module, before = pretrained(), copy.deepcopy(pretrained())
    fit(module, [monitor, watch], data(), max_steps=-1, max_epochs=5, logger=CSVLogger(tmp_path / "run"))
    assert all(not torch.equal(p, q) for p, q in zip(module.parameters(), before.parameters(), strict=True))
    (run,) = read_runs(tmp_path / "run")
    norms = np.array(StepRatios.read(run.records["update_ratio"], "update_ratio/grad_norm/").ratios).mean(axis=0)
    others = [i for i in range(LAYERS) if i not in TEACHABLE]
    assert norms[others].min() > norms[list(TEACHABLE)].max(), (
        "gradients are no smaller where there is nothing to learn"
    )

    proposals = propose(run, 1 / 3, range(SEEDS * 3))
    sets = {p.rule.name: p.sets for p in proposals}
    assert sets["worth"] == (TEACHABLE,)
    assert sets[LAST] == ((4, 5),)
    assert sets["gradient norm"] != (TEACHABLE,)
    base = RunConfig("planted", "causal_lm", "sgd", "standard", 0, options={"model.lr": 1.0})
    planned, store = arms(base, proposals, LAYERS, ["full"], SEEDS, 3, rank=8), Store(tmp_path / "trained")
    for arm in planned:
        figures = dataclasses.replace(FIGURES, loss=trained_loss(arm.layers, arm.config.seed))
        write_result(store.prepare(arm.config), Result(FINISHED, arm.config, figures))

    table = trained_table(proposals, planned, store)
    assert table.rows[0].sets == (TEACHABLE,)
    found = [name for name, own in sets.items() if own == (TEACHABLE,)]
    assert "worth" in found
    assert table.conclusion.winners == found
    console = Console(width=200, file=io.StringIO(), record=True)
    print_trained([table], console)
    told = f"{', '.join(found)}: lower validation loss than random and than last k, 4 seeds."
    assert told in console.export_text()
