"""What people look at after a run: a figure, one page that needs no network, and tables in the terminal.

All three are drawn from one JSON-able ``summary`` of up to four arms (optimizer x control). Reading it and wording the
verdict happen once, at the top of this file, so that the three never tell different stories. An arm that was
interrupted before its first validation is named as not measured and never drawn.
"""

from __future__ import annotations

import html
import json
import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import plotly.io
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from plotly.subplots import make_subplots
from rich.console import Console
from rich.table import Table
from rich.text import Text

from depthcb.profile import Profile

Summary = Mapping[str, Any]
Values = Sequence[float | None]

#: A layer whose effective rank is lower than this has a change that rests on a handful of directions [ours].
LOW_RANK = 5.0
#: Step ratios whose largest is more than this many times their smallest get a log axis.
LOG_ABOVE = 3.0
MISSING = "\N{EN DASH}"

_MEASURES = {"cka": "change", "cka_normalized": "normalised change"}
_UNITS = {"cka": "1 - CKA  (0 = unchanged)", "cka_normalized": "1 - CKA, rows normalised"}
_RATIO_UNIT = "‖ΔW‖ / ‖W‖ per step"
_OPTIMIZERS = {"adamw": "AdamW", "adam": "Adam", "sgd": "SGD", "muon": "Muon"}
_MEANINGS = {
    "none": "The standard run shows no slope that could be explained.",
    "collapses": "With equal steps in every layer the slope is not told from 0.",
    "reverses": "With equal steps in every layer the slope has the opposite sign.",
    "weakens": "With equal steps in every layer part of the slope remains.",
    "persists": "With equal steps in every layer the slope stays.",
}


# ---------------------------------------------------------------- reading the summary


@dataclass(frozen=True)
class _Arm:
    """One run; an arm that the summary lacks is one with nothing in it."""

    control: str
    finished: bool = False
    profiles: Mapping[str, tuple[Profile, ...]] = field(default_factory=dict)
    null: Mapping[str, tuple[Profile, ...]] = field(default_factory=dict)
    step_ratio: tuple[float, ...] = ()
    wanted_ratio: tuple[float, ...] = ()
    val_loss: tuple[tuple[float, float], ...] = ()

    @classmethod
    def read(cls, control: str, fields: Summary) -> _Arm:
        def profiles(key: str) -> dict[str, tuple[Profile, ...]]:
            return {m: tuple(map(Profile.from_dict, rows)) for m, rows in (fields.get(key) or {}).items()}

        return cls(
            control=control,
            finished=bool(fields.get("finished")),
            profiles=profiles("profiles"),
            null=profiles("null"),
            step_ratio=_floats(fields.get("step_ratio")),
            wanted_ratio=_floats(fields.get("wanted_ratio")),
            val_loss=tuple((float(step), _float(loss)) for step, loss in fields.get("val_loss") or ()),
        )

    @property
    def name(self) -> str:
        return self.control.replace("_", "-")

    @property
    def label(self) -> str:
        """The name, and how far the run came if it did not finish."""
        steps = [p.step for profiles in self.profiles.values() for p in profiles]
        return self.name if self.finished or not steps else f"{self.name} (interrupted, last at step {max(steps)})"

    def last(self, measure: str) -> Profile | None:
        profiles = self.profiles.get(measure)
        return profiles[-1] if profiles else None

    def null_change(self, measure: str) -> tuple[float, ...]:
        """Mean change of each layer over the null's seeds; empty without a null."""
        seeds = self.null.get(measure)
        return tuple(np.mean([p.change for p in seeds], axis=0).tolist()) if seeds else ()

    def null_relative_slope(self, measure: str) -> float | None:
        """Mean relative slope over the null's seeds."""
        slopes = [p.relative_slope for p in self.null.get(measure, ())]
        known = [s for s in slopes if s is not None]
        return float(np.mean(known)) if known else None


