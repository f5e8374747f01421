"""Where long work is: one bar in a terminal; in a log, a line for each event and at least one every 30 seconds."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Any, Self

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.text import Text

from depthcb.study.progress import EVERY, time_left


class Progress:
    """Steps done and to do, and the time that is left.

    Args:
        steps: Steps of the whole work; None if that is not known.
        console: Where it is shown; a terminal gets a bar, anything else lines.
        planned: Seconds that the whole work was estimated to take: `advance` counts in them, since steps,
            validations and nulls don't take equally long. None counts in steps.
        every: Seconds after which a log gets a line.

    Example:
        >>> with Progress(2, Console(no_color=True)) as progress:
        ...     progress.say("adamw-standard: training starts")
        ...     progress.advance(steps=1)
        0:00 adamw-standard: training starts; 0/2 steps
    """

    def __init__(
        self, steps: int | None, console: Console | None = None, planned: float | None = None, every: float = EVERY
    ) -> None:
        self.steps, self.planned, self.every = steps, planned, every
        self.console = console or Console()
        self.done, self._worked, self._text = 0, 0.0, ""
        self._started = self._last = time.monotonic()
        self._ended = threading.Event()
        columns = TextColumn("{task.description:<40}"), BarColumn(), TextColumn("{task.fields[counts]}")
        self._bar = Bar(*columns, TimeElapsedColumn(), console=self.console, disable=not self.console.is_terminal)
        self._task = self._bar.add_task("", total=steps, counts="")

    def __enter__(self) -> Self:
        self._started = self._last = time.monotonic()
        self._bar.start()
        if not self.console.is_terminal:
            threading.Thread(target=self._repeat, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._bar.stop()

    @property
    def seconds_left(self) -> float | None:
        """What is left of the plan at the pace so far; None before the first step of work without one."""
        total, worked = (self.steps, self.done) if self.planned is None else (self.planned, self._worked)
        if total is None:
            return None
        if not worked:
            return self.planned
        return (time.monotonic() - self._started) / worked * max(0.0, total - worked)

    def now(self, text: str) -> None:
        """Says what is being done, in the bar or with the next line."""
        self._text = text
        self._refresh()

    def say(self, text: str) -> None:
        """Says what is being done, in a log at once."""
        self.now(text)
        if not self.console.is_terminal:
            self._print()

    def advance(self, *, steps: int = 0, seconds: float = 0.0) -> None:
        """Counts work as done.

        Args:
            steps: How many steps it was.
            seconds: How long it was planned to take.
        """
        self.done += steps
        self._worked += seconds
        self._refresh()

    def _counts(self) -> str:
        left = self.seconds_left
        total = f"/{self.steps}" if self.steps is not None else ""
        return f"{self.done}{total} steps" + ("" if left is None else f", {time_left(left)}")

    def _refresh(self) -> None:
        self._bar.update(self._task, description=self._text, completed=self.done, counts=self._counts())

    def _print(self) -> None:
        self._last = time.monotonic()
        minutes, seconds = divmod(int(self._last - self._started), 60)
        self.console.print(Text(f"{minutes}:{seconds:02d} {self._text}; {self._counts()}"), soft_wrap=True)

    def _repeat(self) -> None:
        """Keeps a log from falling silent, also while the main thread is in one long step."""
        while not self._ended.wait(max(0.0, self._last + self.every - time.monotonic())):
            if time.monotonic() - self._last >= self.every:
                self._print()


class FitProgress(ProgressBar):
    """Shows a fit's progress in optimizer steps, in place of Lightning's bar of an epoch's batches.

    Args:
        name: What is said to be trained.
        progress: Shared with other work; None for one of the fit's own.
        step_seconds: How long a step is planned to take, where ``progress`` counts in seconds.
        validation_seconds: The same of a validation with its probe.
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
        """Lightning's own way of silencing a bar, on all processes but the first."""
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Prints what a module says through ``self.print``."""
        if self.progress is not None:
            self.progress.console.print(*args, **kwargs)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._enabled:
            return
        self._seen = trainer.global_step  # a resumed fit has done some
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
            figures = [f"{key} {value:.4g}" for key, value in shown.items()]
            self._say(", ".join([f"validated after {self._seen} steps", *figures]))

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
