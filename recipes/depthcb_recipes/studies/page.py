"""A study's table, claims and page."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from depthcb.report.charts import layout
from depthcb.report.page import Charts, html_page, html_table
from depthcb.style import line_style, show, show_interval
from depthcb_recipes.studies.claims import Claim, claims
from depthcb_recipes.studies.tables import cells_table

#: The columns of the table of pairs: title, definition.
PAIR_COLUMNS = {
    "model": "The backbone.",
    "objective": "The objective of the fit.",
    "optimizer": "The optimizer of both runs.",
    "seed": "The seed of both runs: the same new weights, dropout and data order.",
    "slope standard": "Locality gradient of the standard run: change over the whole depth, with its interval.",
    "slope equal-step": "The same under the control.",
    "difference": "Relative slope of the equal-step run minus that of the standard run, with its paired interval over "
    "halves of the probe. It speaks of the probe's rows, not of training.",
    "share": "Relative slope of the equal-step run / that of the standard run, with the same interval.",
    "null": "Relative slope of random weight changes of the same size, mean and range over the draws: standard run.",
    "matched null": "The same of random weight changes that change the representations as much, mean over the draws.",
    "spread": "Largest / smallest step ratio before the control; near 1 it had nothing to remove.",
    "loss": "Validation loss at the end, standard / equal-step, nats.",
}
#: The columns of the table of cells.
CELL_COLUMNS = {
    "model": "The backbone.",
    "family": "encoder, decoder, state-space or recurrent.",
    "block": "sequential: attention feeds the MLP. parallel: both read the same input. Found by perturbation.",
    "size": "Size class by parameters: small up to 0.6 B, medium up to 2 B, large.",
    "objective": "The objective of the fit.",
    "optimizer": "The optimizer of the runs.",
    "seeds": "Number of standard runs.",
    "relative slope": "Mean relative slope of the standard runs, with its interval over seeds (the variance is pooled "
    "over all cells).",
    "depth-corrected": "The same times (L + 1) / (L - 1), for models of different depth: 2 if change grows evenly.",
    "share left": "Mean relative slope under the control / that of the standard runs; none if the latter is not "
    "distinguishable from 0.",
    "keeps": "Whether more than 0.2 of the slope is left: keeps, does not, or open.",
    "verdict": "Over the seeds, from 4 pairs on: reverses < -0.2 < collapses < 0.2 < weakens < 0.8 < persists < 1.25 < "
    "strengthens, by the whole interval of the share left; emerges; no more than noise; undecided.",
    "null": "Whether the change-matched null explains the slope: it has more than 0.8 of it, over draws and seeds.",
    "worth": "Rank correlation of the layers' change with what it is worth to the loss, mean over the standard runs "
    "that measured it (DepthProfile's worth), with its interval over seeds.",
    "width": "Share of the layers over which the standard runs' change is spread.",
    "distance": "Objective distance at initialisation: 1 - cos of the gradients of pretraining and of the fit, mean "
    "over the seeds, with the mean interval over the batches that it was measured on.",
}


def pair_rows(pairs: pd.DataFrame) -> list[list[str]]:
    """Returns one row of text per pair, by `PAIR_COLUMNS`."""
    return [_pair_row(pair) for _, pair in pairs.iterrows()]


def _pair_row(pair: Any) -> list[str]:
    null = f"{show(pair['null_standard'], '+.2f')}" + _ends(pair, "null", "_standard", " to ")
    return [
        *(str(pair[key]) for key in ("model", "objective", "optimizer", "seed")),
        *(f"{pair[f'slope_{side}']:+.3g}" + _ends(pair, "slope", f"_{side}") for side in ("standard", "equal")),
        show(pair["difference"], "+.3g") + _ends(pair, "difference"),
        show(pair["share"], "+.2f") + _ends(pair, "share"),
        null, show(pair["matched_null_standard"], "+.2f"), show(pair["spread"], ".2f"),
        f"{pair['loss_standard']:.3g} / {pair['loss_equal']:.3g}",
    ]  # fmt: skip


def _ends(row: Any, name: str, side: str = "", between: str = ", ") -> str:
    low, high = row[f"{name}_low{side}"], row[f"{name}_high{side}"]
    return "" if pd.isna(low) else f" [{low:+.3g}{between}{high:+.3g}]"


def cell_rows(cells: pd.DataFrame) -> list[list[str]]:
    """Returns one row of text per cell, by `CELL_COLUMNS`."""
    return [_cell_row(cell) for _, cell in cells.iterrows()]


def _cell_row(cell: Any) -> list[str]:
    corrected = cell["slope"] * (cell["layers"] + 1) / (cell["layers"] - 1)
    return [
        *(str(cell[key]) for key in ("model", "family", "block", "size", "objective", "optimizer", "seeds")),
        show(cell["slope"], "+.2f") + _ends(cell, "slope"), show(corrected, "+.2f"), show(cell["share"], "+.2f"),
        cell["keeps"], cell["word"], cell["null_word"], show(cell["worth"], "+.2f") + _ends(cell, "worth"),
        show(cell["width"], ".2f"),
        show(cell["distance"], ".2f") + _ends(cell, "distance"),
    ]  # fmt: skip


def all_cells(runs: pd.DataFrame) -> pd.DataFrame:
    """Returns the cells of all optimizers, one after another."""
    tables = [cells_table(own).assign(optimizer=optimizer) for optimizer, own in runs.groupby("optimizer", sort=False)]
    return pd.concat(tables, ignore_index=True)


def terminal_table(runs: pd.DataFrame) -> Table:
    """Returns a table of the cells that fits a terminal: fewer columns."""
    kept = (
        "model",
        "block",
        "objective",
        "optimizer",
        "seeds",
        "relative slope",
        "share left",
        "keeps",
        "verdict",
        "null",
    )
    table = Table(*kept, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for row in cell_rows(all_cells(runs)):
        cells = dict(zip(CELL_COLUMNS, row, strict=True))
        table.add_row(*(Text(Path(cells[name]).name if name == "model" else cells[name]) for name in kept))
    return table


def claim_lines(claim: Claim) -> list[str]:
    """Returns the lines of a claim: its verdict, the effect with its interval and p-value, notes."""
    figures = "" if claim.estimate is None else f" = {claim.estimate:+.3g}"
    figures += "" if claim.interval is None else show_interval(claim.interval)
    figures += "" if claim.p is None else f", p = {claim.p:.3g} ({show(claim.holm)} Holm-corrected)"
    return [
        f"{claim.name} {claim.verdict}: {claim.says}",
        f"   {claim.effect}{figures}",
        *(f"   {n}" for n in claim.notes),
    ]


def write_study(
    runs: pd.DataFrame, pairs: pd.DataFrame, path: str | Path, title: str, notes: Sequence[str] = ()
) -> None:
    """Writes one self-contained page on a study.

    Args:
        runs: One row per run.
        pairs: One row per pair.
        path: The file.
        title: The page's title.
        notes: Lines at its top, such as which measure decided.
    """
    charts, parts = Charts(), [f"<p>{html.escape(note)}</p>" for note in notes]
    for optimizer, own in runs.groupby("optimizer"):
        cards = "".join(_card(claim) for claim in claims(own))
        parts += [f"<h2>Claims, {html.escape(str(optimizer))}, {len(own)} runs</h2>{cards}"]
    if len(pairs):
        parts += [charts(slopes_chart(pairs), "Relative slope of each pair, standard and equal-step")]
    cells = all_cells(runs)
    parts += ["<h2>Cells</h2>", html_table(list(CELL_COLUMNS.items()), cell_rows(cells), text=6)]
    parts += ["<h2>Pairs</h2>", html_table(list(PAIR_COLUMNS.items()), pair_rows(pairs), text=4)]
    data = {
        "runs": runs.drop(columns="profiles").to_dict("records"),
        "pairs": pairs.to_dict("records"),
        "cells": cells.to_dict("records"),
    }
    html_page(title, parts, data, "depthcb-study", path)


def _card(claim: Claim) -> str:
    first, *rest = claim_lines(claim)
    items = "".join(f"<li>{html.escape(line.strip())}</li>" for line in rest)
    return f'<div class="verdict"><h3>{html.escape(first)}</h3><ul>{items}</ul></div>'


def slopes_chart(pairs: pd.DataFrame) -> go.Figure:
    """Draws one line per pair, with the relative slopes of its two runs and of their nulls."""
    labels = [f"{p['model']} · {p['objective']} · {p['optimizer']} · {p['seed']}" for _, p in pairs.iterrows()]
    fig = go.Figure()
    for index, (side, name) in enumerate((("standard", "standard"), ("equal", "equal-step"))):
        style = line_style(index)
        fig.add_trace(go.Scatter(x=list(pairs[f"relative_slope_{side}"]), y=labels, mode="markers", name=name,
                                 marker={"color": style.color, "symbol": style.symbol, "size": 8}))  # fmt: skip
    for side, name in (("standard", "change-matched null, standard"), ("equal", "change-matched null, equal-step")):
        color = line_style(0 if side == "standard" else 1).color
        fig.add_trace(go.Scatter(x=list(pairs[f"matched_null_{side}"]), y=labels, mode="markers", name=name,
                                 marker={"color": color, "symbol": "line-ns-open", "size": 8}))  # fmt: skip
    fig.update_xaxes(title={"text": "relative slope (slope / mean change)"}, zeroline=True)
    fig.update_yaxes(range=[len(pairs) - 0.5, -0.5])  # the first pair on top
    return layout(fig, 160 + 22 * len(pairs))
