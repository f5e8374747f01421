"""The summary figure of several runs: panels for each group."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure, SubFigure

from depthcb.curves import draw_units
from depthcb.report.draw import draw_panel, legend_handles
from depthcb.report.groups import Group, context, groups, headline, label
from depthcb.report.panels import change_panel, has_null, ratio_decades, ratio_panel, shape_panel
from depthcb.report.plain_words import pair_sentence
from depthcb.run import Run
from depthcb.style import literal

_RC: Any = {"axes.titlesize": 10, "lines.linewidth": 1.6, "lines.markersize": 4.5}


def write_png(runs: Sequence[Run], path: str | Path, title: str = "") -> None:
    """Writes `figure` as a PNG.

    Args:
        runs: The runs to plot.
        path: The output file; its folder must exist.
        title: A small title above the figure.
    """
    figure(runs, title).savefig(path, format="png", dpi=150)


def figure(runs: Sequence[Run], title: str = "") -> Figure:
    """Plots for each group of runs each layer's change by each measure and its mean step ratio, and below the nulls."""
    found = [group for group in groups(runs) if group.measures]
    width = 15 + 4 * max((len(_finer(group)) for group in found), default=0)
    heights = [5.1 + 4 * has_null(group) for group in found]
    fig = Figure(figsize=(width, 0.6 + sum(heights) if found else 3), layout="constrained", facecolor="white")
    fig.suptitle(literal(title), fontsize=10, color="#555555")
    if not found:
        names = ", ".join(run.name for run in runs) or "no run was started"
        fig.text(0.5, 0.45, literal(f"No depth profile was measured ({names})."), ha="center", fontsize=13)
        return fig
    fig.set_layout_engine("constrained", w_pad=0.12, h_pad=0.08)
    span = ratio_decades(found)
    subfigures = fig.subfigures(len(found), 1, squeeze=False, height_ratios=heights)[:, 0]
    for sub, group in zip(subfigures, found, strict=True):
        _draw_group(sub, group, span)
    return fig


def _draw_group(sub: SubFigure, group: Group, span: tuple[int, int] | None) -> None:
    texts = [headline(group), *context(group), pair_sentence(group)]
    sub.suptitle(literal("\n".join(line for text in texts for line in textwrap.wrap(text, 170))), fontsize=11)
    finer = _finer(group)
    top = [change_panel(group, measure) for measure in group.measures]
    top += [ratio_panel(group, span)] if len(finer) < len(group.runs) else []
    below = [shape_panel(group, measure) for measure in group.measures] if has_null(group) else []
    grid = sub.subplots(1 + bool(below), len(top) + len(finer), squeeze=False)
    with matplotlib.rc_context(_RC):
        for row, panels in zip(grid, (top, below), strict=False):
            for ax, panel in zip(row, panels, strict=False):
                draw_panel(ax, panel)
    for ax, run in zip(grid[0, len(top) :], finer, strict=True):
        draw_units(ax, run.unit_ratio.grid, f"mean step ratio wanted, {label(run, group)}")
    for ax in grid[1:, len(below) :].ravel():
        ax.remove()
    handles = legend_handles(sub.axes)
    if handles:
        sub.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)


def _finer(group: Group) -> list[Run]:
    """Returns the runs whose step ratios are those of units smaller than layers."""
    return [run for run in group.runs if run.unit_ratio.units]