@dataclass(frozen=True)
class _Pair:
    """The standard and the equal-step arm of one optimizer, and what they say together."""

    optimizer: str
    arms: tuple[_Arm, _Arm]
    verdict: Summary | None

    @property
    def title(self) -> str:
        return _OPTIMIZERS.get(self.optimizer, self.optimizer)

    @property
    def measured(self) -> bool:
        return any(arm.last(m) for arm in self.arms for m in _MEASURES)

    def null_slope(self, arm: _Arm) -> float | None:
        """The null's relative slope as the verdict gives it, else from the arm's own null profiles."""
        given = ((self.verdict or {}).get("null_relative_slope") or {}).get(arm.control)
        return arm.null_relative_slope("cka") if given is None else float(given)


def _pairs(summary: Summary) -> list[_Pair]:
    arms = {(a["optimizer"], a["control"]): a for a in summary.get("arms") or ()}
    verdicts = {v["optimizer"]: v for v in summary.get("verdicts") or ()}

    def arm(optimizer: str, control: str) -> _Arm:
        return _Arm.read(control, arms.get((optimizer, control), {}))

    optimizers = dict.fromkeys(optimizer for optimizer, _ in arms)
    return [_Pair(o, (arm(o, "standard"), arm(o, "equal_step")), verdicts.get(o)) for o in optimizers]


def _float(value: Any) -> float:
    return math.nan if value is None else float(value)


def _floats(values: Iterable[Any] | None) -> tuple[float, ...]:
    return tuple(_float(v) for v in values or ())


def _at(values: Sequence[float] | None, index: int) -> float | None:
    return None if values is None or index >= len(values) else _float(values[index])


# ---------------------------------------------------------------- wording


def _number(value: float | None, form: str = ".3g") -> str:
    return MISSING if value is None or math.isnan(value) else format(value, form)


def _interval(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" [{interval[0]:+.3g}, {interval[1]:+.3g}]"


def _headline(pair: _Pair) -> str:
    if pair.verdict is None:
        absent = [arm.name for arm in pair.arms if arm.last("cka") is None]
        why = f"{' and '.join(absent)} not measured" if absent else "none was given"
        return f"{pair.title}: no verdict ({why})"
    spread = pair.verdict.get("spread")
    removed = f"a step-ratio spread of {spread:.3g}x" if spread is not None else "an unknown step-ratio spread"
    return f"{pair.title}: {pair.verdict['verdict']}; the control removed {removed}"


def _context(pair: _Pair) -> list[str]:
    """What must stand beside the verdict: its reason, whether the measures agree, and the null."""
    if pair.verdict is None:
        return []
    agree = "agree" if pair.verdict.get("measures_agree") else "DISAGREE"
    nulls = ", ".join(f"{arm.name} {_null(pair, arm)}" for arm in pair.arms)
    return [
        str(pair.verdict.get("reason", "")),
        f"plain and normalised change {agree} on the sign of the slope",
        f"relative slope of the null: {nulls}",
    ]


def _null(pair: _Pair, arm: _Arm) -> str:
    """The null's relative slope, and how much of the measured one random directions would give too."""
    null, last = pair.null_slope(arm), arm.last("cka")
    measured = last.relative_slope if last else None
    share = f" ({null / measured:.0%} of the run's)" if null is not None and measured else ""
    return _number(null, "+.3g") + share


def _arm_line(pair: _Pair, arm: _Arm) -> str:
    p = arm.last("cka")
    if p is None:
        return f"{arm.name}: {MISSING} not measured"
    return (
        f"{arm.label}: slope {p.slope:+.3g}{_interval(p.slope_interval)}, "
        f"relative slope {_number(p.relative_slope, '+.3g')}{_interval(p.relative_slope_interval)}, "
        f"width {_number(p.width, '.2f')}, null relative slope {_number(pair.null_slope(arm), '+.3g')}"
    )


def _rank(value: float | None) -> str:
    return _number(value) + (" !" if value is not None and value < LOW_RANK else "")


def _tick_step(layers: int, ticks: int = 12) -> int:
    """Distance between labelled layers, so that at most about ``ticks`` labels share the axis."""
    steps: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, *range(10, layers + 20, 5))
    return next(step for step in steps if layers <= ticks * step)


