"""Pictures of one run's profiles, by matplotlib: in notebooks, in W&B and in TensorBoard."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from typing import Protocol

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from depthcb.style import BLUE, PALE, decorate, layer_axis, show, show_interval, thinned, tick_step, tick_text

Interval = tuple[float, float]


class Curve(Protocol):
    """What is shown of a `depthcb.Profile`, which draws itself by these functions."""

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


#: Most earlier validations that one picture overlays; of more, evenly spaced ones are drawn, and the title says so.
MOST_CURVES = 24
#: Stands for the text's colour while matplotlib draws, and is replaced by the page's own, light or dark.
_INK = "#010203"


def new_axes() -> Axes:
    """Axes of a new pyplot figure, which notebooks show by themselves."""
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(6.4, 4), layout="constrained")[1]


def draw_curves(ax: Axes, profiles: Sequence[Curve], ink: str = "black") -> None:
    """Change of each layer at all validations, the earlier the paler, the last one with its band.

    Args:
        ax: Where to.
        profiles: Of one measure, oldest first; without any a sentence takes the curves' place.
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
    title = f"{last.title} at step {last.step}"
    if earlier:
        left_out = "" if len(earlier) == len(profiles) - 1 else f" of {len(profiles) - 1}"
        title += f"  (pale: {len(earlier)}{left_out} earlier)"
    ax.set_title(title, fontsize=10, color=ink)
    ax.set_ylabel(last.unit, color=ink)
    layer_axis(ax, len(last.change), ink)
    decorate(ax, ink)
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, -0.03 * high), 1.04 * high)


def draw_heatmap(ax: Axes, profiles: Sequence[Curve]) -> None:
    """Layer x validation, the change as colour, from 0; at least one profile."""
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
    ax.set_title(profiles[0].title + alone, fontsize=10)
    assert ax.figure is not None
    ax.figure.colorbar(image, ax=ax, label=profiles[0].unit, format=FuncFormatter(tick_text))


def heatmap_image(by_measure: Mapping[str, Sequence[Curve]]) -> npt.NDArray[np.uint8]:
    """Layer x validation, one panel per measure, as a picture (height, width, 3)."""
    fig, axes = _row_of_axes(len(by_measure), "white")
    for ax, profiles in zip(axes, by_measure.values(), strict=True):
        draw_heatmap(ax, profiles)
    return _pixels(fig)


def curves_image(by_measure: Mapping[str, Sequence[Curve]]) -> npt.NDArray[np.uint8]:
    """The curves of all validations, one panel per measure, as a picture (height, width, 3)."""
    fig, axes = _row_of_axes(len(by_measure), "white")
    for ax, profiles in zip(axes, by_measure.values(), strict=True):
        draw_curves(ax, profiles)
    return _pixels(fig)


def curves_svg(by_measure: Mapping[str, Sequence[Curve]]) -> str:
    """The same as an SVG that takes its text's colour from the page."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "depthcb"}):
        fig, axes = _row_of_axes(len(by_measure), "none")
        for ax, profiles in zip(axes, by_measure.values(), strict=True):
            draw_curves(ax, profiles, ink=_INK)
        file = io.StringIO()
        fig.savefig(file, format="svg", metadata={"Date": None})
    svg = file.getvalue()
    return svg[svg.index("<svg") :].replace(_INK, "currentColor")


def _row_of_axes(panels: int, background: str) -> tuple[Figure, Sequence[Axes]]:
    """Axes side by side in fixed places: a layout engine would take longer than all the drawing."""
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
    """`curves_svg` as a page of its own, which follows the reader's light or dark mode."""
    style = ":root{color-scheme:light dark}body{margin:0;background:Canvas;color:CanvasText}svg{width:100%;height:auto}"
    return f"<!doctype html><html><head><style>{style}</style></head><body>{curves_svg(by_measure)}</body></html>"


def profiles_html(profiles: Sequence[Curve]) -> str:
    """What a notebook shows of the profiles of one measure: the curves, and the last one's figures."""
    if not profiles:
        return "<p>No depth profile was measured yet.</p>"
    p = profiles[-1]
    figures = (
        f"{p.title} at step {p.step}: slope {p.slope:+.3g}{show_interval(p.slope_interval)}, "
        f"relative slope {show(p.relative_slope, '+.3g')}{show_interval(p.relative_slope_interval)}, "
        f"width {show(p.width, '.2f')}, centre {show(p.centre, '.2f')}, mean {show(p.mean)}; {p.rows} rows"
    )
    width = f'style="max-width: 40rem">{curves_svg({p.measure: profiles})}'
    return f'<div {width}<p style="margin: 0">{html.escape(figures)}</p></div>'
