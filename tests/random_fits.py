"""Random small modules, batches, optimizers and Trainer options, for `test_random_fits`."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import DataLoader, default_collate

D, T = 6, 5


class Residual(nn.Module):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.parts(x)


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x + 0.1 * torch.randn_like(x)))


class InTuple(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(D, D, batch_first=True)

    def forward(self, x: Any) -> Any:
        return self.rnn(x[0] if isinstance(x, tuple) else x)


def attention(batch_first: bool) -> Callable[[], nn.Module]:
    return lambda: nn.TransformerEncoderLayer(D, 2, 2 * D, 0.1, batch_first=batch_first)


#: Blocks by name, with the shape of an example and where its axes go: "rows", "positions", "time first", ...
BLOCKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(D, D), nn.Tanh()), (D,)),
    "dropout": (lambda: Residual(nn.Linear(D, D), nn.Dropout(0.3), nn.GELU()), (D,)),
    "layer norm": (lambda: Residual(nn.LayerNorm(D), nn.Linear(D, 2 * D), nn.ReLU(inplace=True), nn.Linear(2 * D, D)), (D,)),
    "batch norm": (lambda: nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.Tanh()), (D,)),
    "weight norm": (lambda: nn.Sequential(weight_norm(nn.Linear(D, D)), nn.Tanh()), (D,)),
    "noise": (Noisy, (D,)),
    "per position": (lambda: nn.Sequential(nn.Linear(D, D), nn.Tanh()), (T, D)),
    "attention": (attention(True), (T, D)),
    "attention, time first": (attention(False), (T, D)),
    "recurrent": (InTuple, (T, D)),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(D, D, 3, padding=1), nn.Tanh()), (D, T)),
    "conv2d": (lambda: Residual(nn.Conv2d(D, D, 3, padding=1), nn.GroupNorm(2, D), nn.ReLU()), (D, T, T)),
}  # fmt: skip


@dataclass
class Item:
    x: Any
    y: Any


def collated(items: list[Item]) -> Item:
    return Item(default_collate([i.x for i in items]), default_collate([i.y for i in items]))


#: Ways to hold an example (x, y), and to get x out of a batch of them.
FORMS: dict[str, tuple[Callable[[Any, Any], Any], Callable[[Any], Tensor]]] = {
    "tensor": (lambda x, y: x, lambda b: b),
    "tuple": (lambda x, y: (x, y), lambda b: b[0]),
    "label first": (lambda x, y: (y, x), lambda b: b[1]),
    "dict": (lambda x, y: {"x": x, "labels": y}, lambda b: b["x"]),
    "nested": (lambda x, y: {"inputs": {"signal": x}, "target": [y]}, lambda b: b["inputs"]["signal"]),
    "dataclass": (Item, lambda b: b.x),
}

OPTIMIZERS: dict[str, Callable[[list[Any], float], torch.optim.Optimizer]] = {
    "sgd": lambda p, lr: torch.optim.SGD(p, lr),
    "momentum": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, nesterov=True),
    "adamw": lambda p, lr: torch.optim.AdamW(p, lr / 10, weight_decay=0.0),
    "foreach adam": lambda p, lr: torch.optim.Adam(p, lr / 10, foreach=True),
    "rmsprop": lambda p, lr: torch.optim.RMSprop(p, lr / 10),
    "adagrad": lambda p, lr: torch.optim.Adagrad(p, lr / 10),
    "two groups": lambda p, lr: torch.optim.SGD([{"params": p[::2]}, {"params": p[1::2], "lr": lr / 3}], lr),
}


@dataclass(frozen=True)
class Case:
    """One fit: everything but the learning rate and the callbacks."""

    block: str
    depth: int
    form: str
    optimizer: str
    size: int
    count: int
    own_forward: bool
    seed: int
    options: tuple[tuple[str, Any], ...]
    rows: str
    workers: int


OPTIONS = {
    "accumulate_grad_batches": st.sampled_from([1, 1, 2, 3]),
    "gradient_clip_val": st.sampled_from([None, None, 0.1]),
    "precision": st.sampled_from(["32-true", "32-true", "64-true", "bf16-mixed"]),
    "max_epochs": st.sampled_from([1, 2]),
    "log_every_n_steps": st.sampled_from([1, 3]),
    "num_sanity_val_steps": st.sampled_from([0, 2]),
    "val_check_interval": st.sampled_from([1.0, 0.5, 1]),
    "limit_val_batches": st.sampled_from([1.0, 1]),
    "overfit_batches": st.sampled_from([0.0, 0.0, 2]),
    "detect_anomaly": st.sampled_from([False, False, True]),
}

CASES = st.builds(
    Case,
    block=st.sampled_from(sorted(BLOCKS)),
    depth=st.integers(2, 4),
    form=st.sampled_from(sorted(FORMS)),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    size=st.sampled_from([4, 5, 6, 8]),
    count=st.sampled_from([16, 19, 24]),
    own_forward=st.booleans(),
    seed=st.integers(0, 1000),
    options=st.fixed_dictionaries(OPTIONS).map(lambda d: tuple(sorted(d.items()))),
    rows=st.sampled_from(["mean", "mean", "tokens", "last"]),
    workers=st.sampled_from([0, 0, 0, 1]),
)


class Fuzzed(pl.LightningModule):
    """Blocks on the examples of a case."""

    def __init__(self, case: Case, lr: float) -> None:
        super().__init__()
        self.case, self.lr = case, lr
        make, shape = BLOCKS[case.block]
        self.stem = nn.Linear(shape[-1], shape[-1])
        self.net = nn.Sequential(*[make() for _ in range(case.depth)])
        self.head = nn.Linear(shape[-1], 3)

    def loss(self, batch: Any) -> Tensor:
        x = FORMS[self.case.form][1](batch)
        output = (self if self.case.own_forward else self.run_blocks)(x)
        return nn.functional.mse_loss(self.head(output), torch.ones(3).to(output).expand(*output.shape[:-1], 3))

    def run_blocks(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.case.block == "attention, time first":
            return self.net(x.transpose(0, 1)).transpose(0, 1)
        found = self.net(x)
        return found[0] if isinstance(found, tuple) else found

    def forward(self, x: Tensor) -> Tensor:
        return self.run_blocks(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return OPTIMIZERS[self.case.optimizer](list(self.parameters()), self.lr)


def data(case: Case, seed: int) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    hold, shape = FORMS[case.form][0], BLOCKS[case.block][1]
    return [hold(torch.randn(shape, generator=generator), torch.tensor(i % 3)) for i in range(case.count)]


def run(case: Case, callbacks: list[pl.Callback], lr: float = 0.1) -> tuple[Any, ...]:
    """Fits a case and returns all that must not depend on who watches: weights, optimizer, metrics, random states."""
    pl.seed_everything(case.seed, verbose=False)
    module = Fuzzed(case, lr)
    options = dict(case.options)
    form: dict[str, Any] = {"batch_size": case.size, "collate_fn": collated if case.form == "dataclass" else None}
    if options["precision"] == "64-true":
        module = module.double()
    loaders = [
        # Batch norm needs more than one example.
        DataLoader(data(case, 1), shuffle=True, num_workers=case.workers, drop_last=case.block == "batch norm", **form),
        DataLoader(data(case, 2), **form),
    ]
    trainer = pl.Trainer(
        **options, callbacks=callbacks, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(module, *loaders)
    metrics = {k: v for k, v in trainer.callback_metrics.items() if not k.startswith(("depth", "update", "equal"))}
    streams = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()
    return module.state_dict(), trainer.optimizers[0].state_dict(), metrics, streams
