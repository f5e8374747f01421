"""Matplotlib plots of one run's profiles, for notebooks, W&B, TensorBoard, MLflow and Comet."""

from __future__ import annotations

import html
import io
import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from depthcb.glossary import RATIO_UNIT
from depthcb.site_names import is_head
from depthcb.style import (
    BLUE,
    PALE,
    decorate,
    layer_axis,
    line_style,
    literal,
    mark_unresolved,
    show,
    show_interval,
    thinned,
    tick_format,
    tick_step,
    tick_texts,
)
from depthcb.unit_grid import UnitGrid

Interval = tuple[float, float]


class Curve(Protocol):
    """The parts of a `depthcb.Profile` that are plotted; avoids a circular import."""

    @property
    def measure(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def unit(self) -> str: ...
    @property
    def step(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def change(self) -> tuple[float, ...]: ...
    @property
    def unresolved(self) -> tuple[int, ...]: ...
    @property
    def band(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None: ...
    @property
    def slope(self) -> float: ...
    @property
    def slope_interval(self) -> Interval | None: ...
    @property
    def relative_slope(self) -> float | None: ...
    @property
    def relative_slope_interval(self) -> Interval | None: ...
    @property
    def width(self) -> float | None: ...
    @property
    def centre(self) -> float | None: ...
    @property
    def mean(self) -> float: ...


#: Maximum number of earlier validations in one plot; if there are more, evenly spaced ones are shown (see the title).
MOST_CURVES = 24
#: Placeholder for the text colour, replaced in the SVG by the colour of the page (light or dark).
_INK = "#010203"


def new_axes() -> Axes:
    """Returns axes of a new pyplot figure, which notebooks display automatically."""
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(6.4, 4), layout="constrained")[1]


def draw_curves(ax: Axes, profiles: Sequence[Curve], ink: str = "black") -> None:
    """Plots the change of each layer at all validations, earlier ones paler, the last one with its band.

    Args:
        ax: The axes to plot on.
        profiles: Profiles of one measure, oldest first; if empty, a message is shown instead.
        ink: Colour of text and frame.
    """
    if not profiles:
        ax.text(0.5, 0.5, "no profile measured yet", ha="center", va="center", transform=ax.transAxes, color=ink)
        ax.set_axis_off()
        return
    last, earlier = profiles[-1], thinned(profiles[:-1], MOST_CURVES)
    x = range(len(last.change))
    for i, profile in enumerate(earlier):
        ax.plot(x, profile.change, color=PALE, lw=0.9, alpha=0.25 + 0.75 * (i + 1) / len(earlier))
    if last.band is not None:
        ax.fill_between(x, *last.band, color=BLUE, alpha=0.22, linewidth=0)
    ax.plot(x, last.change, color=BLUE, marker="o", ms=4, lw=1.8)
    mark_unresolved(ax, last.unresolved, last.change)
    if last.unresolved:
        ax.legend(fontsize=8, frameon=False, labelcolor=ink)
    title = f"{last.title} at step {last.step}"
    if earlier:
        left_out = "" if len(earlier) == len(profiles) - 1 else f" of {len(profiles) - 1}"
        title += f"  (pale: {len(earlier)}{left_out} earlier)"
    ax.set_title(literal(title), fontsize=10, color=ink)
    ax.set_ylabel(literal(last.unit), color=ink)
    layer_axis(ax, len(last.change), ink)
    decorate(ax, ink)
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, -0.03 * high), 1.04 * high)


def draw_heatmap(ax: Axes, profiles: Sequence[Curve]) -> None:
    """Plots a heatmap of the change, layer x validation, with colours starting at 0; needs at least one profile."""
    change = np.array([p.change for p in profiles]).T
    top = float(change.max()) or 1.0
    image = ax.imshow(change, cmap="cividis", vmin=0, vmax=top, aspect="auto", origin="lower", interpolation="nearest")
    every = tick_step(len(profiles), 6)
    shown = range(0, len(profiles), every)
    ax.set_xticks(shown, [str(profiles[i].step) for i in shown])
    ax.set_yticks(range(0, len(change), tick_step(len(change))))
    ax.set_xlabel("validation at step")
    ax.set_ylabel("layer  (0 = input side)")
    alone = ", one validation so far" if len(profiles) == 1 else ""
    ax.set_title(literal(profiles[0].title + alone), fontsize=10)
    assert ax.figure is not None
    ax.figure.colorbar(image, ax=ax, label=literal(profiles[0].unit), format=tick_format())


