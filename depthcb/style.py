"""Colours, markers and number formats shared by plots, reports and terminal output."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.ticker import Formatter

MISSING = "\N{EN DASH}"
#: Colour-blind-safe Okabe-Ito colours with a contrast of at least 3:1 on white and on near-black.
BLUE, VERMILLION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#C06595"
#: Colour of earlier validations, with a contrast of at least 4:1 on white and on near-black.
PALE = "#767676"
T = TypeVar("T")


@dataclass(frozen=True)
class Style:
    """The style of a run's line: colour, marker (matplotlib's and plotly's name) and dash (plotly's name)."""

    color: str
    marker: str
    symbol: str
    dash: str = "solid"


_COLORS = (BLUE, VERMILLION, GREEN, PURPLE)
_MARKERS = (("o", "circle"), ("s", "square-open"), ("^", "triangle-up"), ("D", "diamond-open"))
_DASHES = ("solid", "dash", "dot", "dashdot")


def line_style(index: int) -> Style:
    """Returns the style of the index-th run of a chart; 16 distinct combinations of colour and dash, then repeating."""
    return Style(_COLORS[index % 4], *_MARKERS[index % 4], _DASHES[index // 4 % 4])


def show(value: float | None, form: str = ".3g") -> str:
    """Formats a number; returns a dash for None or NaN."""
    return MISSING if value is None or math.isnan(value) else format(value, form)


def show_interval(interval: tuple[float, float] | None) -> str:
    """Formats an interval in brackets with a leading space; returns an empty string for None."""
    return "" if interval is None else f" [{interval[0]:+.3g}, {interval[1]:+.3g}]"


def printable(text: str) -> str:
    r"""Replaces what a terminal would obey instead of showing it: escape sequences and other control characters.

    >>> printable("a\x1b[31m")
    'a\\x1b[31m'
    """
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def literal(text: str) -> str:
    r"""Escapes text for matplotlib, which reads math between dollars and leaves labels with a leading _ out of legends.

    >>> literal("_cost in $")
    ' _cost in \\$'
    """
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def tick_step(count: int, ticks: int = 12) -> int:
    """Returns the spacing of labelled layers (or validations) that gives at most about ``ticks`` labels."""
    steps: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, *range(10, count + 20, 5))
    return next(step for step in steps if count <= ticks * step)


def thinned(items: Sequence[T], most: int) -> list[T]:
    """Returns at most ``most`` evenly spaced items, always including the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def tick_texts(values: Sequence[float], digits: int = 4) -> list[str]:
    """Returns tick labels that are all written in one way, without an exponent if all are readable so.

    Args:
        values: Where the ticks are.
        digits: The largest number of significant digits.

    Example:
        >>> tick_texts([0.0, 0.008, 0.01]), tick_texts([0.0, 2e-5, 8e-5])
        (['0', '0.008', '0.01'], ['0', '2e-5', '8e-5'])
        >>> tick_texts([8.1e-5, 3.4e-4, 1.4e-2])
        ['8.1e-5', '3.4e-4', '1.4e-2']
    """
    sizes = [abs(value) for value in values if value]
    if not sizes or (min(sizes) >= 1e-4 and 1e-2 <= max(sizes) < 10**digits):
        return [f"{value:.{digits}g}" for value in values]
    parts = [f"{value:.{digits - 1}e}".split("e") for value in values]
    return [f"{float(mantissa):g}e{int(exponent)}" if float(mantissa) else "0" for mantissa, exponent in parts]


def tick_format() -> Formatter:
    """Returns a formatter that writes all labels of an axis as `tick_texts` does, without a common factor above it."""
    from matplotlib.ticker import Formatter

    class OneWay(Formatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return tick_texts([x])[0]

        def format_ticks(self, values: Sequence[float]) -> list[str]:
            return tick_texts(values)

    return OneWay()


def layer_axis(ax: Axes, layers: int, ink: str = "black") -> None:
    """Sets up the x axis over layers, with labels spaced so that they don't overlap."""
    ax.set_xlim(-0.5, layers - 0.5)
    ax.set_xticks(range(0, layers, tick_step(layers)))
    ax.set_xlabel("layer  (0 = input side)", color=ink)


def mark_unresolved(ax: Axes, layers: Sequence[int], change: Sequence[float]) -> None:
    """Crosses out the changes of the given layers, which rounding alone may give."""
    if layers:
        values = [change[i] for i in layers]
        ax.plot(layers, values, "x", color=PALE, ms=9, ls="none", label="below 10 x rounding error: no evidence")


def decorate(ax: Axes, ink: str = "black") -> None:
    """Sets the grid, frame and number format of the axes."""
    ax.yaxis.set_major_formatter(tick_format())
    ax.grid(color=PALE, lw=0.6, alpha=0.3)
    ax.set_axisbelow(True)
    ax.tick_params(colors=ink)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[:].set_color(ink)
