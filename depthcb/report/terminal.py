"""Tables, verdicts and bar charts in the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
import rich.box
from rich.bar import Bar
from rich.console import Console
from rich.table import Table
from rich.text import Text

from depthcb.glossary import LOW_RANK
from depthcb.report.groups import (
    UNRESOLVED_NOTE,
    Group,
    context,
    groups,
    has_unresolved,
    headline,
    last,
    layer_rows,
    replicates,
    run_line,
    shown_change,
    title_of,
    verdict_lines,
    worth_line,
)
from depthcb.report.plain_words import pair_sentence, verdict_sentence
from depthcb.run import Run
from depthcb.style import BLUE, printable, show, show_interval

_SHORT = {"standard": "standard", "equal-step": "eq.-step"}


def print_runs(runs: Sequence[Run], console: Console) -> None:
    """Prints, for each group of runs, a table of the layers, one line per run and the verdict with its context.

    Args:
        runs: The runs.
        console: The console to print to; 80 columns are enough for a pair.
    """
    if not runs:
        console.print(_text("No run was started."))
    found = groups(runs)
    for group in found:
        console.print(_layers_table(group))
        for run in group.runs:
            console.print(_hanging(run_line(run, group), console))
        console.print(_text(headline(group), style="bold"))
        for line in filter(None, [*context(group), pair_sentence(group)]):
            console.print(_hanging(f"  {line}", console))
        console.print()
    for seeds in replicates(found):
        title, *lines = verdict_lines(seeds)
        console.print(_text(title, style="bold"))
        for line in filter(None, [*lines, verdict_sentence(seeds)]):
            console.print(_hanging(f"  {line}", console))


def print_bars(run: Run, console: Console) -> None:
    """Prints the latest profile of a run as one bar per layer, by the first measure.

    Args:
        run: The run.
        console: The console to print to.
    """
    if run.unit_ratio.units:
        console.print(_units_table(run))
    profile = last(run, next(iter(run.profiles), ""))
    if profile is None:
        console.print(_text(f"{run.name}: no depth profile was measured yet."))
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True, overflow="ellipsis", max_width=max(12, console.width // 3))
    table.add_column(justify="right")
    table.add_column(ratio=1)
    top = max(profile.change) or 1.0
    for name, change, shown in zip(profile.layer_names, profile.change, shown_change(profile), strict=True):
        table.add_row(_text(name), shown, Bar(top, 0, change, color=BLUE))
    console.print(_text(f"{run.name}, {run.control}: {profile.title} at step {profile.step}", "bold"))
    console.print(table)
    slope = f"slope {profile.slope:+.3g}{show_interval(profile.slope_interval)} per whole depth"
    console.print(_text(f"{slope}, {profile.unit}, {profile.rows} rows"))
    if profile.unresolved:
        console.print(_text(UNRESOLVED_NOTE))
    if run.worth is not None:
        console.print(_text(worth_line(run, profile.measure)))


def _units_table(run: Run) -> Table:
    """Returns one row per kind of unit: its smallest and largest mean step ratio, and the layers that have them."""
    table = Table(
        title=_text(f"{run.name}, {run.control}: mean step ratio"), title_justify="left", box=rich.box.SIMPLE_HEAD
    )
    table.add_column("unit", no_wrap=True, overflow="ellipsis")
    for name in ("smallest", "in", "largest", "in"):
        table.add_column(name, justify="right", no_wrap=True)
    grid = run.unit_ratio.grid
    for kind, ratios in zip(grid.labels, grid.values.T, strict=True):
        low, high = np.nanargmin(ratios), np.nanargmax(ratios)
        cells = (cell for i in (low, high) for cell in (show(ratios[i]), grid.layers[i]))
        table.add_row(_text(kind), *cells)
    if (spread := run.unit_ratio.spread) is not None:
        table.caption = _text(f"largest / smallest of all: {show(spread)}")
    return table


def _text(text: str, style: str = "") -> Text:
    """Returns text for the terminal, which obeys nothing in it."""
    return Text(printable(text), style)


def _hanging(line: str, console: Console) -> Text:
    """Wraps a line with indented continuation lines, so that the start of each run stands out."""
    return _text(textwrap.fill(line, console.width, subsequent_indent="    ", break_on_hyphens=False))


def _layers_table(group: Group) -> Table:
    measures = [m for m in ("cka", "cka_normalized") if m in group.measures] or group.measures[:2]
    table = Table(
        title=_text(group.title), title_justify="left", box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    table.add_column("layer", no_wrap=True)
    for name in [*(title_of(group, m).replace("normalised change", "normal.") for m in measures), "step"]:
        for run in group.runs:
            short = _SHORT.get(run.control, run.control) if group.paired else run.name
            table.add_column(_text(f"{name}\n{short}"), justify="right", no_wrap=True)
    table.add_column("eff.\nrank", justify="right", no_wrap=True)
    rows = layer_rows(group, measures)
    for _, name, *figures in rows:
        table.add_row(_text(name if len(name) <= 10 else f"…{name[-9:]}"), *figures)
    notes = []
    if any(row[-1].endswith("!") for row in rows):
        notes.append(f"! effective rank below {LOW_RANK:g}: this layer's change rests on a few directions")
    if has_unresolved(rows):
        notes.append(UNRESOLVED_NOTE)
    if notes:
        table.caption = _text("\n".join(notes))
    return table
