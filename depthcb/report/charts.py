"""Plotly charts of the HTML report."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from depthcb.glossary import RATIO_UNIT
from depthcb.profile import FloatArray, Profile, layer_key
from depthcb.report.groups import Group, label, last, title_of, unit_of
from depthcb.report.panels import NO_RATIO, SHAPE, positions, ratio_decades, same_depth, shape_panel
from depthcb.run import Run
from depthcb.site_names import is_head
from depthcb.style import PALE, line_style, thinned, tick_step, tick_texts

#: Maximum number of validations on a slider and of heatmap columns; if there are more, evenly spaced ones are shown.
MOST_VALIDATIONS, MOST_COLUMNS = 100, 300
#: Maximum number of values that all sliders of a page have, and all of its heatmaps of one kind; keeps it below 10 MB.
MOST_VALUES = 16_000
Values = Sequence[float | None]


def _shown(text: str) -> str:
    """Escapes text for plotly, which makes links and line breaks of tags, and knows no entity for quotes."""
    return html.escape(text, quote=False)


# The page's style sheet sets text and grid colours for light or dark mode; the greys here apply to exported images.
def layout(fig: go.Figure, height: int, **more: Any) -> go.Figure:
    """Applies the layout that all charts of a page share."""
    named = sum(bool(trace.showlegend) for trace in fig.data)
    fig.update_layout(
        template="none",
        height=height + 22 * max(0, math.ceil(named / 3) - 2),  # room for the legend's rows
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        modebar={"bgcolor": "rgba(0,0,0,0)"},
        font={"color": PALE, "family": "system-ui, sans-serif", "size": 13},
        hoverlabel={"bgcolor": "#222222", "bordercolor": PALE, "font": {"color": "#ffffff"}},
        margin={"l": 75, "r": 20, "t": 45, "b": 50},
        legend={"orientation": "h", "traceorder": "normal", "y": 1.12, "yanchor": "bottom", "x": 0},
        **more,
    )
    fig.update_annotations(font={"size": 14})
    fig.update_xaxes(gridcolor=PALE, zeroline=False, automargin=True)
    fig.update_yaxes(gridcolor=PALE, zeroline=False, automargin=True, exponentformat="e")
    return fig


def _layer_axis(group: Group) -> dict[str, Any]:
    if not same_depth(group):
        return {"title": {"text": "relative depth (0 = input side)"}, "range": [-0.02, 1.02]}
    count = len(group.layers)
    ticks = {"tick0": 0, "dtick": tick_step(count), "range": [-0.5, count - 0.5]}
    return {"title": {"text": "layer (0 = input side)"}, **ticks}


def _line(y: Values, group: Group, index: int, **more: Any) -> go.Scatter:
    """Returns a run's line over its layers."""
    style, run = line_style(index), group.runs[index]
    trace = {
        "x": positions(group, len(y)),
        "y": list(y),
        "customdata": [_shown(name) for name in run.layers],
        "name": _shown(label(run, group)),
        "legendgroup": str(index),
        "mode": "lines+markers",
        "line": {"color": style.color, "width": 2, "dash": style.dash},
        "marker": {"symbol": style.symbol, "size": 7},
        "hovertemplate": "%{y:.4g} (%{customdata})",
    }
    return go.Scatter(trace | more)


def _band(x: Sequence[float], y: Values, group: Group, index: int) -> go.Scatter:
    """Returns the filled area of a band: ``y`` has its lower edge over ``x``, then its upper edge in reverse."""
    filled: dict[str, Any] = {"fill": "toself", "fillcolor": _rgba(line_style(index).color, 0.22), "line": {"width": 0}}
    filled |= {"mode": "lines", "hoverinfo": "skip", "hovertemplate": None, "showlegend": False, "customdata": None}
    return _line(y, group, index, x=[*x, *reversed(x)], **filled)


