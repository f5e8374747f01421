"""A study's progress in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.text import Text

from depthcb.study.pool import Progress


@contextmanager
def shown() -> Iterator[Callable[[Progress], None]]:
    """A line that is rewritten in a terminal; where output goes to a file, a line for each run that ends."""
    console = Console()
    if not console.is_terminal:
        said = ""

        def log(progress: Progress) -> None:
            nonlocal said
            if progress.last != said:
                said = progress.last
                console.print(Text(line(progress)), soft_wrap=True)

        yield log
        return
    with Live(console=console, transient=True) as live:
        yield lambda progress: live.update(Text(line(progress)))


def line(progress: Progress) -> str:
    """Done, running, failed, time left and the last run.

    Example:
        >>> line(Progress(total=3, done=1, running=2, last="gpt2-mini causal_lm adamw standard 0: slope +0.1"))
        '1/3 done, 2 running, 0 failed; gpt2-mini causal_lm adamw standard 0: slope +0.1'
    """
    left = progress.seconds_left
    time_left = (
        "" if left is None else f", about {left / 60:.0f} min left" if left >= 90 else f", about {left:.0f} s left"
    )
    last = f"; {progress.last}" if progress.last else ""
    return (
        f"{progress.done}/{progress.total} done, {progress.running} running, {progress.failed} failed{time_left}{last}"
    )
