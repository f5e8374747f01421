"""Draws panels with matplotlib; sizes of lines and letters are those of the rc parameters in force."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.ticker import FixedLocator, LogFormatterSciNotation, LogLocator, MaxNLocator, NullFormatter

from depthcb.report.panels import Panel, Series
from depthcb.style import PALE, decorate, layer_axis, line_style, literal, mark_unresolved

_DASHES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}


def draw_panel(ax: Axes, panel: Panel) -> None:
    """Draws one panel; its notes stand in the middle if it is empty, else under its title."""
    for series in panel.series:
        if series.shade is None:
            _draw_series(ax, series)
    if any(series.shade is not None for series in panel.series):
        _draw_steps(ax, panel.series)
    decorate(ax)
    notes = [literal(note) for note in panel.notes]
    ax.set_title("\n".join([literal(panel.title), *(notes if panel.series else ())]))
    ax.set_ylabel(literal(panel.y_title))
    if panel.layers:
        layer_axis(ax, panel.layers)
    else:
        ax.set_xlim(-0.02, 1.02)
    ax.set_xlabel(panel.x_title)
    if not panel.series:
        text = "\n".join(line for note in notes for line in textwrap.wrap(note, 32)) or "not measured"
        ax.text(0.5, 0.5, text, ha="center", va="center", transform=ax.transAxes, color="#555555")
        ax.set_yticks([])
    elif panel.decades is None:
        _from_zero(ax)
    else:
        _decades(ax, *panel.decades)


def _draw_series(ax: Axes, series: Series) -> None:
    style = line_style(series.look)
    y = [float("nan") if v is None else v for v in series.y]
    if series.band is not None:
        ax.fill_between(series.x, *series.band, color=style.color, alpha=0.2, linewidth=0)
    if series.dashed:  # offset the dashes, so that nulls that coincide all remain visible
        ax.plot(series.x, y, color=style.color, ls=(5 * series.look, (4, 4)), label=literal(series.name))
        return
    face = "white" if style.symbol.endswith("-open") else style.color
    ax.plot(series.x, y, color=style.color, marker=style.marker, mfc=face, ls=_DASHES[style.dash],
            label=literal(series.name))  # fmt: skip
    mark_unresolved(ax, series.crossed, [v or 0.0 for v in y])


def _draw_steps(ax: Axes, steps: Sequence[Series]) -> None:
    """Draws lines coloured by their steps, with a colour bar."""
    shades = [series.shade or 0 for series in steps]
    scale = Normalize(min(shades), max(max(shades), min(shades) + 1))
    colors = LinearSegmentedColormap.from_list("steps", matplotlib.colormaps["cividis_r"](np.linspace(0.25, 1, 64)))
    for series, shade in zip(steps, shades, strict=True):
        ax.plot(series.x, np.array(series.y, dtype=float), color=colors(float(scale(shade))))
    assert ax.figure is not None
    bar = ax.figure.colorbar(ScalarMappable(scale, colors), ax=ax, label="step", pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_locator(FixedLocator(shades[:1]) if len(shades) == 1 else MaxNLocator(6, integer=True))


def _from_zero(ax: Axes) -> None:
    """Extends a linear axis to slightly below 0, so that a line at 0 is not hidden by the frame."""
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, -0.03 * high), 1.04 * high)


def _decades(ax: Axes, first: int, last: int) -> None:
    """Makes a logarithmic axis of whole decades, with a label at each and ticks at 2 to 9 in between."""
    ax.set_yscale("log")
    ax.set_ylim(10.0**first, 10.0**last)
    every = max(1, (last - first) // 6)  # labels that don't overlap
    ax.yaxis.set_major_locator(FixedLocator([10.0**e for e in range(first, last + 1, every)]))
    ax.yaxis.set_major_formatter(LogFormatterSciNotation())
    ax.yaxis.set_minor_locator(LogLocator(subs=range(2, 10), numticks=100))
    ax.yaxis.set_minor_formatter(NullFormatter())


def share_limits(axes: Sequence[Axes], panels: Sequence[Panel]) -> None:
    """Gives panels that show the same quantity the same y axis, so that their heights can be compared."""
    for quantity in {panel.y_title for panel in panels}:
        same = [ax for ax, panel in zip(axes, panels, strict=False) if panel.y_title == quantity and panel.series]
        limits = [ax.get_ylim() for ax in same]
        for ax in same:
            ax.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))


def legend_handles(axes: Iterable[Axes]) -> dict[str, Any]:
    """Returns one handle for each name in the axes' legends."""
    return {text: h for ax in axes for h, text in zip(*ax.get_legend_handles_labels(), strict=True)}


def draw_study(ax: Axes, panel: Panel) -> None:
    """Draws hollow dots at the relative slopes of each set of pairs, filled ones at means; one row per set."""
    names = list(dict.fromkeys(str(name) for series in panel.series for name in series.x))
    ax.axvline(0, color="#555555", lw=0.6)
    for series in panel.series:
        style = line_style(series.look)
        rows = np.array([names.index(str(name)) for name in series.x]) + 0.24 * (series.look - 1)
        slopes = np.array(series.y, dtype=float)
        if series.band is None:  # each seed
            ax.plot(slopes, rows, style.marker, color=style.color, mfc="white", mew=0.6, ms=2.2)
        else:
            ends = [slopes - np.array(series.band[0]), np.array(series.band[1]) - slopes]
            ax.errorbar(slopes, rows, xerr=ends, color=style.color, fmt=style.marker, zorder=4)
        ax.plot([], [], color=style.color, marker=style.marker, label=literal(series.name.partition(",")[0]))
    decorate(ax)
    ax.set_yticks(range(len(names)), [literal("\n".join(textwrap.wrap(name, 26))) for name in names])
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.plot([], [], "o", color=PALE, mfc="white", mew=0.6, ms=2.2, label="each seed")
    if any(series.band is not None for series in panel.series):
        ax.plot([], [], "o-", color=PALE, label="mean, 95 % interval")
    ax.set_xlabel(literal(panel.y_title))
