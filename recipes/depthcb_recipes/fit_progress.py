"""Trainer callbacks for progress and step times."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ProgressBar

from depthcb_recipes.progress import Progress


class FitProgress(ProgressBar):
    """Shows a fit's progress in optimizer steps; replaces Lightning's bar, which counts batches of an epoch.

    Args:
        name: Name of the fit in messages.
        progress: A progress display shared with other work; None creates a separate one.
        step_seconds: Planned duration of a step, if ``progress`` counts seconds.
        validation_seconds: Planned duration of a validation including its probe.
    """

    def __init__(
        self,
        name: str,
        progress: Progress | None = None,
        step_seconds: float = 0.0,
        validation_seconds: float = 0.0,
    ) -> None:
        super().__init__()
        self.name, self._shared = name, progress
        self.step_seconds, self.validation_seconds = step_seconds, validation_seconds
        self.progress: Progress | None = progress
        self._enabled, self._seen = True, 0

    def disable(self) -> None:
        """Disables the display; Lightning calls this on all processes but the first."""
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Prints the output of a module's ``self.print``."""
        if self.progress is not None:
            self.progress.console.print(*args, **kwargs)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._enabled:
            return
        self._seen = trainer.global_step  # not 0 if the fit is resumed
        if self._shared is None:
            planned = trainer.max_steps if trainer.max_steps > 0 else trainer.estimated_stepping_batches
            total = int(planned) - self._seen if 0 < planned < float("inf") else None
            self.progress = Progress(total).__enter__()
        self._say("training starts")

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        steps, self._seen = trainer.global_step - self._seen, trainer.global_step
        if self._enabled and self.progress is not None:
            self.progress.advance(steps=steps, seconds=steps * self.step_seconds)
            self.progress.now(f"{self.name}: training")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._enabled and self.progress is not None and not trainer.sanity_checking:
            self.progress.now(f"{self.name}: validating")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._enabled and self.progress is not None and not trainer.sanity_checking:
            self.progress.advance(seconds=self.validation_seconds)
            shown = {k: v for k, v in trainer.progress_bar_metrics.items() if k != "train/loss"}
            metrics = [f"{key} {value:.4g}" for key, value in shown.items()]
            self._say(", ".join([f"validated after {self._seen} steps", *metrics]))
            if 0 < trainer.max_steps <= trainer.global_step:
                self.progress.now(f"{self.name}: last measurements, such as null profiles")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()

    def _say(self, text: str) -> None:
        if self.progress is not None:
            self.progress.say(f"{self.name}: {text}")

    def _close(self) -> None:
        if self._shared is None and self.progress is not None:
            self.progress.__exit__(None, None, None)
            self.progress = None


class StepClock(pl.Callback):
    """Times each training step, in seconds."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: object) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, *_: object) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._start)
