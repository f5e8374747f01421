"""A generator that steps when nothing is logged left no rows, and a command line's numbers were read as text."""

from __future__ import annotations

import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from support import Rows, fit
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from depthcb import DepthProfile, EqualStep, UpdateRatioMonitor


def net() -> nn.Sequential:
    return nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)])


class Gan(pl.LightningModule):
    """The critic steps in every batch, the generator in every fifth."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.critic = net(), net()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        noise = torch.randn_like(batch[0])
        losses = [-self.critic(self.generator(noise)).mean(), -self.critic(batch[0]).mean()]
        for optimizer, loss in list(zip(optimizers, losses, strict=True))[batch_idx % 5 > 0 :]:
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.generator.parameters(), 0.1), torch.optim.SGD(self.critic.parameters(), 0.1)


def data(count: int = 800) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(count, 8)), batch_size=8)


@pytest.mark.parametrize(
    ("layers", "every", "steps"),
    [
        ("generator", 10, [10, 20, 30]),
        ("generator", 7, [10, 15, 20, 30, 35]),
        ("generator", 1, [0, 5, 10, 15, 20, 25, 30, 35]),
        ("critic", 10, [9, 19, 29, 39]),
    ],
)
def test_the_first_step_at_or_after_each_log_is_logged(layers: str, every: int, steps: list[int]) -> None:
    rows = Rows()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        callbacks: list[pl.Callback] = [EqualStep(layers), UpdateRatioMonitor(layers)]
        fit(Gan(), callbacks, (data(320), None), max_steps=-1, max_epochs=1, log_every_n_steps=every, logger=rows)
    for key in ("equal_step/target", "update_ratio/spread"):
        assert [row["step"] for row in rows.rows if key in row] == steps


class Lit(pl.LightningModule):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.net = net()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = (self.net(batch[0]) - 1).square().mean()
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self) -> DataLoader[Any]:
        return data(32)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # jsonargparse's own
@pytest.mark.parametrize(
    ("argument", "name", "value"),
    [
        ("target=0.001", "target", 0.001),
        ("target=median", "target", "median"),
        ("target=[1, 2, 3, 4]", "target", [1.0, 2.0, 3.0, 4.0]),
        ("layers=net", "layers", "net"),
        ("layers=[net.0, net.1]", "layers", ["net.0", "net.1"]),
    ],
)
def test_arguments_on_a_command_line(argument: str, name: str, value: Any) -> None:
    quiet = ["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"]
    arguments = [f"--trainer.{option}=false" for option in quiet]
    arguments += ["--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1"]
    arguments += ["--trainer.callbacks+=depthcb.EqualStep", f"--trainer.callbacks.{argument}"]
    cli = LightningCLI(Lit, args=["fit", *arguments], save_config_callback=None)
    callbacks: Any = cli.trainer.callbacks  # type: ignore[attr-defined]
    (control,) = [c for c in callbacks if isinstance(c, EqualStep)]
    assert getattr(control.equalizer, name) == value
    if value == 0.001:
        assert control.mean_realised.values() == pytest.approx([0.001] * 4, rel=1e-3)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", [DepthProfile, UpdateRatioMonitor])
def test_layers_of_the_observers_on_a_command_line(kind: Any) -> None:
    arguments = ["--trainer.logger=false", "--trainer.accelerator=cpu", f"--trainer.callbacks+=depthcb.{kind.__name__}"]
    arguments += ["--trainer.callbacks.layers=[net.0, net.1]"]
    callbacks: Any = LightningCLI(Lit, run=False, args=arguments, save_config_callback=None).trainer.callbacks  # type: ignore[attr-defined]
    (watch,) = [c for c in callbacks if isinstance(c, kind)]
    found = watch.recorder.layers if kind is DepthProfile else watch.meter.layers
    assert found == ["net.0", "net.1"]
