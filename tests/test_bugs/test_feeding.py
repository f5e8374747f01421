"""The probe reaches the layers as the user's validation batches do."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from support import fit
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from depthcb import DepthProfile, LayerStack, depth_profile
from depthcb.feeding import feed
from depthcb.probe import Probe

NORMALIZED = ("cka_normalized",)


class Images(pl.LightningModule):
    """Gets pixels in some other form than its layers do."""

    def __init__(self) -> None:
        super().__init__()
        convolutions = [nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Tanh()) for _ in range(4)]
        self.net = nn.Sequential(*convolutions)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, batch: Any) -> Tensor:
        return (self(batch[0]) - 1).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.5)


def scaled(x: Tensor) -> Tensor:
    return (x.float() / 255 - 0.5) / 0.29


class AfterTransfer(Images):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        assert torch.is_grad_enabled() == self.trainer.training, "the probe is like validation for the Trainer, too"
        return scaled(batch[0]), batch[1]


class BeforeTransfer(Images):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return scaled(batch[0]), batch[1]


class OwnTransfer(Images):
    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return scaled(batch[0]).to(device), batch[1].to(device)


class InTheStep(Images):
    def loss(self, batch: Any) -> Tensor:
        return (self.net(scaled(batch[0])) - 1).square().mean()


class ScalingData(pl.LightningDataModule):
    def __init__(self, loader: Any) -> None:
        super().__init__()
        self.loader = loader

    def train_dataloader(self) -> Any:
        return self.loader

    def val_dataloader(self) -> Any:
        return self.loader

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return scaled(batch[0]), batch[1]


@pytest.mark.parametrize(
    ("make", "data"),
    [(AfterTransfer, None), (BeforeTransfer, None), (OwnTransfer, None), (InTheStep, None), (Images, ScalingData)],
)
def test_layers_see_of_the_probe_what_they_see_in_validation(make: Any, data: Any) -> None:
    images = torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    module, watch = make(), DepthProfile(measures=NORMALIZED, pretrained="cpu", null_draws=1)
    start = copy.deepcopy(module.net)
    loader = DataLoader(TensorDataset(images, torch.zeros(64)), 16)
    fit(module, [watch], (data(loader),) if data else (loader, loader), max_steps=-1, max_epochs=2)
    found = watch.profiles[-1].change
    assert found == depth_profile(start, module.net, scaled(images), measures=NORMALIZED)["cka_normalized"].change
    assert min(found) > 1e-6
    null = watch.recorder.measure_null()
    assert null is not None
    assert max(profile.change[0] for profile in null.matched[0].values()) < 1, "also when nothing is logged any more"


class Noisy(Images):
    """Draws its inputs in the step, as diffusion models and masked language models do."""

    def loss(self, batch: Any) -> Tensor:
        return (self.net(torch.where(torch.rand_like(batch[0]) < 0.5, batch[0], 0.0)) - 1).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.0)


def test_what_a_step_draws_before_the_model_is_drawn_alike() -> None:
    watch = DepthProfile(measures=NORMALIZED)
    fit(Noisy(), [watch], (DataLoader(TensorDataset(torch.randn(64, 3, 8, 8)), 16),) * 2, max_steps=-1, max_epochs=2)
    assert [profile.change for profile in watch.profiles] == [(0.0,) * 4] * 2


class Catches(Images):
    """Holds on to whatever goes wrong, and cannot be stopped in the middle of a step."""

    def loss(self, batch: Any) -> Tensor:
        try:
            return super().loss(batch)
        except Exception:
            return torch.zeros((), requires_grad=True)


class Fails(Images):
    """Needs what only a real validation has."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.scale = self.set_in_the_epoch  # type: ignore[has-type]

    def on_validation_epoch_start(self) -> None:
        self.set_in_the_epoch = 1


class Transposed(Images):
    """Calls the layers on more examples than the batch has."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.net(torch.cat([batch[0], batch[0].flip(0)]))


@pytest.mark.parametrize("make", [Catches, Fails, Transposed])
def test_steps_that_tell_nothing_leave_it_to_forward(make: Any) -> None:
    images = torch.randn(32, 3, 8, 8)
    module, watch = make(), DepthProfile(measures=NORMALIZED)
    start = copy.deepcopy(module.net)
    fit(module, [watch], (DataLoader(TensorDataset(images, torch.zeros(32)), 16),) * 2, max_steps=-1, max_epochs=1)
    assert (
        watch.profiles[-1].change
        == depth_profile(start, module.net, images, measures=NORMALIZED)["cka_normalized"].change
    )


class TakesLabels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*[nn.Linear(6, 6) for _ in range(3)])
        self.seen: dict[str, Any] = {}

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        assert labels is not None, "some models make their inputs from labels"
        return self.blocks(x)


def test_no_key_is_dropped_in_silence() -> None:
    batch = {"x": torch.randn(8, 6), "labels": torch.zeros(8)}
    assert set(feed(TakesLabels(), batch).payload) == {"x", "labels"}
    with pytest.warns(UserWarning, match="'weight' are not passed to TakesLabels") as caught:
        assert set(feed(TakesLabels(), {**batch, "weight": torch.ones(8)}).payload) == {"x", "labels"}
    assert len(caught) == 1


@dataclass
class Example:
    x: Tensor
    y: Tensor


class Graphs:
    """A batch with a method ``to``, as graph libraries have, that is no container."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def to(self, device: Any) -> Graphs:
        return Graphs(self.x.to(device))


ROWS = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("batch", "forward"),
    [
        (Example(ROWS, torch.zeros(16)), lambda m, b: m(b.x)),
        (Graphs(ROWS), lambda m, b: m(b.x)),
        (["aa" + chr(97 + i) for i in range(16)], lambda m, b: m(ROWS[[ord(text[2]) - 97 for text in b]])),
        ({"text": [chr(97 + i) for i in range(16)]}, lambda m, b: m(ROWS[[ord(t) - 97 for t in b["text"]]])),
        ((ROWS[:, :3], [ROWS[:, 3:]]), lambda m, b: m(torch.cat([b[0], *b[1]], dim=1))),
    ],
    ids=["dataclass", "object", "strings", "dict of strings", "nested"],
)
def test_any_batch_works_with_forward(batch: Any, forward: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(6, 6) for _ in range(3)])
    found = Probe((batch,), forward=forward).record(model, LayerStack.find(model))
    with torch.no_grad():
        torch.testing.assert_close(found.rows[2], model(ROWS))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(*[nn.Linear(6, 6) for _ in range(3)])

    def forward(self, anchor: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
        return self.net(anchor), self.net(positive)


def test_a_stack_that_runs_twice_is_an_error_whose_remedy_works() -> None:
    model, batch = Pair(), {"anchor": ROWS, "positive": ROWS.flip(0)}
    with pytest.raises(ValueError, match=r"ran several times in one forward.* pass a forward=\(model, batch\)"):
        Probe((batch,)).record(model, LayerStack.find(model))
    probe = Probe((batch,), forward=lambda m, b: m.net(b["anchor"]))
    found = probe.record(model, LayerStack.find(model))
    with torch.no_grad():
        torch.testing.assert_close(found.rows[2], model.net(ROWS))