def _log_axis(arms: Iterable[_Arm], *more: Sequence[float]) -> bool:
    """Whether step ratios span enough for a log axis; a ratio of 0 (a frozen layer) has no place on one."""
    ratios = [r for values in (*(arm.step_ratio for arm in arms), *more) for r in values if math.isfinite(r)]
    return bool(ratios) and min(ratios) > 0 and max(ratios) > LOG_ABOVE * min(ratios)


# ---------------------------------------------------------------- the figure


@dataclass(frozen=True)
class _Style:
    """How an arm looks everywhere. Okabe-Ito blue and vermillion: 3:1 or better on white and on near-black."""

    color: str
    marker: str
    symbol: str
    dash_offset: float


# The offset makes the dashes of two nulls that coincide (often at 0) alternate, so that both stay visible.
_STYLES = {"standard": _Style("#0072B2", "o", "circle", 0), "equal_step": _Style("#D55E00", "s", "square-open", 5)}


def write_png(summary: Summary, path: str | Path) -> None:
    """Writes `figure` as a PNG.

    Args:
        summary: What the demo writes to ``summary.json``.
        path: The file; its folder must exist.
    """
    figure(summary).savefig(path, format="png", dpi=150)


def figure(summary: Summary) -> Figure:
    """One row of panels per optimizer: change, normalised change and step ratio of each layer under both arms."""
    pairs = _pairs(summary)
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


def _draw_pair(sub: SubFigure, pair: _Pair, layers: int) -> None:
    lines = [line for text in _context(pair) for line in textwrap.wrap(text, 170)]
    sub.suptitle(_plain("\n".join([_headline(pair), *lines])), fontsize=11)
    axes = sub.subplots(1, 3)
    for ax, measure in zip(axes, _MEASURES, strict=False):
        _draw_change(ax, pair, measure)
    _draw_ratio(axes[2], pair)
    for ax in axes:
        _finish(ax, layers)
    handles = {label: h for ax in axes for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    if handles:
        sub.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)


def _draw_change(ax: Axes, pair: _Pair, measure: str) -> None:
    absent = []
    for arm in pair.arms:
        last, null, style = arm.last(measure), arm.null_change(measure), _STYLES[arm.control]
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
    _name(ax, f"{_MEASURES[measure]} per layer, with 95 % band", _UNITS[measure], absent)
    _from_zero(ax)


def _draw_ratio(ax: Axes, pair: _Pair) -> None:
    for arm in pair.arms:
        if arm.step_ratio:
            _draw_arm(ax, arm.step_ratio, arm)
    _name(ax, "mean step ratio per layer", _RATIO_UNIT, [arm.name for arm in pair.arms if not arm.step_ratio])
    if not _log_axis(pair.arms):
        _from_zero(ax)
        return
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if high < 40 * low else (1, 3), numticks=20))
    ax.yaxis.set_minor_locator(NullLocator())


def _draw_arm(ax: Axes, values: Sequence[float], arm: _Arm) -> None:
    style = _STYLES[arm.control]
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
    ax.set_xticks(range(0, layers, _tick_step(layers)))
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


# ---------------------------------------------------------------- the page's charts

_CONFIG = {
    "displaylogo": False,
    "showSendToCloud": False,
    "responsive": True,
    "modeBarButtonsToRemove": ["select2d", "lasso2d", "autoScale2d"],
}
# The page's style sheet colours text and grids by light or dark mode. These greys remain for exported pictures.
_GREY = "#767676"


def _layout(fig: go.Figure, height: int, **more: Any) -> go.Figure:
    fig.update_layout(
        template="none",
        height=height,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        modebar={"bgcolor": "rgba(0,0,0,0)"},
        font={"color": _GREY, "family": "system-ui, sans-serif", "size": 13},
        hoverlabel={"bgcolor": "#222222", "bordercolor": _GREY, "font": {"color": "#ffffff"}},
        margin={"l": 75, "r": 20, "t": 45, "b": 50},
        legend={"orientation": "h", "y": 1.12, "yanchor": "bottom", "x": 0},
        **more,
    )
    fig.update_annotations(font={"size": 14})
    fig.update_xaxes(gridcolor=_GREY, zeroline=False, automargin=True)
    fig.update_yaxes(gridcolor=_GREY, zeroline=False, automargin=True, exponentformat="e")
    return fig


