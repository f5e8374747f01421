"""The numbers that figures draw, panel by panel: what is plotted is what is written beside a figure as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from depthcb.glossary import RATIO_UNIT
from depthcb.intervals import mean_interval
from depthcb.profile import Profile, Profiles, relative_depth
from depthcb.report.groups import Group, Replicates, label, last, title_of, unit_of
from depthcb.run import Run
from depthcb.style import thinned

#: Maximum number of validations in one panel; if there are more, evenly spaced ones are drawn.
MOST_CURVES = 24
#: Which callback gives the step ratios of a run that has none.
NO_RATIO = "add UpdateRatioMonitor() to the callbacks"
LAYER, DEPTH = "layer  (0 = input side)", "relative depth  (0 = input side)"
SHAPE = "change / its mean"
RELATIVE_SLOPE = "relative slope  (slope / mean change)"


@dataclass(frozen=True)
class Series:
    """One line of a panel, or one kind of dots.

    Args:
        name: Its name in the legend.
        x: Layers, relative depths, or names.
        y: One value per x; None where there is none.
        band: Lower and upper ends of the band or interval at each x; None without one.
        look: Number of its style.
        dashed: Whether it is a null: dashed and without markers.
        shade: Its step, if the panel's lines are coloured by their steps.
        crossed: Positions of values that rounding alone may give.
    """

    name: str
    x: Sequence[float] | Sequence[str]
    y: Sequence[float | None]
    band: tuple[Sequence[float], Sequence[float]] | None = None
    look: int = 0
    dashed: bool = False
    shade: int | None = None
    crossed: Sequence[int] = ()


@dataclass(frozen=True)
class Panel:
    """One panel of a figure.

    Args:
        title: Its title.
        x_title: Title of the x axis.
        y_title: Title of the y axis.
        series: What it shows.
        layers: Number of layers on the x axis; 0 if that is relative depth.
        decades: First and last exponent of a logarithmic y axis; None for a linear one.
        notes: What it lacks, with the remedy.
    """

    title: str
    x_title: str
    y_title: str
    series: tuple[Series, ...]
    layers: int = 0
    decades: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()


def same_depth(group: Group) -> bool:
    """Returns whether all runs have the same number of layers; if not, charts use relative depth."""
    return len({len(run.layers) for run in group.runs if run.layers}) <= 1


def positions(group: Group, layers: int) -> list[float]:
    """Returns the positions of a run's layers on the x axis."""
    return list(range(layers)) if same_depth(group) else relative_depth(layers).tolist()


def shape(profile: Profile) -> list[float]:
    """Returns the change of each layer over their mean, whose slope is the relative slope; empty if nothing changed."""
    return [c / profile.mean for c in profile.change] if profile.mean > 0 else []


def null_draws(run: Run, measure: str) -> Profiles:
    """Returns the draws of the change-matched null, or without it those of the null of the same weight change."""
    return run.matched_null.get(measure) or run.null.get(measure) or Profiles()


def has_null(group: Group) -> bool:
    """Returns whether any run of the group has a null."""
    return any(run.null or run.matched_null for run in group.runs)


def decades(ratios: Iterable[float | None]) -> tuple[int, int] | None:
    """Returns the exponents of the powers of ten around all positive ratios; None if there is none.

    >>> decades([2e-4, 3e-3, None, 0.0]), decades([1e-3, 1e-3])
    ((-4, -2), (-3, -2))
    """
    logs = [math.log10(r) for r in ratios if r is not None and 0 < r < math.inf]
    if not logs:
        return None
    low = math.floor(min(logs))
    return low, max(low + 1, math.ceil(max(logs)))


def ratio_decades(groups: Iterable[Group]) -> tuple[int, int] | None:
    """Returns the decades of the mean step ratios of all runs, which all panels of a figure share."""
    return decades(r for group in groups for run in group.runs for r in run.layer_ratio.mean)


def change_panel(group: Group, measure: str) -> Panel:
    """Returns the latest change of each layer by one measure, with its 95 % band, one line per run."""
    found = [(i, run, p) for i, run in enumerate(group.runs) if (p := last(run, measure))]
    series = tuple(
        Series(label(run, group), positions(group, len(p.change)), p.change, p.band, look=i, crossed=p.unresolved)
        for i, run, p in found
    )
    absent = tuple(f"{label(run, group)}: not measured" for run in group.runs if not last(run, measure))
    return _over_layers(group, f"{title_of(group, measure)}, with 95 % band", unit_of(group, measure), series, absent)


def shape_panel(group: Group, measure: str) -> Panel:
    """Returns change / mean change of each layer, and dashed that of each run's null with the range over its draws."""
    series = []
    for i, run in enumerate(group.runs):
        profile = last(run, measure)
        if profile is None:
            continue
        if y := shape(profile):
            series.append(Series(label(run, group), positions(group, len(y)), y, look=i))
        draws = [s for draw in null_draws(run, measure) if (s := shape(draw))]
        if draws:
            mean, low, high = (f(draws, axis=0).tolist() for f in (np.mean, np.min, np.max))
            name = f"null of {label(run, group)}" + ("" if run.matched_null else " (same weight change)")
            series.append(Series(name, positions(group, len(mean)), mean, (low, high), look=i, dashed=True))
    title = f"shape of {title_of(group, measure)}"
    notes = () if has_null(group) else ("no null: DepthProfile(pretrained='cpu') measures it",)
    return _over_layers(group, title, SHAPE, tuple(series), notes)


