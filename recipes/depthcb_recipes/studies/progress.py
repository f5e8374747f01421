"""The progress of a study in the terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.text import Text

from depthcb_recipes.progress import EVERY, time_left
from depthcb_recipes.studies.pool import Progress


@contextmanager
def shown() -> Iterator[Callable[[Progress], None]]:
    """Shows one line that is updated in a terminal; elsewhere one line per finished run, at least every 30 s."""
    console = Console()
    if not console.is_terminal:
        said, when = None, 0.0

        def log(progress: Progress) -> None:
            nonlocal said, when
            if progress.last != said or time.monotonic() - when >= EVERY:
                said, when = progress.last, time.monotonic()
                console.print(Text(line(progress)), soft_wrap=True)

        yield log
        return
    with Live(console=console, transient=True) as live:
        yield lambda progress: live.update(Text(line(progress)))


def line(progress: Progress) -> str:
    """Returns one line: runs done, running and failed, time left, the run that ended last, and what one is doing now.

    Example:
        >>> line(Progress(total=3, done=1, running=2, last="gpt2-mini causal_lm adamw standard 0: slope +0.1"))
        '1/3 done, 2 running, 0 failed; gpt2-mini causal_lm adamw standard 0: slope +0.1'
    """
    left = f", {time_left(progress.seconds_left)}" if progress.seconds_left is not None else ""
    last = f"; {progress.last}" if progress.last else ""
    doing = f"; now {progress.doing}" if progress.doing else ""
    counts = f"{progress.done}/{progress.total} done, {progress.running} running, {progress.failed} failed"
    return f"{counts}{left}{last}{doing}"
