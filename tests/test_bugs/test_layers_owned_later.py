"""EqualStep refused layers that no optimizer owned when the fit started, as Lightning's own finetuning leaves them."""

from __future__ import annotations

import warnings
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning
from support import Edges, Rows, fit
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from depthcb import EqualStep


class Lit(pl.LightningModule):
    """A backbone and a head; the optimizer gets what is trainable, or the head alone."""

    def __init__(self, head_only: bool = False) -> None:
        super().__init__()
        self.backbone = nn.Sequential(*[nn.Linear(8, 8) for _ in range(4)])
        self.head = nn.Linear(8, 1)
        self.head_only = head_only

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = (self.head(self.backbone(batch[0])) - 1).square().mean()
        return loss

    def configure_optimizers(self) -> Any:
        trained = self.head if self.head_only else self
        return torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=0.1)


class Adds(pl.Callback):
    """Gives layers to the optimizer before the second epoch."""

    def __init__(self, layers: slice) -> None:
        self.layers = layers

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            trainer.optimizers[0].add_param_group({"params": list(pl_module.backbone[self.layers].parameters())})


def layers(module: pl.LightningModule) -> list[np.ndarray]:
    net: Any = module.backbone
    return [np.concatenate([p.detach().double().numpy().ravel() for p in layer.parameters()]) for layer in net]


def run(module: pl.LightningModule, *callbacks: pl.Callback, epochs: int = 3, **options: Any) -> np.ndarray:
    """Returns the (batches, 4) step ratios in float64; 4 batches an epoch."""
    data = DataLoader(TensorDataset(torch.randn(32, 8, generator=torch.Generator().manual_seed(0))), batch_size=8)
    edges = Edges(layers)
    fit(module, [*callbacks, edges], (data, None), **{"max_steps": -1, "max_epochs": epochs} | options)
    return edges.ratios()


def assert_equal(ratios: np.ndarray) -> None:
    assert ratios.min() > 0
    assert ratios.max(axis=1) == pytest.approx(ratios.min(axis=1), rel=1e-3)


@pytest.mark.filterwarnings("ignore:.*doesn't have any trainable params.*")
def test_lightnings_own_finetuning_is_waited_for() -> None:
    torch.manual_seed(0)
    rows, control = Rows(), EqualStep("backbone")
    ratios = run(
        Lit(), BackboneFinetuning(unfreeze_backbone_at_epoch=2, lambda_func=lambda e: 1.0), control, logger=rows
    )
    assert not ratios[:8].any()
    assert_equal(ratios[8:])
    assert {row["step"] for row in rows.rows if "equal_step/target" in row} == {8, 9, 10, 11}


def test_a_group_added_by_hand_is_waited_for() -> None:
    torch.manual_seed(0)
    with pytest.warns(
        UserWarning, match=r"no optimizer owns a parameter of the layers backbone\.0.*: they are controlled"
    ):
        ratios = run(Lit(head_only=True), EqualStep("backbone"), Adds(slice(0, 4)))
    assert not ratios[:4].any()
    assert_equal(ratios[4:])


def test_layers_that_are_never_owned_are_said_at_the_end() -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        ratios = run(Lit(head_only=True), EqualStep("backbone"), Adds(slice(0, 2)))
    assert_equal(ratios[4:, :2])
    (told,) = [str(w.message) for w in found if "was not controlled" in str(w.message)]
    assert "layer backbone.2, backbone.3 was not controlled, because no optimizer ever owned its parameters" in told
    torch.manual_seed(0)  # both remedies
    run(Lit(), EqualStep("backbone"))
    with pytest.warns(UserWarning, match="they are controlled once one does"):
        run(Lit(head_only=True), EqualStep(["backbone.0", "backbone.1"]), Adds(slice(0, 2)))


def test_finetuning_that_never_comes_is_said() -> None:
    with pytest.warns(UserWarning, match=r"layer backbone\.0, .* was not controlled"):
        run(Lit(), BackboneFinetuning(unfreeze_backbone_at_epoch=9), EqualStep("backbone"), epochs=1)


class Unfreezes(pl.Callback):
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pl_module.backbone.requires_grad_(trainer.current_epoch > 0)


def frozen(**options: Any) -> Lit:
    torch.manual_seed(0)
    module = Lit(**options)
    module.backbone.requires_grad_(False)
    return module


def test_layers_without_a_chance_are_refused_and_the_remedies_work() -> None:
    with pytest.raises(ValueError, match=r"backbone\.3, and all of them are frozen: pass layers=.*BackboneFinetuning"):
        run(frozen(), EqualStep("backbone"))

    class Given(Lit):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    torch.manual_seed(0)
    module = Given()
    module.backbone.requires_grad_(False)
    ratios = run(module, EqualStep("backbone"), Unfreezes())  # given to the optimizer while frozen
    assert not ratios[:4].any()
    assert_equal(ratios[4:])
    torch.manual_seed(0)
    module = Given()
    module.backbone[2:].requires_grad_(False)
    run(module, EqualStep(["backbone.0", "backbone.1"]))  # other layers named