def ratio_panel(group: Group, span: tuple[int, int] | None) -> Panel:
    """Returns the mean step ratio of each layer, one line per run.

    Args:
        group: The runs.
        span: The decades of the y axis.
    """
    series = tuple(
        Series(label(run, group), positions(group, len(mean)), [r if r and r > 0 else None for r in mean], look=i)
        for i, run in enumerate(group.runs)
        if (mean := run.layer_ratio.mean)
    )
    absent = [label(run, group) for run in group.runs if not run.step_ratio.mean]
    notes = tuple(f"{name}: no step ratios, {NO_RATIO}" for name in absent)
    return _over_layers(group, "mean step ratio", RATIO_UNIT, series, notes, span)


def _over_layers(
    group: Group,
    title: str,
    y_title: str,
    series: tuple[Series, ...],
    notes: tuple[str, ...] = (),
    span: tuple[int, int] | None = None,
) -> Panel:
    same = same_depth(group)
    return Panel(title, LAYER if same else DEPTH, y_title, series, len(group.layers) if same else 0, span, notes)


def evolution_panel(group: Group, run: Run, measure: str) -> Panel:
    """Returns one run's change of each layer at all validations, or at evenly spaced ones of many."""
    profiles = run.profiles.get(measure, Profiles())
    drawn = thinned(profiles, MOST_CURVES)
    series = tuple(Series(f"step {p.step}", range(len(p.change)), p.change, shade=p.step) for p in drawn)
    left_out = "" if len(drawn) == len(profiles) else f", {len(drawn)} of {len(profiles)} validations"
    title = label(run, group) + left_out
    return Panel(title, LAYER, unit_of(group, measure), series, len(run.layers))


def study_panel(sets: Sequence[Replicates], measure: str | None = None) -> Panel:
    """Returns the relative slopes of all pairs, set by set, and from two seeds on their means with 95 % intervals.

    Args:
        sets: Pairs that differ only in their seed, each with a name of its own.
        measure: The measure; None for each set's first.
    """
    named = sorted(zip(set_names(sets), sets, strict=True), key=lambda both: both[0])
    series: list[Series] = []
    for look, kind in enumerate(("standard", "equal-step", "change-matched null")):
        found = [
            (name, _known(pairs.relative_slopes(measure or pairs.pairs[0].measures[0])[look])) for name, pairs in named
        ]
        seeds = [(name, slope) for name, slopes in found for slope in slopes]
        series.append(Series(f"{kind}, each seed", [n for n, _ in seeds], [s for _, s in seeds], look=look))
        means = [(name, mean_interval(slopes)) for name, slopes in found if len(slopes) > 1]
        band = [mean.low for _, mean in means], [mean.high for _, mean in means]
        title = f"{kind}, mean with 95 % interval"
        series.append(Series(title, [n for n, _ in means], [mean.value for _, mean in means], band, look=look))
    series = [one for one in series if one.x]
    return Panel("", "pairs", RELATIVE_SLOPE, tuple(series))


def _known(slopes: Iterable[float | None]) -> list[float]:
    return [slope for slope in slopes if slope is not None]


def set_names(sets: Sequence[Replicates]) -> list[str]:
    """Returns a short name for each set of pairs, of the settings in which the sets differ."""
    facts = [_facts(found.pairs[0].runs[0]) for found in sets]
    keys = list(dict.fromkeys(key for fact in facts for key in fact))
    differing = [key for key in keys if len({fact.get(key) for fact in facts}) > 1]
    chosen: list[str] = []
    for key in differing:  # the fewest that tell the sets apart, those that people name first
        if len({tuple(fact.get(k) for k in chosen) for fact in facts}) < len(sets):
            chosen.append(key)
    names = [", ".join(fact[key] for key in chosen if key in fact) for fact in facts]
    return [name or found.title for name, found in zip(names, sets, strict=True)]


def _facts(run: Run) -> dict[str, str]:
    """Returns what tells a run's fit from another, as text: the network, the module and the optimizer first."""
    record = run.record("DepthProfile")
    fit = record.fit if record else {}
    hparams = dict(fit.get("hparams", {}))
    network = next((str(hparams[key]) for key in ("backbone", "model", "model_name") if key in hparams), "")
    optimizers = ", ".join(str(o.get("class")) for o in fit.get("optimizers", ()))
    first = {"network": network, "module": str(fit.get("module", "")), "optimizer": optimizers}
    return first | {key: f"{key}={value}" for key, value in hparams.items() if "seed" not in key}


def to_csv(panels: Iterable[Panel]) -> str:
    """Returns the plotted numbers, one row per point, in full precision."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["panel", "x_axis", "y_axis", "series", "x", "y", "low", "high"])
    for panel in panels:
        table.writerows(_csv_rows(panel))
    return text.getvalue()


def _csv_rows(panel: Panel) -> Iterator[list[object]]:
    for series in panel.series:
        for i, (x, y) in enumerate(zip(series.x, series.y, strict=True)):
            ends = ("", "") if series.band is None else (series.band[0][i], series.band[1][i])
            yield [panel.title, panel.x_title, panel.y_title, series.name, x, "" if y is None else y, *ends]
