"""The summary figure of several runs: one row of panels per group."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import LogLocator, NullLocator

from depthcb.curves import draw_units
from depthcb.glossary import RATIO_UNIT
from depthcb.report.groups import (
    Group,
    context,
    groups,
    headline,
    label,
    last,
    log_axis,
    null_change,
    title_of,
    unit_of,
)
from depthcb.run import Run
from depthcb.style import decorate, layer_axis, line_style, literal, mark_unresolved


def write_png(runs: Sequence[Run], path: str | Path, title: str = "") -> None:
    """Writes `figure` as a PNG.

    Args:
        runs: The runs to plot.
        path: The output file; its folder must exist.
        title: A small title above the figure.
    """
    figure(runs, title).savefig(path, format="png", dpi=150)


def figure(runs: Sequence[Run], title: str = "") -> Figure:
    """Plots one row of panels per group of runs: each layer's change by each measure, and its mean step ratio."""
    found = [group for group in groups(runs) if group.measures]
    width = 15 + 4 * max((len(_finer(group)) for group in found), default=0)
    fig = Figure(figsize=(width, 0.6 + 5.1 * len(found) if found else 3), layout="constrained", facecolor="white")
    fig.suptitle(literal(title), fontsize=10, color="#555555")
    if not found:
        names = ", ".join(run.name for run in runs) or "no run was started"
        fig.text(0.5, 0.45, literal(f"No depth profile was measured ({names})."), ha="center", fontsize=13)
        return fig
    fig.set_layout_engine("constrained", w_pad=0.12, h_pad=0.08)
    subfigures = fig.subfigures(len(found), 1, squeeze=False)[:, 0]
    for sub, group in zip(subfigures, found, strict=True):
        _draw_group(sub, group)
    return fig


def _draw_group(sub: SubFigure, group: Group) -> None:
    lines = [line for text in [headline(group), *context(group)] for line in textwrap.wrap(text, 170)]
    sub.suptitle(literal("\n".join(lines)), fontsize=11)
    finer = _finer(group)
    by_layer = len(finer) < len(group.runs)
    drawn = len(group.measures) + by_layer
    axes, heatmaps = np.split(sub.subplots(1, drawn + len(finer)), [drawn])
    for ax, measure in zip(axes, group.measures, strict=False):
        _draw_change(ax, group, measure)
    if by_layer:
        _draw_ratio(axes[-1], group)
    for ax, run in zip(heatmaps, finer, strict=True):
        draw_units(ax, run.unit_ratio.grid, f"mean step ratio wanted, {label(run, group)}")
    for ax in axes:
        layer_axis(ax, len(group.layers))
        decorate(ax)
        if not ax.lines:
            ax.set_yticks([])
    handles = {text: h for ax in axes for h, text in zip(*ax.get_legend_handles_labels(), strict=True)}
    if handles:
        sub.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)


def _finer(group: Group) -> list[Run]:
    """Returns the runs whose step ratios are those of units smaller than layers."""
    return [run for run in group.runs if run.unit_ratio.units]


def _draw_change(ax: Axes, group: Group, measure: str) -> None:
    absent = []
    for i, run in enumerate(group.runs):
        profile, null, color = last(run, measure), null_change(run, measure), line_style(i).color
        if profile is None:
            absent.append(label(run, group))
            continue
        x = range(len(profile.change))
        if profile.band is not None:
            ax.fill_between(x, *profile.band, color=color, alpha=0.2, linewidth=0)
        _draw_run(ax, profile.change, i, label(run, group))
        mark_unresolved(ax, profile.unresolved, profile.change)
        if null:  # offset the dashes, so that nulls that coincide (often at 0) all remain visible
            dashes = (5 * i, (5, 5))
            name = literal(f"null of {label(run, group)} (random directions)")
            ax.plot(x, null, color=color, lw=1, ls=dashes, label=name)
    _name(ax, f"{title_of(group, measure)} per layer, with 95 % band", unit_of(group, measure), absent)
    _from_zero(ax)


def _draw_ratio(ax: Axes, group: Group) -> None:
    for i, run in enumerate(group.runs):
        if run.layer_ratio.mean:
            _draw_run(ax, run.layer_ratio.mean, i, label(run, group))
    absent = [label(run, group) for run in group.runs if not run.step_ratio.mean]
    _name(ax, "mean step ratio per layer", RATIO_UNIT, absent)
    if not log_axis(*(run.layer_ratio.mean for run in group.runs)):
        _from_zero(ax)
        return
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if high < 40 * low else (1, 3), numticks=20))
    ax.yaxis.set_minor_locator(NullLocator())


def _draw_run(ax: Axes, values: Sequence[float | None], index: int, name: str) -> None:
    style, name = line_style(index), literal(name)
    face = "white" if style.symbol.endswith("-open") else style.color
    y = [float("nan") if v is None else v for v in values]
    dash = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}[style.dash]
    ax.plot(range(len(y)), y, color=style.color, marker=style.marker, ms=4.5, mfc=face, lw=1.6, ls=dash, label=name)


def _name(ax: Axes, title: str, unit: str, absent: Sequence[str]) -> None:
    ax.set_title(literal(title + "".join(f"\n{name}: not measured" for name in absent)), fontsize=10)
    ax.set_ylabel(literal(unit))


def _from_zero(ax: Axes) -> None:
    """Extends a linear axis to slightly below 0, so that a line at 0 is not hidden by the frame."""
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, -0.03 * high), 1.04 * high)
