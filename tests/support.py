"""Shared test helpers: a decoder that trains in milliseconds, its data and a minimal Trainer."""

from __future__ import annotations

import csv
import itertools
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from depthcb import LayerStack
from depthcb.callbacks.step_events import OptimizerStepCallback

VOCABULARY, LENGTH = 61, 12


class TinyLM(pl.LightningModule):
    """A 4-layer GPT-2 with dropout."""

    def __init__(self, optimizer: Callable[[list[nn.Parameter]], Any] | None = None, layers: int = 4) -> None:
        super().__init__()
        config = GPT2Config(
            n_embd=16, n_layer=layers, n_head=2, vocab_size=VOCABULARY, n_positions=32, bos_token_id=0, eos_token_id=0,
            resid_pdrop=0.1,
        )  # fmt: skip
        self.model = GPT2LMHeadModel(config)
        self.make_optimizer = optimizer or (lambda p: torch.optim.AdamW(p, lr=1e-3))

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        logits = self.model(input_ids=batch["input_ids"]).logits
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(list(self.parameters()))


def texts(count: int = 32, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(1, VOCABULARY, (LENGTH,), generator=generator)} for _ in range(count)]


def loaders(batch_size: int = 8, count: int = 32) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Training data, shuffled by the global generator, and separate validation data."""
    return DataLoader(texts(count), batch_size=batch_size, shuffle=True), DataLoader(texts(16, seed=1), batch_size=8)


def fit(module: pl.LightningModule, callbacks: list[pl.Callback], data: Any = None, **options: Any) -> pl.Trainer:
    """Fits for 4 steps in fp32 by default, always with seed 7."""
    pl.seed_everything(7, verbose=False)
    defaults: dict[str, Any] = {
        "max_steps": 4, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "log_every_n_steps": 1, "accelerator": "cpu", "num_sanity_val_steps": 0,
    }  # fmt: skip
    trainer = pl.Trainer(**{**defaults, **options}, callbacks=callbacks)
    trainer.fit(module, *(data or loaders()))
    return trainer


def logged(logger: CSVLogger) -> list[dict[str, float]]:
    """The rows of a CSV log, without empty cells."""
    logger.save()
    with open(logger.experiment.metrics_file_path, encoding="utf-8") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


class Rows(DummyLogger):
    """A logger that stores its rows with their steps."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append({"step": step, **metrics})

    def column(self, prefix: str) -> list[list[float]]:
        """The values of matching keys, sorted by name, for each row that has any."""
        found = [[row[key] for key in sorted(row) if key.startswith(prefix)] for row in self.rows]
        return [values for values in found if values]


def seeded(make: Callable[[], pl.LightningModule]) -> pl.LightningModule:
    pl.seed_everything(3, verbose=False)
    return make()


def weights(module: pl.LightningModule, layers: Any = None) -> list[np.ndarray]:
    """One float64 vector per layer."""
    stack = LayerStack.find(module, layers)
    return [np.concatenate([p.detach().double().numpy().ravel() for p in layer]) for layer in stack.parameters()]


class Judge(OptimizerStepCallback):
    """Stores each layer's weights before and after every step; placed before and after EqualStep."""

    def __init__(self) -> None:
        self.before: list[list[np.ndarray]] = []
        self.after: list[list[np.ndarray]] = []

    def on_before_optimizer_closure(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.before.append(weights(pl_module))

    def on_after_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.after.append(weights(pl_module))

    def steps(self) -> list[list[np.ndarray]]:
        return [
            [a - b for a, b in zip(now, start, strict=True)] for now, start in zip(self.after, self.before, strict=True)
        ]

    def ratios(self) -> np.ndarray:
        """(steps, L)."""
        sizes = [[np.linalg.norm(b) for b in start] for start in self.before]
        return np.array([[np.linalg.norm(d) for d in step] for step in self.steps()]) / np.array(sizes)


class Edges(pl.Callback):
    """Stores each layer's weights between batches, after all optimizers have stepped."""

    def __init__(self, read: Callable[[pl.LightningModule], list[np.ndarray]] = weights) -> None:
        self.read = read
        self.seen: list[list[np.ndarray]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: pl.LightningModule, *_: Any) -> None:
        self.seen.append(self.read(pl_module))

    def on_train_end(self, trainer: Any, pl_module: pl.LightningModule) -> None:
        self.seen.append(self.read(pl_module))

    def ratios(self) -> np.ndarray:
        """(batches, L)."""
        return np.array(
            [
                [np.linalg.norm(b - a) / np.linalg.norm(a) for a, b in zip(start, end, strict=True)]
                for start, end in itertools.pairwise(self.seen)
            ]
        )


def run_script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs a test script."""
    return run_python(Path(__file__).parent / name, *arguments)


def run_python(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs Python with one thread per process and a separate port."""
    tests = Path(__file__).parent
    command = [sys.executable, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port())}
    environment["PYTHONPATH"] = f"{tests.parent}{os.pathsep}{tests}"
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def free_port() -> int:
    """Returns a free port below the ephemeral range, from which another process could take it before it is used."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