def _layer_axis(layers: Sequence[str]) -> dict[str, Any]:
    ticks = {"tick0": 0, "dtick": _tick_step(len(layers)), "range": [-0.5, len(layers) - 0.5]}
    return {"title": {"text": "layer (0 = input side)"}, **ticks}


def _line(values: Values, arm: _Arm, layers: Sequence[str], **more: Any) -> go.Scatter:
    style = _STYLES[arm.control]
    trace = {
        "x": list(range(len(layers))),
        "y": list(values),
        "customdata": [html.escape(name) for name in layers],
        "name": arm.label,
        "legendgroup": arm.control,
        "mode": "lines+markers",
        "line": {"color": style.color, "width": 2},
        "marker": {"symbol": style.symbol, "size": 7},
        "hovertemplate": "%{y:.4g} (%{customdata})",
    }
    return go.Scatter(trace | more)


def _profile_chart(pair: _Pair, layers: Sequence[str]) -> go.Figure:
    """Both measures side by side, with a slider over the validations of either arm."""
    steps = sorted({p.step for arm in pair.arms for profiles in arm.profiles.values() for p in profiles})
    drawn = [(m, arm) for m in _MEASURES for arm in pair.arms if arm.last(m)]
    fig = make_subplots(1, 2, subplot_titles=list(_MEASURES.values()), horizontal_spacing=0.1)
    for measure, arm in drawn:
        col = 1 + list(_MEASURES).index(measure)
        for trace in _profile_traces(measure, arm, steps[-1], layers):
            trace.showlegend = bool(trace.showlegend) and (col == 1 or ("cka", arm) not in drawn)
            fig.add_trace(trace, 1, col)
    ys = [[y for measure, arm in drawn for y in _profile_ys(measure, arm, step, len(layers))] for step in steps]
    slider_steps = [
        {"method": "restyle", "label": str(step), "args": [{"y": y}]} for step, y in zip(steps, ys, strict=True)
    ]
    slider = {
        "active": len(steps) - 1,
        "currentvalue": {"prefix": "validation at step "},
        "pad": {"t": 60},
        "steps": slider_steps,
    }
    fig.update_xaxes(_layer_axis(layers))
    fig.update_yaxes(rangemode="tozero")
    for col, measure in enumerate(_MEASURES, start=1):
        fig.update_yaxes(title={"text": _UNITS[measure]}, row=1, col=col)
    return _layout(fig, 540, sliders=[slider], hovermode="x unified")


