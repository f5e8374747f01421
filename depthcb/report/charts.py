"""The page's charts, as plotly figures."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from depthcb.report.summary import MEASURES, RATIO_UNIT, STYLES, UNITS, Arm, Pair, Values, log_axis, tick_step

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
    ticks = {"tick0": 0, "dtick": tick_step(len(layers)), "range": [-0.5, len(layers) - 0.5]}
    return {"title": {"text": "layer (0 = input side)"}, **ticks}


def _line(values: Values, arm: Arm, layers: Sequence[str], **more: Any) -> go.Scatter:
    style = STYLES[arm.control]
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


def profile_chart(pair: Pair, layers: Sequence[str]) -> go.Figure:
    """Both measures side by side, with a slider over the validations of either arm."""
    steps = sorted({p.step for arm in pair.arms for profiles in arm.profiles.values() for p in profiles})
    drawn = [(m, arm) for m in MEASURES for arm in pair.arms if arm.last(m)]
    fig = make_subplots(1, 2, subplot_titles=list(MEASURES.values()), horizontal_spacing=0.1)
    for measure, arm in drawn:
        col = 1 + list(MEASURES).index(measure)
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
    for col, measure in enumerate(MEASURES, start=1):
        fig.update_yaxes(title={"text": UNITS[measure]}, row=1, col=col)
    return _layout(fig, 540, sliders=[slider], hovermode="x unified")


def _profile_traces(measure: str, arm: Arm, step: int, layers: Sequence[str]) -> list[go.Scatter]:
    band, change, null = _profile_ys(measure, arm, step, len(layers))
    x = list(range(len(layers)))
    color = STYLES[arm.control].color
    dashed = {"color": color, "width": 1.2, "dash": "dash"}
    filled: dict[str, Any] = {"x": x + x[::-1], "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
    filled |= {"fill": "toself", "fillcolor": _rgba(color, 0.22), "hovertemplate": None, "customdata": None}
    return [
        _line(band, arm, layers, showlegend=False, **filled),
        _line(change, arm, layers, showlegend=True),
        _line(null, arm, layers, showlegend=True, mode="lines", line=dashed, name=f"null of {arm.name}, end of fit"),
    ]


def _profile_ys(measure: str, arm: Arm, step: int, layers: int) -> list[Values]:
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


def heatmaps(pair: Pair, layers: Sequence[str]) -> go.Figure:
    """Layer x validation, a row per measure and a column per arm; the arms of a measure share their colours."""
    cells = [(m, arm) for m in MEASURES for arm in pair.arms]
    titles = [f"{MEASURES[m]}, {arm.label if arm.last(m) else arm.name + ': not measured'}" for m, arm in cells]
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
    fig.update_yaxes(title={"text": "layer"}, tick0=0, dtick=2 * tick_step(len(layers)), showgrid=False)
    return _layout(
        fig, 640, coloraxis=colors | {"colorbar": bar | {"y": 0.8}}, coloraxis2=colors | {"colorbar": bar | {"y": 0.2}}
    )


def training_chart(pair: Pair, layers: Sequence[str]) -> go.Figure:
    """Mean step ratio per layer, with what the optimizer wanted before the control, and the validation loss."""
    fig = make_subplots(1, 2, subplot_titles=["mean step ratio per layer", "validation loss"], horizontal_spacing=0.1)
    for arm in pair.arms:
        if arm.step_ratio:
            fig.add_trace(_line(arm.step_ratio, arm, layers, name=arm.name), 1, 1)
        if arm.wanted_ratio and arm.wanted_ratio != arm.step_ratio:
            dotted = {"color": STYLES[arm.control].color, "width": 1.5, "dash": "dot"}
            wanted = {"name": f"wanted by the optimizer in the {arm.name} run", "mode": "lines", "line": dotted}
            fig.add_trace(_line(arm.wanted_ratio, arm, layers, **wanted), 1, 1)
        steps, losses = [s for s, _ in arm.val_loss], [loss for _, loss in arm.val_loss]
        more = {"x": steps, "customdata": None, "hovertemplate": "%{y:.4g}", "showlegend": not arm.step_ratio}
        if steps:
            fig.add_trace(_line(losses, arm, layers, name=arm.name, **more), 1, 2)
    log = log_axis(pair.arms, *(arm.wanted_ratio for arm in pair.arms))
    fig.update_xaxes(_layer_axis(layers), row=1, col=1)
    fig.update_xaxes(title={"text": "step"}, row=1, col=2)
    axis: dict[str, Any] = {"type": "log", "dtick": "D2"} if log else {"rangemode": "tozero"}
    fig.update_yaxes(title={"text": RATIO_UNIT}, row=1, col=1, **axis)
    fig.update_yaxes(title={"text": "loss"}, row=1, col=2)
    return _layout(fig, 430, hovermode="x unified")
