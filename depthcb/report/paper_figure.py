"""Figures for papers: vector graphics at a journal's widths and letter sizes, with their numbers beside them as CSV."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from depthcb.report.draw import draw_panel, draw_study, legend_handles, share_limits
from depthcb.report.groups import Group, groups, replicates
from depthcb.report.panels import (
    Panel,
    change_panel,
    evolution_panel,
    ratio_decades,
    ratio_panel,
    shape_panel,
    study_panel,
    to_csv,
)
from depthcb.run import Run

Kind = Literal["profile", "evolution", "pair", "study"]
Format = Literal["pdf", "svg", "png"]
KINDS: tuple[Kind, ...] = get_args(Kind)
FORMATS: tuple[Format, ...] = get_args(Format)
#: Width in inches by number of columns of a journal's page.
WIDTHS = {1: 3.3, 2: 6.9}
#: Panels beside each other in two columns, and in one figure altogether.
MOST_BESIDE, MOST_PANELS = 3, 12
#: Letters of 7 and 8 points; text stays text in SVG, and fonts are embedded whole in PDF.
_RC: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: a figure is the same on every machine
    "mathtext.fontset": "dejavusans",
    "font.size": 7,
    "axes.titlesize": 8,
    "axes.labelsize": 7,
    "figure.titlesize": 8,
    "legend.fontsize": 7,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.0,
    "lines.markersize": 3,
    "lines.markeredgewidth": 0.8,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "ytick.minor.width": 0.4,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "depthcb",
}
_UNDATED = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {}}


def write_figure(
    runs: Sequence[Run],
    kind: Kind,
    path: str | Path,
    *,
    format: Format | None = None,
    columns: int = 2,
    measure: str | None = None,
) -> Path:
    """Writes a figure for a paper, and beside it the numbers that it shows.

    Args:
        runs: The runs.
        kind: ``"profile"``, the latest profiles of all runs by each measure; ``"evolution"``, all validations of each
            run; ``"pair"``, a standard run and its equal-step twin: change, shape with the null, and step ratios;
            ``"study"``, the relative slopes of all pairs, seed by seed and their means with 95 % intervals.
        path: The file; its folder must exist.
        format: ``"pdf"``, ``"svg"`` or ``"png"``; by default the file's suffix.
        columns: 1 (3.3 inches wide, panels above each other) or 2 (6.9 inches, panels beside each other).
        measure: The measure; by default the first, and in ``"profile"`` all.

    Returns:
        The CSV file: the same name with the suffix ``.csv``.

    Raises:
        ValueError: The format or the measure is unknown, the runs have nothing to show, or too much for one figure.

    Example:
        >>> from depthcb.run import read_runs
        >>> write_figure(read_runs("lightning_logs"), "profile", "profile.pdf", columns=1)  # doctest: +SKIP
    """
    path = Path(path)
    chosen = format or path.suffix.removeprefix(".")
    if chosen not in FORMATS:
        raise ValueError(f"{path}: its name says no format: end it in .pdf, .svg or .png, or name the format.")
    panels = panels_of(runs, kind, measure)
    with matplotlib.rc_context(_RC):
        fig = draw_figure(panels, columns, study=kind == "study")
        fig.savefig(path, format=chosen, dpi=300, metadata=_UNDATED[chosen])
    beside = path.with_suffix(".csv")
    beside.write_text(to_csv(panels), encoding="utf-8")
    return beside


def panels_of(runs: Sequence[Run], kind: Kind, measure: str | None = None) -> list[Panel]:
    """Returns the panels of a figure.

    Args:
        runs: The runs.
        kind: See `write_figure`.
        measure: See `write_figure`.

    Raises:
        ValueError: The measure is unknown, the runs have nothing to show, or too much for one figure.
    """
    found = groups([run for run in runs if run.layers and any(run.profiles.values())])
    known = list(dict.fromkeys(m for group in found for m in group.measures))
    if not known:
        raise ValueError("no depth profile was measured in these runs: train with DepthProfile.")
    if measure is not None and measure not in known:
        raise ValueError(f"no run measured {measure!r}: choose one of {', '.join(known)}.")
    if kind == "study":
        sets = replicates(found, fewest=1)
        if not sets:
            raise ValueError(
                "these runs have no finished pair of a standard and an equal-step run: see depthcb report."
            )
        return [study_panel(sets, measure)]
    group = found[0] if len(found) == 1 else Group(tuple(run for group in found for run in group.runs))
    if kind == "pair":
        panels = _pair(found, measure)
    elif kind == "evolution":
        panels = [evolution_panel(group, run, measure or known[0]) for run in group.runs]
    else:
        panels = [change_panel(group, m) for m in ([measure] if measure else group.measures)]
    if len(panels) > MOST_PANELS:
        raise ValueError(f"{len(panels)} runs are too many for one figure: pass the folders of at most {MOST_PANELS}.")
    return panels


def _pair(found: Sequence[Group], measure: str | None) -> list[Panel]:
    pairs = [group for group in found if group.paired]
    if len(pairs) != 1:
        names = f" ({'; '.join(pair.title for pair in pairs)})" if pairs else ""
        raise ValueError(
            f"these runs have {len(pairs)} pairs{names}: pass the folders of one standard run and its equal-step twin."
        )
    pair, chosen = pairs[0], measure or pairs[0].measures[0]
    panels = [change_panel(pair, chosen), shape_panel(pair, chosen), ratio_panel(pair, ratio_decades([pair]))]
    return [panel for panel in panels if panel.series]


def draw_figure(panels: Sequence[Panel], columns: int, *, study: bool = False) -> Figure:
    """Draws panels at the width of one or two columns, with one legend below.

    Args:
        panels: The panels.
        columns: 1 or 2.
        study: Whether it is the one panel of a study.
    """
    beside = 1 if columns == 1 else min(len(panels), MOST_BESIDE)
    rows = -(-len(panels) // beside)
    height = 1.0 + 0.34 * len(set(panels[0].series[0].x)) if study else 2.2 * rows + 0.3
    fig = Figure(figsize=(WIDTHS[columns], height), layout="constrained", facecolor="white")
    axes = list(fig.subplots(rows, beside, squeeze=False).ravel())
    for ax, panel, letter in zip(axes, panels, "abcdefghijkl", strict=False):
        (draw_study if study else draw_panel)(ax, panel)
        if len(panels) > 1:
            ax.set_title(f"({letter}) {ax.get_title()}")
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    share_limits(axes, panels)
    _legend(fig, axes)
    return fig


def _legend(fig: Figure, axes: Sequence[Axes]) -> None:
    handles = legend_handles(axes)
    if len(handles) > 1:
        letters = 72 * fig.get_figwidth() / 4.4  # that fit side by side
        fitting = max(1, min(len(handles), int(letters // (max(map(len, handles)) + 10))))
        fig.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=fitting, frameon=False)
