"""The same training in four front ends: one model, data in one order, SGD with a constant rate, nothing clipped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers import CSVLogger as FabricCSVLogger
from lightning.pytorch.loggers import CSVLogger
from support import VOCABULARY, fit, texts
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2Model, Trainer, TrainingArguments

import depthcb
import depthcb.fabric as fabric_front_end
from depthcb.profile import Profiles
from depthcb.run import Run, read_runs
from depthcb.transformers import DepthProfileCallback, EqualStepCallback, UpdateRatioCallback

EPOCHS, SEED = 2, 7
#: Keyword arguments of every callback's counterpart that are the same in all front ends.
MEASURES = ("cka", "cosine")


class Model(nn.Module):
    """A 4-layer GPT-2 without dropout that returns its loss, as transformers' Trainer wants it."""

    def __init__(self) -> None:
        super().__init__()
        config = GPT2Config(
            n_embd=16, n_layer=4, n_head=2, vocab_size=VOCABULARY, n_positions=32, bos_token_id=0, eos_token_id=0,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        self.gpt2, self.head = GPT2Model(config), nn.Linear(16, VOCABULARY)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.gpt2(input_ids=input_ids, use_cache=False).last_hidden_state)
        if labels is None:
            return {"logits": logits}
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss, "logits": logits}


def model() -> Model:
    torch.manual_seed(3)
    return Model()


def data(seed: int = 0, count: int = 32) -> list[dict[str, Tensor]]:
    return [{**item, "labels": item["input_ids"]} for item in texts(count, seed)]


def batches(seed: int = 0) -> DataLoader[Any]:
    return DataLoader(data(seed), batch_size=8)  # type: ignore[arg-type]


def probe() -> dict[str, Tensor]:
    return {"input_ids": torch.stack([item["input_ids"] for item in texts(40, seed=5)])}


def optimizer(module: nn.Module) -> Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)


@dataclass
class Outcome:
    weights: Tensor
    profiles: Mapping[str, Profiles]
    run: Run

    @classmethod
    def of(cls, module: nn.Module, profiles: Mapping[str, Profiles], folder: Path) -> Outcome:
        (run,) = read_runs(folder)
        return cls(torch.cat([p.detach().flatten() for p in module.parameters()]), profiles, run)

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of one record, without metrics that a front end's own loop computes, and without layers' names."""
        return [plain_row(row) for row in self.run.records[name].rows]


def plain_row(row: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in row.items() if key != "metrics"}
    if "profiles" in row:
        own = {m: {k: v for k, v in p.items() if k != "layer_names"} for m, p in row["profiles"].items()}
        kept["profiles"] = own
    return kept


class Lit(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = model()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(**batch)["loss"]  # type: ignore[no-any-return]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.net(**batch)["loss"])

    def configure_optimizers(self) -> Optimizer:
        return optimizer(self)


def with_lightning(folder: Path) -> Outcome:
    module, watch = Lit(), depthcb.DepthProfile(probe(), measures=MEASURES)
    callbacks = [depthcb.EqualStep(), depthcb.UpdateRatioMonitor(), watch]
    options: dict[str, Any] = {"max_steps": -1, "max_epochs": EPOCHS, "logger": CSVLogger(folder, name="", version="")}
    fit(module, callbacks, (batches(), batches(1)), **options)
    return Outcome.of(module, watch.profiles_by_measure, folder)


def loop(net: nn.Module, sgd: Optimizer, watch: Any = None, start: int = 0, epochs: int = EPOCHS) -> None:
    """Trains for whole epochs of 4 steps, and measures after each."""
    for epoch in range(start, epochs):
        for batch in batches():
            sgd.zero_grad()
            net(**batch)["loss"].backward()
            sgd.step()
        if watch is not None:
            watch.measure(epoch=epoch)


def with_a_plain_loop(folder: Path) -> Outcome:
    net = model()
    sgd = optimizer(net)
    with (
        depthcb.equal_step(net, sgd, every=1),
        depthcb.watch(net, sgd, probe(), measures=MEASURES, folder=folder, every=1, seed=SEED) as watch,
    ):
        loop(net, sgd, watch)
    return Outcome.of(net, watch.recorder.profiles_by_measure, folder)


def with_fabric(folder: Path) -> Outcome:
    watch = fabric_front_end.DepthProfile(probe(), measures=MEASURES)
    callbacks = [fabric_front_end.EqualStep(every=1), fabric_front_end.UpdateRatioMonitor(every=1), watch]
    logger = FabricCSVLogger(folder, name="", version="", flush_logs_every_n_steps=1)
    fabric = Fabric(accelerator="cpu", callbacks=callbacks, loggers=logger)
    fabric.seed_everything(SEED, verbose=False)
    net = model()
    wrapped, sgd = fabric.setup(net, optimizer(net))
    fabric_loop(fabric, wrapped, sgd)
    return Outcome.of(net, watch.recorder.profiles_by_measure, folder)


def fabric_loop(
    fabric: Any, net: Any, sgd: Any, loader: Any = None, start: int = 0, epochs: int = EPOCHS, end: bool = True
) -> None:
    """The loop that `loop` is, in Fabric."""
    for epoch in range(start, epochs):
        for batch in loader or batches():
            sgd.zero_grad()
            fabric.backward(net(**batch)["loss"])
            sgd.step()
        fabric.call("on_validation_epoch_end", epoch=epoch)
    if end:
        fabric.call("on_train_end")


def trainer(net: nn.Module, folder: Path, callbacks: list[Any], **options: Any) -> Trainer:
    """The loop that `loop` is, in transformers' Trainer: everything that is not in the others is off."""
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "num_train_epochs": EPOCHS, "seed": SEED,
        "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "train_sampling_strategy": "sequential", "use_cpu": True,
        "eval_strategy": "epoch", "save_strategy": "no", "logging_steps": 1, "report_to": "none", "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    arguments = TrainingArguments(str(folder), **{**defaults, **options})
    sgd = optimizer(net)
    constant = torch.optim.lr_scheduler.LambdaLR(sgd, lambda _: 1.0)
    return Trainer(
        net, arguments, train_dataset=data(), eval_dataset=data(1), callbacks=callbacks, optimizers=(sgd, constant)
    )


def transformers_callbacks() -> list[Any]:
    return [EqualStepCallback(), UpdateRatioCallback(), DepthProfileCallback(probe(), measures=MEASURES)]


def with_transformers(folder: Path) -> Outcome:
    net, callbacks = model(), transformers_callbacks()
    trainer(net, folder, callbacks).train()
    return Outcome.of(net, callbacks[2].recorder.profiles_by_measure, folder)
