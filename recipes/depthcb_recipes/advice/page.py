"""The page of a test by training: validation loss by budget, for all budgets that a training was tested with."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from depthcb.advice import RULES
from depthcb.report.charts import layout
from depthcb.report.page import Charts, html_page, html_table
from depthcb.style import MISSING, PALE, line_style
from depthcb_recipes.advice.arms import ALL, MODES, Mode
from depthcb_recipes.advice.conclusion import simultaneous
from depthcb_recipes.advice.trained import Row, Trained
from depthcb_recipes.publish import write_whole

#: What was tested so far, and the page, in the folder of the trainings.
TESTED, PAGE = "tested.json", "report.html"
#: The columns of the table.
COLUMNS = {
    "budget": "Share of the layers' parameters that the rules could train.",
    "rule": "The rule; all layers is no rule, but what the others are compared with.",
    "needs": "What must have been computed before the rule can be asked.",
    "layers": "The layers that were trained, 0 = input side.",
    "trained": "Number of trained parameters, with heads and adapters, mean over the trainings.",
    "loss": "Validation loss at the end, nats, mean over the seeds.",
    "minus all layers": "The same minus that of all layers, paired by seed, with an interval that holds at 95 % for "
    "all rules of the budget together.",
    "seconds": "Median wall-clock time of a training.",
    "GB": "Median of the most memory that a training's process held.",
}
_NOTE = (
    '<p class="soft">Bars: 95 % intervals of the difference from all layers, paired by seed, for all rules of a budget '
    "together; a bar that touches the dashed line is no difference that these seeds can tell.</p>"
)


def entries_of(share: float, tables: Sequence[Trained]) -> list[dict[str, Any]]:
    """Returns what was tested with one budget, in JSON types.

    Args:
        share: The budget.
        tables: One table per mode; those without seeds are left out.
    """
    return [
        {
            "budget": share,
            "mode": table.mode,
            "seeds": len(table.seeds),
            "conclusion": str(table.conclusion),
            "rows": [_row(row, table.rows) for row in table.rows],
        }
        for table in tables
        if table.rows
    ]


def _row(row: Row, rows: Sequence[Row]) -> dict[str, Any]:
    everything = next(other for other in rows if other.rule == ALL)
    compared = None
    if row.rule != ALL and len(row.losses) > 1:
        estimate = simultaneous(row.losses, everything.losses, len(rows) - 1)
        compared = [estimate.value, estimate.low, estimate.high]
    layers = ", ".join(map(str, row.sets[0])) if len(row.sets) == 1 else f"{len(row.sets)} sets"
    return {
        "rule": row.rule, "needs": row.cost, "layers": layers, "parameters": row.parameters, "loss": row.loss,
        "minus_all": compared, "seconds": row.seconds, "memory": row.memory,
    }  # fmt: skip


def write_tested(folder: Path, training: str, share: float, tables: Sequence[Trained], title: str) -> Path:
    """Writes the page, and notes what was tested for the pages of other budgets.

    Args:
        folder: The folder of the trainings.
        training: Hash of the training that was repeated; what was tested with another one is dropped.
        share: The budget.
        tables: One table per mode.
        title: The page's title.

    Returns:
        The page's path.
    """
    earlier = json.loads(path.read_text(encoding="utf-8")) if (path := folder / TESTED).is_file() else {}
    others = [e for e in earlier.get("tested", ()) if earlier["training"] == training and e["budget"] != share]
    own = entries_of(share, tables)
    seeds = {entry["mode"]: entry["seeds"] for entry in own}  # all budgets share the line of all layers
    known = [e for e in others if e["seeds"] == seeds.get(e["mode"], e["seeds"])]
    found = sorted([*known, *own], key=lambda entry: float(entry["budget"]))
    write_whole(path, json.dumps({"training": training, "tested": found}, indent=1) + "\n")
    charts = Charts()
    parts = [part for mode in MODES for part in _section(mode, [e for e in found if e["mode"] == mode], charts)]
    html_page(title, parts or ["<p>No seed has all its trainings yet.</p>"], found, "depthcb-advice", folder / PAGE)
    return folder / PAGE


def _section(mode: Mode, entries: Sequence[Mapping[str, Any]], charts: Charts) -> list[str]:
    """Returns what the page says on one mode; nothing if it was not tested."""
    if not entries:
        return []
    rows = [row for entry in entries for row in _cells(entry)]
    return [
        f"<h2>Trained: {MODES[mode]}</h2>",
        *map(_card, entries),
        charts(budget_chart(entries), f"Validation loss by budget, {entries[-1]['seeds']} seeds"),
        _NOTE,
        html_table(list(COLUMNS.items()), rows, text=4),
    ]


def _card(entry: Mapping[str, Any]) -> str:
    budget = f"Budget {100 * entry['budget']:g} %: {entry['conclusion']}"
    return f'<div class="verdict"><h3>{html.escape(budget)}</h3></div>'


def _cells(entry: Mapping[str, Any]) -> list[list[str]]:
    """Returns one row of text per rule, by `COLUMNS`."""
    return [
        [
            f"{100 * entry['budget']:g} %", r["rule"], r["needs"], r["layers"], f"{r['parameters']:,.0f}",
            f"{r['loss']:.4f}", _difference(r["minus_all"]), f"{r['seconds']:.1f}", f"{r['memory'] / 1e9:.2f}",
        ]
        for r in entry["rows"]
    ]  # fmt: skip


def _difference(compared: Sequence[float] | None) -> str:
    return MISSING if compared is None else "{:+.4f} [{:+.4f}, {:+.4f}]".format(*compared)


def budget_chart(entries: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Draws one mode's losses over the budgets, rules side by side, with a line at the loss of all layers.

    Args:
        entries: What `entries_of` returns, of one mode, the smallest budget first.
    """
    rows = [(entry, row) for entry in entries for row in entry["rows"]]
    everything = [row for _, row in rows if row["rule"] == ALL][-1]
    fig, rules = go.Figure(), [rule for rule in RULES if any(row["rule"] == rule for _, row in rows)]
    for index, rule in enumerate(rules):
        own = [(entry, row) for entry, row in rows if row["rule"] == rule]
        fig.add_trace(go.Scatter(
            x=[_category(entry) for entry, _ in own], y=[row["loss"] for _, row in own],
            name=rule, mode="markers", offsetgroup=rule,
            customdata=[f"{row['parameters']:,.0f} parameters, layers {row['layers']}" for _, row in own],
            hovertemplate="%{y:.4f} nats, %{customdata}",
            error_y={"type": "data", "array": [_ends(row)[1] for _, row in own], "thickness": 1.5},
            marker={"color": line_style(index).color, "symbol": _symbol(index), "size": 10},
        ))  # fmt: skip
    last = f"all layers<br>{everything['parameters']:,.0f}"
    fig.add_trace(go.Scatter(
        x=[last], y=[everything["loss"]], name=ALL, mode="markers", offsetgroup=rules[len(rules) // 2],
        marker={"color": PALE, "symbol": "star", "size": 12}, hovertemplate="%{y:.4f} nats",
    ))  # fmt: skip
    fig.add_hline(y=everything["loss"], line={"color": PALE, "dash": "dash", "width": 1.5})
    order = [*dict.fromkeys(map(_category, entries)), last]
    fig.update_xaxes(title={"text": "trained parameters"}, type="category", categoryorder="array", categoryarray=order)
    ends = [row["loss"] + end for _, row in rows for end in _ends(row)]
    room = 0.06 * (max(ends) - min(ends)) or 0.01
    span = [min(ends) - room, max(ends) + room]  # plotly would begin at 0 where traces are side by side
    fig.update_yaxes(title={"text": "validation loss (nats)"}, range=span, tickformat=".4~g")
    return layout(fig, 420, scattermode="group", scattergap=0.3, hovermode="closest")


def _ends(row: Mapping[str, Any]) -> tuple[float, float]:
    """Returns where the bar of a loss ends, from the loss on; twice 0 without an interval."""
    value, low, high = row["minus_all"] or (0.0, 0.0, 0.0)
    return low - value, high - value


def _category(entry: Mapping[str, Any]) -> str:
    numbers = sorted({row["parameters"] for row in entry["rows"] if row["rule"] != ALL})
    shown = " to ".join(dict.fromkeys(f"{number:,.0f}" for number in (numbers[0], numbers[-1])))
    return f"budget {100 * entry['budget']:g} %<br>{shown}"


def _symbol(index: int) -> str:
    """Returns a marker that with its colour is another one for each of eight rules."""
    symbol = line_style(index).symbol
    if index // 4 % 2 == 0:
        return symbol
    return symbol.removesuffix("-open") if symbol.endswith("-open") else f"{symbol}-open"