def draw_units(ax: Axes, grid: UnitGrid, title: str) -> None:
    """Plots a heatmap of the step ratio, layer x kind of unit, on a logarithmic colour scale; white is none.

    Args:
        ax: The axes to plot on.
        grid: Positive ratios of units smaller than layers.
        title: The title.
    """
    image = ax.imshow(grid.values, cmap="cividis", norm="log", aspect="auto", origin="lower", interpolation="nearest")
    ax.set_xticks(range(len(grid.kinds)), [literal(name) for name in grid.labels], rotation=35, ha="right", fontsize=7)
    shown = range(0, len(grid.layers), tick_step(len(grid.layers)))
    ax.set_yticks(shown, [literal(grid.layers[i]) for i in shown])
    ax.set_ylabel("layer  (L00 = input side)")
    ax.set_title(literal(title), fontsize=10)
    assert ax.figure is not None
    low, high = np.nanmin(grid.values), np.nanmax(grid.values)
    ticks = [low, math.sqrt(low * high), high]
    bar = ax.figure.colorbar(image, ax=ax, label=literal(RATIO_UNIT))
    bar.ax.minorticks_off()
    bar.set_ticks(ticks, labels=tick_texts(ticks, digits=2))


def units_image(grid: UnitGrid, step: int) -> npt.NDArray[np.uint8]:
    """Returns the heatmap of `draw_units` for one step as an image (height, width, 3)."""
    fig = Figure(figsize=(max(5.6, 2.4 + 0.35 * len(grid.kinds)), 4.8), facecolor="white", dpi=100)
    fig.set_layout_engine("constrained")  # room for the names of the kinds
    draw_units(fig.subplots(), grid, f"step ratio inside the layers at step {step}")
    return _pixels(fig)


def heatmap_image(by_measure: Mapping[str, Sequence[Curve]]) -> npt.NDArray[np.uint8]:
    """Returns heatmaps of layer x validation, one panel per measure, as an image (height, width, 3)."""
    fig, axes = _row_of_axes(len(by_measure), "white")
    for ax, profiles in zip(axes, by_measure.values(), strict=True):
        draw_heatmap(ax, profiles)
    return _pixels(fig)


def curves_image(by_measure: Mapping[str, Sequence[Curve]]) -> npt.NDArray[np.uint8]:
    """Returns the curves of all validations, one panel per measure, as an image (height, width, 3)."""
    fig, axes = _row_of_axes(len(by_measure), "white")
    for ax, profiles in zip(axes, by_measure.values(), strict=True):
        draw_curves(ax, profiles)
    return _pixels(fig)


def draw_sites(ax: Axes, latest: Mapping[str, Curve]) -> None:
    """Plots the latest curves of several sites of the layers, that of the blocks first, with their bands."""
    for index, (site, profile) in enumerate(latest.items()):
        style, x = line_style(index), range(len(profile.change))
        if profile.band is not None:
            ax.fill_between(x, *profile.band, color=style.color, alpha=0.15, linewidth=0)
        ax.plot(x, profile.change, color=style.color, marker=style.marker, ms=4, label=site)
    block = next(iter(latest.values()))
    ax.set_title(literal(f"{block.title} at step {block.step}, by site"), fontsize=10)
    ax.set_ylabel(literal(block.unit))
    ax.legend(fontsize=8, frameon=False)
    layer_axis(ax, len(block.change), "black")
    decorate(ax, "black")
    ax.set_ylim(bottom=0)