def _profile_traces(measure: str, arm: _Arm, step: int, layers: Sequence[str]) -> list[go.Scatter]:
    band, change, null = _profile_ys(measure, arm, step, len(layers))
    x = list(range(len(layers)))
    color = _STYLES[arm.control].color
    dashed = {"color": color, "width": 1.2, "dash": "dash"}
    filled: dict[str, Any] = {"x": x + x[::-1], "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
    filled |= {"fill": "toself", "fillcolor": _rgba(color, 0.22), "hovertemplate": None, "customdata": None}
    return [
        _line(band, arm, layers, showlegend=False, **filled),
        _line(change, arm, layers, showlegend=True),
        _line(null, arm, layers, showlegend=True, mode="lines", line=dashed, name=f"null of {arm.name}, end of fit"),
    ]


def _profile_ys(measure: str, arm: _Arm, step: int, layers: int) -> list[Values]:
    """Band, change and null at a step; nothing where the arm was not measured. The null belongs to the last one."""
    nothing: Values = [None] * layers
    profile = {p.step: p for p in arm.profiles[measure]}.get(step)
    if profile is None:
        return [[None] * 2 * layers, nothing, nothing]
    band = [None] * 2 * layers if profile.band is None else [*profile.band[0], *reversed(profile.band[1])]
    null = arm.null_change(measure) if profile == arm.last(measure) else ()
    return [band, profile.change, null or nothing]


def _rgba(color: str, alpha: float) -> str:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def _heatmaps(pair: _Pair, layers: Sequence[str]) -> go.Figure:
    """Layer x validation, a row per measure and a column per arm; the arms of a measure share their colours."""
    cells = [(m, arm) for m in _MEASURES for arm in pair.arms]
    titles = [f"{_MEASURES[m]}, {arm.label if arm.last(m) else arm.name + ': not measured'}" for m, arm in cells]
    fig = make_subplots(2, 2, subplot_titles=titles, horizontal_spacing=0.1, vertical_spacing=0.2)
    for i, (measure, arm) in enumerate(cells):
        if arm.last(measure) is None:
            continue
        profiles = list({p.step: p for p in arm.profiles[measure]}.values())
        trace = go.Heatmap(
            x=[str(p.step) for p in profiles],
            y=list(range(len(layers))),
            z=[list(row) for row in zip(*(p.change for p in profiles), strict=True)],
            customdata=[[html.escape(name)] * len(profiles) for name in layers],
            hovertemplate="%{customdata}<br>step %{x}: %{z:.4g}<extra></extra>",
            coloraxis=("coloraxis", "coloraxis2")[i // 2],
        )
        fig.add_trace(trace, 1 + i // 2, 1 + i % 2)
    bar = {"len": 0.42, "thickness": 12, "exponentformat": "e", "outlinewidth": 0}
    colors = {"colorscale": "Cividis", "cmin": 0}
    fig.update_xaxes(type="category", title={"text": "validation at step"}, nticks=12, showgrid=False)
    fig.update_yaxes(title={"text": "layer"}, tick0=0, dtick=2 * _tick_step(len(layers)), showgrid=False)
    return _layout(
        fig, 640, coloraxis=colors | {"colorbar": bar | {"y": 0.8}}, coloraxis2=colors | {"colorbar": bar | {"y": 0.2}}
    )


def _training_chart(pair: _Pair, layers: Sequence[str]) -> go.Figure:
    """Mean step ratio per layer, with what the optimizer wanted before the control, and the validation loss."""
    fig = make_subplots(1, 2, subplot_titles=["mean step ratio per layer", "validation loss"], horizontal_spacing=0.1)
    for arm in pair.arms:
        if arm.step_ratio:
            fig.add_trace(_line(arm.step_ratio, arm, layers, name=arm.name), 1, 1)
        if arm.wanted_ratio and arm.wanted_ratio != arm.step_ratio:
            dotted = {"color": _STYLES[arm.control].color, "width": 1.5, "dash": "dot"}
            wanted = {"name": f"wanted by the optimizer in the {arm.name} run", "mode": "lines", "line": dotted}
            fig.add_trace(_line(arm.wanted_ratio, arm, layers, **wanted), 1, 1)
        steps, losses = [s for s, _ in arm.val_loss], [loss for _, loss in arm.val_loss]
        more = {"x": steps, "customdata": None, "hovertemplate": "%{y:.4g}", "showlegend": not arm.step_ratio}
        if steps:
            fig.add_trace(_line(losses, arm, layers, name=arm.name, **more), 1, 2)
    log = _log_axis(pair.arms, *(arm.wanted_ratio for arm in pair.arms))
    fig.update_xaxes(_layer_axis(layers), row=1, col=1)
    fig.update_xaxes(title={"text": "step"}, row=1, col=2)
    axis: dict[str, Any] = {"type": "log", "dtick": "D2"} if log else {"rangemode": "tozero"}
    fig.update_yaxes(title={"text": _RATIO_UNIT}, row=1, col=1, **axis)
    fig.update_yaxes(title={"text": "loss"}, row=1, col=2)
    return _layout(fig, 430, hovermode="x unified")


# ---------------------------------------------------------------- the page

_HALVES = "over random halves of the probe: it covers which rows the probe happened to hold, not training seeds."
_DEFINITIONS = {
    "layer": "Position in the stack, 0 at the input side, and the module's name.",
    "change": "1 - linear CKA of the layer's activations on the probe, pretrained model against now. 0 is unchanged, "
    "about 1 unrelated. No unit.",
    "normalised change": "The change after every row is centred and scaled to length 1, so that one large direction "
    "cannot rule it. No unit.",
    "step ratio": "Length of the optimizer's step over the length of the layer's weights, mean over the fit. No unit.",
    "effective rank": "How many directions of the layer's activations CKA really sees. Below 5 (marked !) its change "
    "rests on a handful of them. Unit: directions.",
    "arm": "Optimizer and control of the run.",
    "measure": "Plain or normalised change, at the last validation.",
    "slope": "Least-squares slope of change on relative depth. Unit: change per whole depth, input to output side.",
    "95 % interval": f"Of the slope, {_HALVES}",
    "relative slope": "Slope over mean change. Unit: mean changes per whole depth.",
    "95 % interval, relative": f"Of the relative slope, {_HALVES}",
    "Spearman": "Rank correlation of change with depth, from -1 to 1.",
    "centre": "Centre of mass of the change in relative depth: 0 is the input side, 1 the output side.",
    "width": "How many layers share the change: 1 if all do alike, 1/L if a single one of L does.",
    "null relative slope": "Relative slope after random noise of the same size was added to the pretrained weights "
    "instead of training, mean over seeds. A run with no more slope than this shows nothing about training.",
}
# No request can leave the page, whatever a script in it may try; plotly needs inline scripts, styles and data images.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
_STYLE = """
:root { color-scheme: light dark; --back: #ffffff; --ink: #1b1b1b; --soft: #595959; --line: #d9d9d9; --card: #f5f5f5; }
@media (prefers-color-scheme: dark) {
  :root { --back: #111111; --ink: #e8e8e8; --soft: #a8a8a8; --line: #383838; --card: #1c1c1c; } }
body { background: var(--back); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; margin: 0; }
main { max-width: 1180px; margin: 0 auto; padding: 1rem 1.25rem 4rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
p.soft, caption { color: var(--soft); }
.verdict { background: var(--card); border-left: 4px solid #0072B2; padding: .6rem 1rem; margin: 1rem 0; }
.verdict h3 { margin: 0 0 .3rem; } .verdict ul { margin: .3rem 0; padding-left: 1.2rem; }
.wide { overflow: auto; margin-bottom: 1.2rem; } .wide > div { min-width: 820px; } .tall { max-height: 34rem; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { position: sticky; top: 0; background: var(--card); vertical-align: bottom; white-space: normal; }
th[title] { text-decoration: underline dotted; cursor: help; }
th.text, td.text { text-align: left; } caption { text-align: left; padding: .3rem 0; }
.js-plotly-plot svg text:not(.hoverlayer *) { fill: var(--ink) !important; }
.js-plotly-plot .spikeline { stroke: var(--soft) !important; stroke-width: 1px !important; }
.js-plotly-plot .gridlayer path { stroke: var(--line) !important; }
.js-plotly-plot .slider-rail-rect, .js-plotly-plot .slider-grip-rect { fill: var(--card) !important; }
.js-plotly-plot .slider-rail-rect, .js-plotly-plot .slider-grip-rect { stroke: var(--soft) !important; }
.js-plotly-plot .modebar-btn path { fill: var(--soft) !important; }
"""


def write_html(summary: Summary, path: str | Path) -> None:
    """Writes one page that holds everything, the summary included, and asks the network for nothing.

    Args:
        summary: What the demo writes to ``summary.json``; `read_summary` gives it back.
        path: The file; its folder must exist.
    """
    title = html.escape(f"Depth profile of {summary.get('backbone')}")
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style>"
    )
    # No "<" at all: a script element ends at "</script", but "<!--" would change where the browser looks for it.
    data = json.dumps(summary).replace("<", "\\u003c")
    origin = html.escape(f"depthcb {summary.get('depthcb')}, {summary.get('created')}")
    body = "\n".join([f'<h1>{title}</h1><p class="soft">{origin}</p>', *_sections(summary)])
    page = (
        f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n'
        f'<script type="application/json" id="depthcb-summary">{data}</script>\n'
        f"<main>{body}</main></body></html>\n"
    )
    Path(path).write_text(page, encoding="utf-8", errors="replace")


def read_summary(path: str | Path) -> dict[str, Any]:
    """The summary that `write_html` put into a page (as JSON has it: tuples come back as lists).

    Raises:
        ValueError: The page carries none.
    """
    page = Path(path).read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="depthcb-summary">([^<]*)</script>', page)
    if found is None:
        raise ValueError(f"{path} is not a depthcb report: no embedded summary was found in it.")
    summary: dict[str, Any] = json.loads(found[1])
    return summary


def _sections(summary: Summary) -> list[str]:
    pairs, layers = _pairs(summary), list(summary.get("layers") or ())
    charts = _Charts()
    verdicts = "".join(map(_verdict_card, pairs)) or "<p>No arm was started.</p>"
    optimizers = [_optimizer_section(pair, layers, summary, charts) for pair in pairs]
    facts = ("settings", "versions", "corpus")
    tables = "".join(_facts_table(name, summary.get(name) or {}) for name in facts) + _times_table(summary)
    return [
        f"<h2>Verdict</h2>{verdicts}",
        *optimizers,
        f"<h2>Slopes at the last validation</h2>{_slopes_table(pairs)}",
        f"<h2>Settings and provenance</h2>{tables}",
    ]


class _Charts:
    """Turns plotly figures into page fragments; the first one brings the library."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, fig: go.Figure, title: str) -> str:
        self.count += 1
        config = _CONFIG | {"toImageButtonOptions": {"filename": f"depthcb-{self.count}", "scale": 2}}
        options = {"include_plotlyjs": self.count == 1, "full_html": False, "validate": False}
        chart = plotly.io.to_html(fig, config=config, div_id=f"chart-{self.count}", **options)
        return f'<h3>{html.escape(title)}</h3><div class="wide">{chart}</div>'


def _verdict_card(pair: _Pair) -> str:
    meaning = _MEANINGS.get(str(pair.verdict["verdict"]), "") if pair.verdict else ""
    lines = [*_context(pair), *(_arm_line(pair, arm) for arm in pair.arms)]
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines if line)
    return f'<div class="verdict"><h3>{html.escape(_headline(pair))}</h3>{html.escape(meaning)}<ul>{items}</ul></div>'


def _optimizer_section(pair: _Pair, layers: Sequence[str], summary: Summary, charts: _Charts) -> str:
    parts = [f"<h2>{html.escape(pair.title)}</h2>"]
    if pair.measured:
        note = "The axes rescale with the slider, so that each shape can be seen; the colours below do not."
        parts += [charts(_profile_chart(pair, layers), "Depth profile, with 95 % band"), f'<p class="soft">{note}</p>']
        parts += [charts(_heatmaps(pair, layers), "Change of each layer over training")]
    else:
        parts += ["<p>No depth profile was measured.</p>"]
    if any(arm.step_ratio or arm.val_loss for arm in pair.arms):
        parts += [charts(_training_chart(pair, layers), "Step ratios and loss")]
    return "".join([*parts, "<h3>Layers</h3>", _layers_table(pair, layers, summary.get("effective_rank"))])


def _table(head: Sequence[tuple[str, str]], rows: Iterable[Sequence[str]], text: int = 1, caption: str = "") -> str:
    """A table whose first ``text`` columns hold words; ``head`` pairs each title with a name in the definitions."""

    def cell(tag: str, i: int, content: str, hover: str = "") -> str:
        marks = (' class="text"' if i < text else "") + (f' title="{html.escape(hover)}"' if hover else "")
        return f"<{tag}{marks}>{html.escape(content)}</{tag}>"

    top = "".join(cell("th", i, title, _DEFINITIONS.get(name, "")) for i, (title, name) in enumerate(head))
    lines = "".join(f"<tr>{''.join(cell('td', i, c) for i, c in enumerate(row))}</tr>" for row in rows)
    named = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return f'<div class="wide tall"><table>{named}<thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>'


def _layer_rows(pair: _Pair, layers: Sequence[str], ranks: Sequence[float] | None) -> list[list[str]]:
    """Number, name, changes, normalised changes, step ratios (standard and equal-step each) and rank of each layer."""
    lasts = [arm.last(measure) for measure in _MEASURES for arm in pair.arms]
    columns = [p.change if p else None for p in lasts] + [arm.step_ratio for arm in pair.arms]
    return [
        [str(i), name, *(_number(_at(column, i)) for column in columns), _rank(_at(ranks, i))]
        for i, name in enumerate(layers)
    ]


def _layers_table(pair: _Pair, layers: Sequence[str], ranks: Sequence[float] | None) -> str:
    paired = [(f"{name}, {arm.name}", name) for name in (*_MEASURES.values(), "step ratio") for arm in pair.arms]
    head = [("", ""), ("layer", "layer"), *paired, ("effective rank", "effective rank")]
    return _table(head, _layer_rows(pair, layers, ranks), text=2)


def _slopes_table(pairs: Sequence[_Pair]) -> str:
    names = [name for name in _DEFINITIONS if list(_DEFINITIONS).index(name) >= list(_DEFINITIONS).index("arm")]
    rows = [_slope_row(pair, arm, measure) for pair in pairs for arm in pair.arms for measure in _MEASURES]
    return _table([(name, name) for name in names], rows, text=2)


def _slope_row(pair: _Pair, arm: _Arm, measure: str) -> list[str]:
    start, p = [f"{pair.title} {arm.label}", _MEASURES[measure]], arm.last(measure)
    if p is None:
        return [start[0], f"{start[1]}: not measured", *[MISSING] * 8]
    null = pair.null_slope(arm) if measure == "cka" else arm.null_relative_slope(measure)
    signed = [_number(v, "+.3g") for v in (p.slope, p.relative_slope, p.spearman, null)]
    intervals = [_interval(i).strip() or MISSING for i in (p.slope_interval, p.relative_slope_interval)]
    shape = [_number(p.centre), _number(p.width)]
    return [*start, signed[0], intervals[0], signed[1], intervals[1], signed[2], *shape, signed[3]]


def _facts_table(name: str, facts: Summary) -> str:
    return _table([(name, ""), ("value", "")], [[str(key), str(value)] for key, value in facts.items()], text=2)


def _times_table(summary: Summary) -> str:
    names = ("run_dir", "finished", "seconds", "probe_seconds")
    head = [("arm", "arm"), ("folder", ""), ("finished", ""), ("seconds", ""), ("of which probe, seconds", "")]
    rows = [[str(a.get("name")), *(str(a.get(n, MISSING)) for n in names)] for a in summary.get("arms") or ()]
    return _table(head, rows, text=3)


# ---------------------------------------------------------------- the terminal


def print_summary(summary: Summary, console: Console) -> None:
    """Prints, for each optimizer, a table of the layers, a line for each arm and the verdict with its context.

    Args:
        summary: What the demo writes to ``summary.json``.
        console: Where to; 100 columns are enough.
    """
    pairs = _pairs(summary)
    if not pairs:
        console.print(Text("No arm was started."))
    for pair in pairs:
        console.print(_terminal_table(pair, summary))
        for arm in pair.arms:
            console.print(_hanging(_arm_line(pair, arm), console))
        console.print(Text(_headline(pair), style="bold"))
        for line in filter(None, _context(pair)):
            console.print(_hanging(f"  {line}", console))
        console.print()


def _hanging(line: str, console: Console) -> Text:
    """A line whose continuations are set in, so that each arm keeps one visible start."""
    return Text(textwrap.fill(line, console.width, subsequent_indent="    "))


def _terminal_table(pair: _Pair, summary: Summary) -> Table:
    table = Table(title=Text(f"{summary.get('backbone')}, {pair.title}"), title_justify="left")
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("layer", no_wrap=True)
    for name in ("change", "normal.", "step"):
        for arm in ("standard", "eq.-step"):
            table.add_column(f"{name}\n{arm}", justify="right", no_wrap=True)
    table.add_column("eff.\nrank", justify="right", no_wrap=True)
    rows = _layer_rows(pair, list(summary.get("layers") or ()), summary.get("effective_rank"))
    for number, name, *figures in rows:
        table.add_row(number, Text(name if len(name) <= 18 else f"…{name[-17:]}"), *figures)
    if any(row[-1].endswith("!") for row in rows):
        table.caption = Text(f"! effective rank below {LOW_RANK:g}: this layer's change rests on a few directions")
    return table
