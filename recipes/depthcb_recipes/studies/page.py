"""A study's table, claims and page."""

from __future__ import annotations

import html
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
from depthcb_recipes.studies.analysis import Claim, claims

#: The table's columns: title, definition.
PAIR_COLUMNS = {
    "model": "The backbone.",
    "family": "encoder, decoder, state-space or recurrent.",
    "block": "sequential: attention feeds the MLP. parallel: both read the same input. Found by perturbation.",
    "size": "Size class by parameters: small up to 0.6 B, medium up to 2 B, large.",
    "objective": "The objective of the fit.",
    "optimizer": "The optimizer of both runs.",
    "seed": "The seed of both runs: the same new weights, dropout and data order.",
    "slope standard": "Locality gradient of the standard run: change over the whole depth, with its interval.",
    "slope equal-step": "The same under the control.",
    "retained": "Relative slope of the equal-step run / that of the standard run.",
    "verdict": "By relative slope: persists, weakens (below 0.8), collapses (interval contains 0), reverses, or none.",
    "spread": "Largest / smallest step ratio before the control; near 1 it had nothing to remove.",
    "null": "Relative slope of noise of the same size as a share of the run's, standard / equal-step.",
    "agree": "Whether all measures of the standard run agree on the sign of the slope.",
    "width": "Share of the layers over which the standard run's change is spread.",
    "distance": "Objective distance at initialisation: 1 - cos of the gradients of pretraining and of the fit.",
    "loss": "Validation loss at the end, standard / equal-step, nats.",
}


def table_rows(pairs: pd.DataFrame) -> list[list[str]]:
    """Returns one row of text per pair, by `PAIR_COLUMNS`."""
    return [_row(pair) for _, pair in pairs.iterrows()]


def _row(pair: Any) -> list[str]:
    def slope(side: str) -> str:
        interval = (pair[f"slope_low_{side}"], pair[f"slope_high_{side}"])
        return f"{pair[f'slope_{side}']:+.3g}" + ("" if pd.isna(interval[0]) else show_interval(interval))

    def null(side: str) -> str:
        own = pair[f"relative_slope_{side}"]
        return show(pair[f"null_relative_slope_{side}"] / own if own else None, ".0%")

    distance = None if pd.isna(pair["distance"]) else float(pair["distance"])
    return [
        *(str(pair[key]) for key in ("model", "family", "block", "size", "objective", "optimizer", "seed")),
        slope("standard"), slope("equal"), show(pair["retained"], ".0%"), pair["verdict"], show(pair["spread"], ".2f"),
        f"{null('standard')} / {null('equal')}", "yes" if pair["measures_agree"] else "NO",
        show(pair["width"], ".2f"), show(distance, ".2f"), f"{pair['loss_standard']:.3g} / {pair['loss_equal']:.3g}",
    ]  # fmt: skip


def terminal_table(pairs: pd.DataFrame) -> Table:
    """Returns a table that fits a terminal: fewer columns, and slopes without intervals."""
    titles = (
        "model",
        "block",
        "objective",
        "opt.",
        "seed",
        "slope",
        "equal-step",
        "share",
        "verdict",
        "spread",
        "null",
    )
    table = Table(*titles, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for (_, pair), row in zip(pairs.iterrows(), table_rows(pairs), strict=True):
        cells = dict(zip(PAIR_COLUMNS, row, strict=True))
        slopes = [f"{pair[f'slope_{side}']:+.2g}" for side in ("standard", "equal")]
        first = [Path(cells["model"]).name, *(cells[name] for name in ("block", "objective", "optimizer", "seed"))]
        last = [cells[name] for name in ("retained", "verdict", "spread", "null")]
        table.add_row(*map(Text, [*first, *slopes, *last]))
    return table


def claim_lines(claim: Claim) -> list[str]:
    """Returns the lines of a claim: its verdict, the effect with its interval, notes."""
    figures = "" if claim.estimate is None else f" = {claim.estimate:+.3g}"
    figures += "" if claim.interval is None else show_interval(claim.interval)
    return [
        f"{claim.name} {claim.verdict}: {claim.says}",
        f"   {claim.effect}{figures}",
        *(f"   {n}" for n in claim.notes),
    ]


def write_study(runs: pd.DataFrame, pairs: pd.DataFrame, path: str | Path, title: str) -> None:
    """Writes one self-contained page on a study.

    Args:
        runs: One row per run.
        pairs: One row per pair.
        path: The file.
        title: The page's title.
    """
    charts, parts = Charts(), []
    for optimizer, own in runs.groupby("optimizer"):
        cards = "".join(_card(claim) for claim in claims(own))
        parts += [f"<h2>Claims, {html.escape(str(optimizer))}, {len(own)} runs</h2>{cards}"]
    if len(pairs):
        parts += [charts(slopes_chart(pairs), "Relative slope of each pair, standard and equal-step")]
    parts += ["<h2>Pairs</h2>", html_table(list(PAIR_COLUMNS.items()), table_rows(pairs), text=7)]
    data = {"runs": runs.drop(columns="profiles").to_dict("records"), "pairs": pairs.to_dict("records")}
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
    for side, name in (("standard", "null, standard"), ("equal", "null, equal-step")):
        color = line_style(0 if side == "standard" else 1).color
        fig.add_trace(go.Scatter(x=list(pairs[f"null_relative_slope_{side}"]), y=labels, mode="markers", name=name,
                                 marker={"color": color, "symbol": "line-ns-open", "size": 8}))  # fmt: skip
    fig.update_xaxes(title={"text": "relative slope (slope / mean change)"}, zeroline=True)
    fig.update_yaxes(range=[len(pairs) - 0.5, -0.5])  # the first pair on top
    return layout(fig, 160 + 22 * len(pairs))