def draw_heads(ax: Axes, latest: Sequence[Curve]) -> None:
    """Plots the latest change of each head, layer x head, with colours starting at 0."""
    change = np.array([p.change for p in latest]).T
    top = float(change.max()) or 1.0
    image = ax.imshow(change, cmap="cividis", vmin=0, vmax=top, aspect="auto", origin="lower", interpolation="nearest")
    ax.set_xticks(range(0, change.shape[1], tick_step(change.shape[1])))
    ax.set_yticks(range(0, len(change), tick_step(len(change))))
    ax.set_xlabel("head")
    ax.set_ylabel("layer  (0 = input side)")
    ax.set_title(literal(f"change of each head at step {latest[0].step}"), fontsize=10)
    assert ax.figure is not None
    ax.figure.colorbar(image, ax=ax, label=literal(latest[0].unit), format=tick_format())


def sites_image(latest: Mapping[str, Curve]) -> npt.NDArray[np.uint8]:
    """Returns the latest curves by site, and a heatmap of any heads, as an image (height, width, 3)."""
    heads = [profile for site, profile in latest.items() if is_head(site)]
    fig, axes = _row_of_axes(2 if heads else 1, "white")
    draw_sites(axes[0], {site: profile for site, profile in latest.items() if not is_head(site)})
    if heads:
        draw_heads(axes[1], heads)
    return _pixels(fig)


def curves_svg(by_measure: Mapping[str, Sequence[Curve]]) -> str:
    """Returns the curves of all validations as an SVG that inherits its text colour from the page."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "depthcb"}):
        fig, axes = _row_of_axes(len(by_measure), "none")
        for ax, profiles in zip(axes, by_measure.values(), strict=True):
            draw_curves(ax, profiles, ink=_INK)
        file = io.StringIO()
        fig.savefig(file, format="svg", metadata={"Date": None})
    svg = file.getvalue()
    return svg[svg.index("<svg") :].replace(_INK, "currentColor")


def _row_of_axes(panels: int, background: str) -> tuple[Figure, Sequence[Axes]]:
    """Returns a row of axes at fixed positions, because a layout engine would take longer than the plotting."""
    width = 5.6 * panels
    fig = Figure(figsize=(width, 4.2), facecolor=background, dpi=100)
    places = {"left": 0.9 / width, "right": 1 - 0.35 / width, "bottom": 0.13, "top": 0.91, "wspace": 0.27}
    axes: Sequence[Axes] = fig.subplots(1, panels, squeeze=False, gridspec_kw=places)[0]
    for ax in axes:
        ax.set_facecolor(background)
    return fig, axes


def _pixels(fig: Figure) -> npt.NDArray[np.uint8]:
    canvas = FigureCanvasAgg(fig)
    canvas.draw()  # type: ignore[no-untyped-call]
    pixels: npt.NDArray[np.uint8] = np.asarray(canvas.buffer_rgba())[..., :3]  # type: ignore[no-untyped-call]
    return pixels.copy()


def curves_page(by_measure: Mapping[str, Sequence[Curve]]) -> str:
    """Returns `curves_svg` as an HTML page that follows the reader's light or dark mode."""
    style = ":root{color-scheme:light dark}body{margin:0;background:Canvas;color:CanvasText}svg{width:100%;height:auto}"
    return f"<!doctype html><html><head><style>{style}</style></head><body>{curves_svg(by_measure)}</body></html>"


def profiles_html(profiles: Sequence[Curve]) -> str:
    """Returns the HTML that notebooks show for the profiles of one measure: the curves and the last one's numbers."""
    if not profiles:
        return "<p>No depth profile was measured yet.</p>"
    p = profiles[-1]
    numbers = (
        f"{p.title} at step {p.step}: slope {p.slope:+.3g}{show_interval(p.slope_interval)}, "
        f"relative slope {show(p.relative_slope, '+.3g')}{show_interval(p.relative_slope_interval)}, "
        f"width {show(p.width, '.2f')}, centre {show(p.centre, '.2f')}, mean {show(p.mean)}; {p.rows} rows"
    )
    width = f'style="max-width: 40rem">{curves_svg({p.measure: profiles})}'
    return f'<div {width}<p style="margin: 0">{html.escape(numbers)}</p></div>'
