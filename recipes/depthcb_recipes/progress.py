"""Progress display: a bar in a terminal; in a log, one line per event and at least one every 30 seconds."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.text import Text

#: Seconds after which a line is logged even if nothing has happened.
EVERY = 30.0


class Progress:
    """Shows the completed and total steps and the remaining time.

    Args:
        steps: Total number of steps; None if unknown.
        console: Output console; a terminal gets a bar, anything else lines.
        planned: Estimated total duration in seconds. If given, progress is measured in planned seconds, since steps,
            validations and nulls differ in duration; None measures it in steps.
        every: Maximum number of seconds between log lines.

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
        """Estimated remaining seconds at the current pace; None if unknown."""
        total, worked = (self.steps, self.done) if self.planned is None else (self.planned, self._worked)
        if total is None:
            return None
        if not worked:
            return self.planned
        return (time.monotonic() - self._started) / worked * max(0.0, total - worked)

    def now(self, text: str) -> None:
        """Sets the current activity, shown in the bar or in the next log line."""
        self._text = text
        self._refresh()

    def say(self, text: str) -> None:
        """Sets the current activity and logs it immediately."""
        self.now(text)
        if not self.console.is_terminal:
            self._print()

    def advance(self, *, steps: int = 0, seconds: float = 0.0) -> None:
        """Adds completed work.

        Args:
            steps: Number of completed steps.
            seconds: Planned duration of the completed work, in seconds.
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
        """Logs a line at regular intervals, even during a long step of the main thread."""
        while not self._ended.wait(max(0.0, self._last + self.every - time.monotonic())):
            if time.monotonic() - self._last >= self.every:
                self._print()


def time_left(seconds: float) -> str:
    """Formats a remaining time.

    Example:
        >>> time_left(12.3), time_left(400)
        ('about 12 s left', 'about 7 min left')
    """
    return f"about {seconds / 60:.0f} min left" if seconds >= 90 else f"about {seconds:.0f} s left"
