"""A forward that draws random numbers in eval mode too draws the same ones in every recording."""

from __future__ import annotations

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import transformers as hf
from support import fit
from torch import Tensor, nn
from torch.utils.data import DataLoader

from depthcb import DepthProfile, depth_profile
from depthcb.probe import Probe
from depthcb.reference import Reference
from depthcb.similarity import find_measures
from depthcb.stack import LayerStack


class Drawing(nn.Module):
    """Adds noise from one source to its input, whether training or not."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source, self.blocks = source, nn.Sequential(*[nn.Linear(6, 6) for _ in range(3)])
        self.own = torch.Generator().manual_seed(3)
        self.others = {
            "numpy": [np.random.default_rng(3)],
            "legacy": np.random.RandomState(3),
            "python": random.Random(3),
        }

    def noise(self, x: Tensor) -> Tensor:
        if self.source == "none":
            return torch.zeros_like(x)
        if self.source == "global":
            return torch.randn_like(x) + random.random() + float(np.random.rand())
        if self.source == "dropout":
            return nn.functional.dropout(x, 0.5, training=True)
        if self.source == "own":
            return torch.randn(x.shape, generator=self.own)
        generator: Any = self.others[self.source]
        draws = {
            "numpy": lambda: generator[0].normal(),
            "legacy": lambda: generator.randn(),
            "python": lambda: generator.random(),
        }
        return torch.full_like(x, draws[self.source]())

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x + self.noise(x))


@pytest.mark.parametrize("source", ["global", "dropout", "own", "numpy", "legacy", "python"])
def test_unchanged_weights_give_exactly_no_change(source: str) -> None:
    model, probe = Drawing(source), torch.randn(32, 6)
    states = [model.own.get_state(), model.others["numpy"][0].bit_generator.state, model.others["python"].getstate()]
    assert depth_profile(model, model, [probe[:20], probe[20:]])["cka"].change == (0.0, 0.0, 0.0)
    assert torch.equal(states[0], model.own.get_state())
    assert states[1:] == [model.others["numpy"][0].bit_generator.state, model.others["python"].getstate()]


def test_the_floor_of_a_forward_that_draws_is_not_measured() -> None:
    """It draws other numbers in float64, so the difference is no rounding error."""
    for source, measured in (("global", False), ("own", False), ("none", True)):
        model = Drawing(source)
        reference = Reference.record(
            Probe((torch.randn(32, 6),)), model, LayerStack.find(model), find_measures(["cka"])
        )
        assert bool(reference.floor) == measured


class Masked(pl.LightningModule):
    """ViTMAE masks random patches in every forward."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
        config = hf.ViTMAEConfig(
            **sizes, image_size=16, patch_size=4, decoder_hidden_size=8, decoder_num_hidden_layers=1,
            decoder_num_attention_heads=2, decoder_intermediate_size=16,
        )  # fmt: skip
        self.model = hf.ViTMAEForPreTraining(config)

    def forward(self, pixel_values: Tensor) -> Any:
        return self.model(pixel_values)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self(batch["pixel_values"]).loss
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val/loss", self(batch["pixel_values"]).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.0)


def test_random_patch_masks_are_no_change() -> None:
    images: Any = [{"pixel_values": torch.randn(3, 16, 16)} for _ in range(32)]
    loader: Any = DataLoader(images, 8)
    watch = DepthProfile()
    fit(Masked(), [watch], (loader, loader))
    assert watch.profiles
    assert all(set(profile.change) == {0.0} for profile in watch.profiles)
