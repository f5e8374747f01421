"""Where long work is: one bar in a terminal; in a log, a line for each event and at least one every 30 seconds."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.text import Text

#: Seconds after which a log gets a line even when nothing has happened.
EVERY = 30.0


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


def time_left(seconds: float) -> str:
    """An estimate in words.

    Example:
        >>> time_left(12.3), time_left(400)
        ('about 12 s left', 'about 7 min left')
    """
    return f"about {seconds / 60:.0f} min left" if seconds >= 90 else f"about {seconds:.0f} s left"
