"""Tables and verdicts in the terminal."""

from __future__ import annotations

import textwrap

import rich.box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from depthcb.report.summary import LOW_RANK, Pair, Summary, arm_line, context, headline, layer_rows, read_pairs


def print_summary(summary: Summary, console: Console) -> None:
    """Prints, for each optimizer, a table of the layers, a line for each arm and the verdict with its context.

    Args:
        summary: What the demo writes to ``summary.json``.
        console: Where to; 80 columns are enough.
    """
    pairs = read_pairs(summary)
    if not pairs:
        console.print(Text("No arm was started."))
    for pair in pairs:
        console.print(_terminal_table(pair, summary))
        for arm in pair.arms:
            console.print(_hanging(arm_line(pair, arm), console))
        console.print(Text(headline(pair), style="bold"))
        for line in filter(None, context(pair)):
            console.print(_hanging(f"  {line}", console))
        console.print()


def _hanging(line: str, console: Console) -> Text:
    """A line whose continuations are set in, so that each arm keeps one visible start."""
    return Text(textwrap.fill(line, console.width, subsequent_indent="    "))


def _terminal_table(pair: Pair, summary: Summary) -> Table:
    title = Text(f"{summary.get('backbone')}, {pair.title}")
    table = Table(title=title, title_justify="left", box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("layer", no_wrap=True)
    for name in ("change", "normal.", "step"):
        for arm in ("standard", "eq.-step"):
            table.add_column(f"{name}\n{arm}", justify="right", no_wrap=True)
    table.add_column("eff.\nrank", justify="right", no_wrap=True)
    rows = layer_rows(pair, list(summary.get("layers") or ()), summary.get("effective_rank"))
    for _, name, *figures in rows:
        table.add_row(Text(name if len(name) <= 10 else f"…{name[-9:]}"), *figures)
    if any(row[-1].endswith("!") for row in rows):
        table.caption = Text(f"! effective rank below {LOW_RANK:g}: this layer's change rests on a few directions")
    return table