def fitting(most: int, layers: int, values: int) -> int:
    """Returns how many columns of so many layers a chart may have with so many values: 2 to ``most``."""
    return max(2, min(most, values // max(1, layers)))


def measured_steps(group: Group) -> list[int]:
    """Returns the steps at which any run was measured."""
    return sorted({p.step for run in group.runs for profiles in run.profiles.values() for p in profiles})


def profile_chart(group: Group, values: int = MOST_VALUES) -> go.Figure:
    """Returns the profiles by all measures, with a slider over the validations of all runs.

    Args:
        group: The runs.
        values: Maximum number of values on the slider.
    """
    measures = group.measures
    layers = sum(len(run.layers) for run in group.runs for m in measures if last(run, m))
    steps = thinned(measured_steps(group), fitting(MOST_VALIDATIONS, 2 * layers, values))
    drawn = [(m, i) for m in measures for i, run in enumerate(group.runs) if last(run, m)]
    columns = min(2, len(measures))
    titles = [_shown(title_of(group, m)) for m in measures]
    rows = math.ceil(len(measures) / columns)
    fig = make_subplots(rows, columns, subplot_titles=titles, horizontal_spacing=0.1, vertical_spacing=0.25 / rows)
    named: set[int] = set()
    for measure, i in drawn:
        row, col = divmod(measures.index(measure), columns)
        for trace in _profile_traces(measure, group, i, steps[-1]):
            trace.showlegend = bool(trace.showlegend) and i not in named
            fig.add_trace(trace, 1 + row, 1 + col)
        named.add(i)
    by_step = {(m, i): {p.step: p for p in group.runs[i].profiles[m]} for m, i in drawn}
    ys = [[y for m, i in drawn for y in _profile_ys(group.runs[i], by_step[m, i].get(step))] for step in steps]
    slider = {
        "active": len(steps) - 1,
        "currentvalue": {"prefix": "validation at step "},
        "pad": {"t": 60},
        "steps": [{"method": "restyle", "label": str(s), "args": [{"y": y}]} for s, y in zip(steps, ys, strict=True)],
    }
    fig.update_xaxes(_layer_axis(group))
    fig.update_yaxes(rangemode="tozero")
    for index, measure in enumerate(measures):
        row, col = divmod(index, columns)
        fig.update_yaxes(title={"text": _shown(unit_of(group, measure))}, row=1 + row, col=1 + col)
    return layout(fig, 140 + 400 * rows, sliders=[slider], hovermode="x unified", hoverdistance=100)


def sites_chart(group: Group) -> go.Figure:
    """Returns the latest profiles of all sites inside the layers by the first measure, one panel per run with any."""
    runs = [run for run in group.runs if run.sites]
    columns = min(2, len(runs))
    rows = math.ceil(len(runs) / columns)
    titles = [_shown(label(run, group)) for run in runs]
    fig = make_subplots(rows, columns, subplot_titles=titles, horizontal_spacing=0.1, vertical_spacing=0.25 / rows)
    measure = group.measures[0]
    for number, run in enumerate(runs):
        row, col = divmod(number, columns)
        sites = {
            "block": run.profiles.get(measure),
            **{s: found.get(measure) for s, found in run.sites.items() if not is_head(s)},
        }
        for index, (site, profiles) in enumerate(sites.items()):
            if profiles:
                trace = _line(profiles[-1].change, group, group.runs.index(run), name=site, legendgroup=site)
                style = line_style(index)
                trace.update(line={"color": style.color}, marker={"symbol": style.symbol}, showlegend=number == 0)
                fig.add_trace(trace, 1 + row, 1 + col)
    fig.update_xaxes(_layer_axis(group))
    fig.update_yaxes(rangemode="tozero", title={"text": _shown(unit_of(group, measure))})
    return layout(fig, 60 + 360 * rows, hovermode="x unified")


def worth_chart(group: Group) -> go.Figure:
    """Returns what each layer's change is worth to the loss, with its 95 % band over batches, of the runs that know."""
    fig = go.Figure()
    for index, run in enumerate(group.runs):
        if run.worth is not None:
            x = positions(group, len(run.worth.worth))
            ends = [[getattr(e, end) for e in run.worth.restored] for end in ("low", "high")]
            fig.add_trace(_band(x, [*ends[0], *reversed(ends[1])], group, index))
            fig.add_trace(_line(run.worth.worth, group, index))
    fig.update_xaxes(_layer_axis(group))
    fig.update_yaxes(title={"text": "loss without the layer's change - loss"}, zeroline=True)
    return layout(fig, 400, hovermode="x unified")


def head_heatmaps(group: Group) -> go.Figure:
    """Returns heatmaps of the latest change by the first measure, layer x head, one per run with heads."""
    measure, runs = group.measures[0], [run for run in group.runs if any(map(is_head, run.sites))]
    fig = _grid(len(runs), 1, [_cell_title("change of each head", run, group, there=True) for run in runs])
    for row, run in enumerate(runs, start=1):
        heads = {site: by_measure[measure][-1].change for site, by_measure in run.sites.items() if is_head(site)}
        fig.add_trace(
            go.Heatmap(x=list(heads), y=list(range(len(run.layers))), z=list(zip(*heads.values(), strict=True)),
                       hovertemplate="%{x}, layer %{y}: %{z:.4g}<extra></extra>", coloraxis="coloraxis"),
            row, 1,
        )  # fmt: skip
    return layout(fig, 120 + 280 * len(runs), coloraxis=_colors(0, 1, len(runs), cmin=0))


def _profile_traces(measure: str, group: Group, index: int, step: int) -> list[go.Scatter]:
    run = group.runs[index]
    band, change = _profile_ys(run, next((p for p in run.profiles[measure] if p.step == step), None))
    x = positions(group, len(change))
    return [_band(x, band, group, index), _line(change, group, index, showlegend=True)]


def _profile_ys(run: Run, profile: Profile | None) -> list[Values]:
    """Returns the band and the change of a profile; Nones if there is none."""
    layers = len(run.layers)
    if profile is None:
        return [[None] * 2 * layers, [None] * layers]
    band = [None] * 2 * layers if profile.band is None else [*profile.band[0], *reversed(profile.band[1])]
    return [band, profile.change]


def shape_chart(group: Group) -> go.Figure:
    """Returns change / mean change of each layer by each measure, and dashed the nulls with their draws' range."""
    panels = [shape_panel(group, measure) for measure in group.measures]
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    titles = [_shown(panel.title) for panel in panels]
    fig = make_subplots(rows, columns, subplot_titles=titles, horizontal_spacing=0.1, vertical_spacing=0.25 / rows)
    named: set[str] = set()
    for number, panel in enumerate(panels):
        place = [1 + part for part in divmod(number, columns)]
        for series in panel.series:
            more: dict[str, Any] = {"name": _shown(series.name), "showlegend": series.name not in named}
            if series.dashed:
                more |= {"mode": "lines", "line": {"color": line_style(series.look).color, "dash": "dash"}}
            named.add(series.name)
            if series.band is not None:
                edges = [*series.band[0], *reversed(series.band[1])]
                fig.add_trace(_band([float(x) for x in series.x], edges, group, series.look), *place)
            fig.add_trace(_line(series.y, group, series.look, **more), *place)
    fig.update_xaxes(_layer_axis(group))
    fig.update_yaxes(rangemode="tozero", title={"text": SHAPE})
    return layout(fig, 60 + 400 * rows, hovermode="x unified", hoverdistance=100)


def _rgba(color: str, alpha: float) -> str:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def heatmaps(group: Group, values: int = MOST_VALUES) -> go.Figure:
    """Returns heatmaps of layer x validation, one row per run, one column per measure and colour scale per column.

    Args:
        group: The runs.
        values: Maximum number of values in all heatmaps.
    """
    measures, runs = group.measures, group.runs
    most = fitting(MOST_COLUMNS, len(measures) * sum(len(run.layers) for run in runs), values)
    titles = [_cell_title(title_of(group, m), run, group, bool(last(run, m))) for run in runs for m in measures]
    fig = _grid(len(runs), len(measures), titles)
    for row, run in enumerate(runs):
        for col, measure in enumerate(measures):
            profiles = thinned(run.profiles.get(measure, []), most)
            if profiles:
                changes = [p.change for p in profiles]
                trace = _heatmap([p.step for p in profiles], changes, run.layers, f"coloraxis{col + 1 if col else ''}")
                fig.add_trace(trace, 1 + row, 1 + col)
    axes = {
        f"coloraxis{c + 1 if c else ''}": _colors(c, len(measures), len(runs), cmin=0) for c in range(len(measures))
    }
    fig.update_xaxes(title={"text": "validation at step"})
    fig.update_yaxes(_whole_layers(group))
    return layout(fig, 120 + 280 * len(runs), **axes)


def ratio_heatmaps(group: Group, values: int = MOST_VALUES) -> go.Figure:
    """Returns heatmaps of the step ratio, layer x step, one panel per run, on one logarithmic colour scale.

    Args:
        group: The runs.
        values: Maximum number of values in all heatmaps.
    """
    runs = group.runs
    most = fitting(MOST_COLUMNS, sum(len(run.layer_ratio.mean) for run in runs), values)
    titles = [_cell_title("step ratio", run, group, bool(run.layer_ratio.steps)) for run in runs]
    columns = min(2, len(runs))
    rows = math.ceil(len(runs) / columns)
    fig = _grid(rows, columns, titles)
    for index, run in enumerate(runs):
        if run.layer_ratio.steps:
            shown = thinned(range(len(run.layer_ratio.steps)), most)
            ratios = [[r if r > 0 else None for r in row] for row in run.layer_ratio.table[shown].tolist()]
            logs = [[math.log10(r) if r else None for r in row] for row in ratios]
            trace = _heatmap([run.layer_ratio.steps[s] for s in shown], logs, run.layers, "coloraxis", ratios)
            row, col = divmod(index, columns)
            fig.add_trace(trace, 1 + row, 1 + col)
    fig.update_xaxes(title={"text": "step"})
    fig.update_yaxes(_whole_layers(group))
    colors = _log_colors(np.concatenate([run.layer_ratio.table.ravel() for run in runs]), rows)
    return layout(fig, 120 + 280 * rows, coloraxis=colors)


def unit_heatmaps(group: Group) -> go.Figure:
    """Returns heatmaps of the mean step ratio, layer x kind of unit, one per run with units smaller than layers.

    Args:
        group: The runs.
    """
    runs = [run for run in group.runs if run.unit_ratio.units]
    titles = [_cell_title("step ratio", run, group, there=True) for run in runs]
    fig = _grid(len(runs), 1, titles)
    grids = [run.unit_ratio.grid for run in runs]
    for row, grid in enumerate(grids, start=1):
        ratios = [[None if math.isnan(r) else r for r in line] for line in grid.values.tolist()]
        trace = go.Heatmap(
            x=[_shown(name) for name in grid.labels],
            y=[_shown(name) for name in grid.layers],
            z=[[None if r is None else math.log10(r) for r in line] for line in ratios],
            customdata=ratios,
            hovertemplate="%{y} %{x}: %{customdata:.4g}<extra></extra>",
            coloraxis="coloraxis",
        )
        fig.add_trace(trace, row, 1)
    fig.update_xaxes(nticks=None, tickangle=-35)
    fig.update_yaxes(type="category", nticks=12)
    colors = _log_colors(np.concatenate([grid.values.ravel() for grid in grids]), len(runs))
    return layout(fig, 160 + 380 * len(runs), coloraxis=colors)


def _whole_layers(group: Group) -> dict[str, Any]:
    return {"tick0": 0, "dtick": tick_step(len(group.layers), 8)}


def _log_colors(ratios: FloatArray, rows: int) -> dict[str, Any]:
    """Returns a colour axis for logarithms of step ratios, labelled with the ratios."""
    low, high = (math.log10(bound) for bound in (ratios[ratios > 0].min(), ratios[ratios > 0].max()))
    ticks = [low, (low + high) / 2, high]
    bar: dict[str, Any] = {"tickvals": ticks, "ticktext": tick_texts([10**tick for tick in ticks], digits=2)}
    bar |= {"title": {"text": RATIO_UNIT, "side": "right"}}
    colors = _colors(0, 1, rows)
    return colors | {"colorbar": colors["colorbar"] | bar}


def _cell_title(what: str, run: Run, group: Group, there: bool) -> str:
    return _shown(f"{what}, {label(run, group)}" if there else f"{what}, {run.name}: not measured")


def _grid(rows: int, columns: int, titles: Sequence[str]) -> go.Figure:
    """Returns a grid of panels for heatmaps of layer x step, with layers from bottom to top."""
    fig = make_subplots(rows, columns, subplot_titles=titles, horizontal_spacing=0.12, vertical_spacing=0.38 / rows)
    fig.update_xaxes(type="category", nticks=10, showgrid=False)
    fig.update_yaxes(title={"text": "layer"}, showgrid=False)
    return fig


def _heatmap(
    steps: Sequence[int], columns: Sequence[Values], layers: Sequence[str], axis: str, shown: Any = None
) -> go.Heatmap:
    """Returns one heatmap with one column per step; ``shown`` has the hover values if they differ from the colours."""
    count = len(columns[0])
    names = [_shown(layers[i]) if i < len(layers) else layer_key(i) for i in range(count)]
    figures = [list(row) for row in zip(*(shown or columns), strict=True)]
    return go.Heatmap(
        x=[str(step) for step in steps],
        y=list(range(count)),
        z=[list(row) for row in zip(*columns, strict=True)],
        customdata=[[[name, figure] for figure in row] for name, row in zip(names, figures, strict=True)],
        hovertemplate="%{customdata[0]}<br>step %{x}: %{customdata[1]:.4g}<extra></extra>",
        coloraxis=axis,
    )


def _colors(column: int, columns: int, rows: int, **more: Any) -> dict[str, Any]:
    """Returns a colour-blind-safe colour axis with its colour bar to the right of the given column."""
    width = (1 - 0.12 * (columns - 1)) / columns
    bar = {"x": column * (width + 0.12) + width, "len": 1 / rows, "y": 1, "yanchor": "top", "thickness": 12}
    return {"colorscale": "Cividis", "colorbar": bar | {"exponentformat": "e", "outlinewidth": 0, "xpad": 4}, **more}


def progress_chart(group: Group, span: tuple[int, int] | None = None) -> go.Figure:
    """Returns the slope over steps with its interval, the mean step ratio per layer, and any logged validation loss.

    Args:
        group: The runs.
        span: The decades of the step ratios' axis, which the charts of a page share; None for this chart's own.
    """
    losses = [run.validation_loss for run in group.runs]
    smaller = any(run.unit_ratio.units for run in group.runs) and not any(run.layer_ratio.mean for run in group.runs)
    of_ratio = "mean step ratio per layer" + (": of smaller units, see below" if smaller else "")
    panels = ["slope", of_ratio, *(["validation loss"] if any(losses) else [])]
    fig = make_subplots(1, len(panels), subplot_titles=panels, horizontal_spacing=0.1)
    for i, run in enumerate(group.runs):
        _add_slopes(fig, group, i)
        ratio, wanted = run.layer_ratio.mean, run.wanted_ratio.mean if run.wanted_ratio.by_layer else []
        if ratio:
            fig.add_trace(_line(ratio, group, i, showlegend=False), 1, 2)
        if wanted and wanted != ratio:
            dotted = {"color": line_style(i).color, "width": 1.5, "dash": "dot"}
            name = _shown(f"wanted by the optimizer in {label(run, group)}")
            fig.add_trace(_line(wanted, group, i, name=name, mode="lines", line=dotted), 1, 2)
        if losses[i]:
            fig.add_trace(_over_steps(thinned(losses[i], MOST_COLUMNS), group, i), 1, 3)
            fig.update_yaxes(title={"text": "loss"}, row=1, col=3)
    steps = measured_steps(group)
    ticks = {"tickvals": steps} if len(steps) == 1 else {}  # otherwise plotly invents ticks around a single point
    for col in (1, 3)[: len(panels) - 1]:
        fig.update_xaxes(title={"text": "step"}, row=1, col=col, **ticks)
    fig.update_xaxes(_layer_axis(group), row=1, col=2)
    first, last_one = span or ratio_decades([group]) or (-4, -2)
    every = max(1, (last_one - first) // 6)
    decades = {"type": "log", "range": [first, last_one], "dtick": every, "exponentformat": "power"}
    fig.update_yaxes(title={"text": RATIO_UNIT}, row=1, col=2, minor={"ticks": "outside", "dtick": "D1"})
    fig.update_yaxes(title={"text": "change per whole depth"}, row=1, col=1)
    fig = layout(fig, 430, hovermode="x unified", hoverdistance=100)
    absent = [label(run, group) for run in group.runs if not run.step_ratio.mean]
    if absent:
        text = "<br>".join(f"{_shown(name)}: no step ratios<br>{NO_RATIO}" for name in absent)
        fig.add_annotation(text=text, x=0.5, y=0.97 if len(absent) < len(group.runs) else 0.5, showarrow=False,
                           xref="x2 domain", yref="y2 domain", font={"size": 12})  # fmt: skip
    return fig.update_yaxes(decades, row=1, col=2)


def _add_slopes(fig: go.Figure, group: Group, index: int) -> None:
    run = group.runs[index]
    profiles: list[Profile] = thinned(run.profiles.get(group.measures[0], []), MOST_COLUMNS) if group.measures else []
    if not profiles:
        return
    known = [(p.step, *p.slope_interval) for p in profiles if p.slope_interval is not None]
    x, low, high = [s for s, _, _ in known], [a for _, a, _ in known], [b for _, _, b in known]
    fig.add_trace(_band(x, [*low, *reversed(high)], group, index), 1, 1)
    fig.add_trace(_over_steps([(p.step, p.slope) for p in profiles], group, index, showlegend=True), 1, 1)


def _over_steps(points: Sequence[tuple[int, float]], group: Group, index: int, showlegend: bool = False) -> go.Scatter:
    more = {"x": [step for step, _ in points], "customdata": None, "hovertemplate": "%{y:.4g}"}
    return _line([value for _, value in points], group, index, showlegend=showlegend, **more)
