"""Runs to report on, and what the terminal shows of them."""

from __future__ import annotations

import io

from rich.console import Console

from depthcb import report
from depthcb.run import Run

INTERRUPTED = {
    "no arm started": {"arms": 0},
    "no arm measured": {"validations": (0, 0, 0, 0)},
    "one arm only": {"validations": (8,), "arms": 1},
    "equal-step without profiles": {"validations": (8, 0, 0, 0)},
    "one validation": {"validations": (1, 1, 1, 1)},
    "second optimizer cut short": {"validations": (8, 8, 3, 0)},
}


CASES = {f"{n} layers": {"layers": n} for n in (6, 12, 30, 48)} | INTERRUPTED


def printed(runs: list[Run], bars: bool = False) -> str:
    console = Console(file=io.StringIO(), width=80, force_terminal=False)
    for run in runs if bars else ():
        report.print_bars(run, console)
    if not bars:
        report.print_runs(runs, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()
