"""The figure: one row of panels per optimizer."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from depthcb.report.summary import (
    MEASURES,
    RATIO_UNIT,
    STYLES,
    UNITS,
    Arm,
    Pair,
    Summary,
    context,
    headline,
    log_axis,
    read_pairs,
    tick_step,
)


def write_png(summary: Summary, path: str | Path) -> None:
    """Writes `figure` as a PNG.

    Args:
        summary: What the demo writes to ``summary.json``.
        path: The file; its folder must exist.
    """
    figure(summary).savefig(path, format="png", dpi=150)


def figure(summary: Summary) -> Figure:
    """One row of panels per optimizer: change, normalised change and step ratio of each layer under both arms."""
    pairs = read_pairs(summary)
    rows = pairs if any(pair.measured for pair in pairs) else []
    fig = Figure(figsize=(15, 0.6 + 5.1 * len(rows) if rows else 3), layout="constrained", facecolor="white")
    origin = (summary.get("backbone"), f"depthcb {summary.get('depthcb')}", summary.get("created"))
    fig.suptitle(_plain(" · ".join(str(o) for o in origin)), fontsize=10, color="#555555")
    if not rows:
        names = ", ".join(str(a.get("name")) for a in summary.get("arms") or ()) or "no arm was started"
        fig.text(0.5, 0.45, _plain(f"No depth profile was measured ({names})."), ha="center", fontsize=13)
        return fig
    fig.set_layout_engine("constrained", w_pad=0.12, h_pad=0.08)
    subfigures = fig.subfigures(len(rows), 1, squeeze=False)[:, 0]
    for sub, pair in zip(subfigures, rows, strict=True):
        _draw_pair(sub, pair, len(summary["layers"]))
    return fig


def _draw_pair(sub: SubFigure, pair: Pair, layers: int) -> None:
    lines = [line for text in context(pair) for line in textwrap.wrap(text, 170)]
    sub.suptitle(_plain("\n".join([headline(pair), *lines])), fontsize=11)
    axes = sub.subplots(1, 3)
    for ax, measure in zip(axes, MEASURES, strict=False):
        _draw_change(ax, pair, measure)
    _draw_ratio(axes[2], pair)
    for ax in axes:
        _finish(ax, layers)
    handles = {label: h for ax in axes for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    if handles:
        sub.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)


def _draw_change(ax: Axes, pair: Pair, measure: str) -> None:
    absent = []
    for arm in pair.arms:
        last, null, style = arm.last(measure), arm.null_change(measure), STYLES[arm.control]
        if last is None:
            absent.append(arm.name)
            continue
        x = range(len(last.change))
        if last.band is not None:
            ax.fill_between(x, *last.band, color=style.color, alpha=0.2, linewidth=0)
        _draw_arm(ax, last.change, arm)
        if null:
            dashes = (style.dash_offset, (5, 5))
            ax.plot(x, null, color=style.color, lw=1, ls=dashes, label=f"null of {arm.name} (random directions)")
    _name(ax, f"{MEASURES[measure]} per layer, with 95 % band", UNITS[measure], absent)
    _from_zero(ax)


def _draw_ratio(ax: Axes, pair: Pair) -> None:
    for arm in pair.arms:
        if arm.step_ratio:
            _draw_arm(ax, arm.step_ratio, arm)
    _name(ax, "mean step ratio per layer", RATIO_UNIT, [arm.name for arm in pair.arms if not arm.step_ratio])
    if not log_axis(pair.arms):
        _from_zero(ax)
        return
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if high < 40 * low else (1, 3), numticks=20))
    ax.yaxis.set_minor_locator(NullLocator())


def _draw_arm(ax: Axes, values: Sequence[float], arm: Arm) -> None:
    style = STYLES[arm.control]
    face = style.color if style.marker == "o" else "white"
    ax.plot(
        range(len(values)), values, color=style.color, marker=style.marker, ms=4.5, mfc=face, lw=1.6, label=arm.label
    )


def _name(ax: Axes, title: str, unit: str, absent: Sequence[str]) -> None:
    ax.set_title(title + "".join(f"\n{name}: not measured" for name in absent), fontsize=10)
    ax.set_ylabel(unit)


def _from_zero(ax: Axes) -> None:
    """A linear axis that shows 0, and a little below it so that a line at 0 is not hidden by the frame."""
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, -0.03 * high), 1.04 * high)


def _finish(ax: Axes, layers: int) -> None:
    ax.set_xlim(-0.5, layers - 0.5)
    ax.set_xticks(range(0, layers, tick_step(layers)))
    ax.set_xlabel("layer  (0 = input side)")
    ax.yaxis.set_major_formatter(FuncFormatter(_tick_text))  # matplotlib's own puts a factor above the axis
    ax.grid(color="#dddddd", lw=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    if not ax.lines:
        ax.set_yticks([])


def _tick_text(value: float, _: int | None) -> str:
    if abs(value) >= 1e-3 or value == 0:
        return f"{value:.4g}"
    digits, exponent = f"{value:.3e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def _plain(text: str) -> str:
    """Text in which matplotlib finds no formula."""
    return text.replace("$", r"\$")
