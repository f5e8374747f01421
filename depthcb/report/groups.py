"""Groups of runs that are reported together, and the text of their reports."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from depthcb.glossary import LOW_RANK
from depthcb.profile import Profile
from depthcb.run import Run
from depthcb.style import MISSING, show, show_interval
from depthcb.verdict import Verdict, judge

#: Step ratios use a log axis if max / min exceeds this value.
LOG_ABOVE = 3.0


@dataclass(frozen=True)
class Group:
    """Runs shown in one chart.

    Args:
        runs: A standard run and its equal-step counterpart, in this order; or any other runs.
        paired: Whether they are such a pair.
    """

    runs: tuple[Run, ...]
    paired: bool = False

    @property
    def title(self) -> str:
        """The optimizer of a pair; otherwise the name of a single run, or the number of runs."""
        if self.paired:
            return _optimizer(self.runs[0])
        return self.runs[0].name if len(self.runs) == 1 else f"{len(self.runs)} runs"

    @property
    def measures(self) -> list[str]:
        """All measures with a profile in any of the runs."""
        return list(dict.fromkeys(m for run in self.runs for m, profiles in run.profiles.items() if profiles))

    @property
    def layers(self) -> list[str]:
        """Layer names of the run with the most layers."""
        return max((run.layers for run in self.runs), key=len)

    @property
    def verdict(self) -> Verdict | None:
        """The verdict on a pair; None for other runs, or if a run is unfinished or has no profiles or intervals."""
        if not self.paired or not all(run.finished and run.profiles and run.wanted_ratio.spread for run in self.runs):
            return None
        standard, equal = ({m: ps[-1] for m, ps in run.profiles.items()} for run in self.runs)
        if any(p.relative_slope_interval is None and p.mean > 0 for ps in (standard, equal) for p in ps.values()):
            return None
        return judge(standard, equal, self.runs[1].wanted_ratio.spread or math.nan)


def groups(runs: Sequence[Run]) -> list[Group]:
    """Returns pairs that differ only in the control, in the order of the standard runs, then one group of the rest."""
    by_settings: dict[str, dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        by_settings[_pair_key(run)][run.control].append(run)
    pairs = [p for same in by_settings.values() for p in zip(same["standard"], same["equal-step"], strict=False)]
    paired = {id(run) for pair in pairs for run in pair}
    rest = tuple(run for run in runs if id(run) not in paired)
    return [*(Group(pair, paired=True) for pair in pairs), *([Group(rest)] if rest else [])]


def _pair_key(run: Run) -> str:
    """Returns a key of everything that a pair must share: training settings, seed, layers, measures and probe."""
    depth = run.record("DepthProfile")
    if depth is None:
        return f"unmeasured {run.name}"
    measured = {key: depth.settings[key] for key in ("layers", "rows", "probe_hash")}
    measured["measures"] = list(depth.settings["measures"])  # names alone: a reworded definition is the same measure
    return json.dumps([measured, depth.fit, depth.provenance["seed"]], sort_keys=True)


def _optimizer(run: Run) -> str:
    names = [o["class"] for record in run.records.values() for o in record.fit.get("optimizers", ())]
    return " and ".join(dict.fromkeys(names)) or run.name


def label(run: Run, group: Group) -> str:
    """Returns a run's label in a chart: its control in a pair, else its name; notes if the run did not finish."""
    name = run.control if group.paired else run.name
    steps = [p.step for profiles in run.profiles.values() for p in profiles]
    return name if run.finished or not steps else f"{name} (not finished, last at step {max(steps)})"


def last(run: Run, measure: str) -> Profile | None:
    """Returns the latest profile; None if there is none."""
    profiles = run.profiles.get(measure)
    return profiles[-1] if profiles else None


def title_of(group: Group, measure: str) -> str:
    """Returns the display name of a measure."""
    return next((p[-1].title for run in group.runs if (p := run.profiles.get(measure))), measure)


def unit_of(group: Group, measure: str) -> str:
    """Returns the axis label of a measure."""
    return next((p[-1].unit for run in group.runs if (p := run.profiles.get(measure))), measure)


def definition_of(group: Group, measure: str) -> str:
    """Returns the definition of a measure from the runs' records."""
    return next((text for run in group.runs if (text := run.definitions.get(measure))), "")


def null_change(run: Run, measure: str) -> list[float]:
    """Returns the mean change of each layer over the null's seeds; empty without a null."""
    draws = run.null.get(measure)
    return np.mean([p.change for p in draws], axis=0).tolist() if draws else []


def null_slope(run: Run, measure: str) -> float | None:
    """Returns the mean relative slope over the null's seeds; None without a null."""
    return run.null[measure].mean_relative_slope if measure in run.null else None


def headline(group: Group) -> str:
    """Returns the verdict together with the spread that the control removed, or why there is no verdict."""
    verdict = group.verdict
    if verdict is not None:
        removed = f"the control removed a step-ratio spread of {verdict.spread:.3g}x"
        return f"{group.title}: {verdict.verdict}; {removed}"
    if not group.paired:
        return group.title
    absent = [run.control for run in group.runs if not any(run.profiles.values())]
    unfinished = [run.control for run in group.runs if run.profiles and not run.finished]
    why = f"{' and '.join(absent)} not measured" if absent else f"{' and '.join(unfinished)} not finished"
    if not absent and not unfinished:
        why = "no interval, or no step ratios"
    return f"{group.title}: no verdict ({why})"


def context(group: Group) -> list[str]:
    """Returns the context of the verdict: its reason, whether the measures agree, and the null; empty without one."""
    verdict = group.verdict
    if verdict is None:
        return []
    agree = "agree" if verdict.measures_agree else "DISAGREE"
    measures = ", ".join(group.measures)
    nulls = ", ".join(f"{run.control} {_null(run, group.measures[0])}" for run in group.runs)
    return [
        verdict.reason,
        *([f"the measures {agree} on the sign of the slope ({measures})"] if len(group.measures) > 1 else []),
        f"relative slope of the null: {nulls}",
    ]


def _null(run: Run, measure: str) -> str:
    """Formats the null's relative slope, and its share of the run's relative slope."""
    null, profile = null_slope(run, measure), last(run, measure)
    measured = profile.relative_slope if profile else None
    share = f" ({null / measured:.0%} of the run's)" if null is not None and measured else ""
    return show(null, "+.3g") + share


def run_line(run: Run, group: Group) -> str:
    """Returns one line with the slope, interval, width and null of a run."""
    measure = group.measures[0] if group.measures else ""
    p = last(run, measure)
    if p is None:
        return f"{label(run, group)}: {MISSING} no depth profile was measured"
    return (
        f"{label(run, group)}: slope {p.slope:+.3g}{show_interval(p.slope_interval)}, "
        f"relative slope {show(p.relative_slope, '+.3g')}{show_interval(p.relative_slope_interval)}, "
        f"width {show(p.width, '.2f')}, null relative slope {show(null_slope(run, measure), '+.3g')}"
    )


def log_axis(*columns: Iterable[float | None]) -> bool:
    """Returns whether step ratios span enough to need a log axis and are all positive."""
    ratios = [r for column in columns for r in column if r is not None and math.isfinite(r)]
    return bool(ratios) and min(ratios) > 0 and max(ratios) > LOG_ABOVE * min(ratios)


def show_rank(value: float | None) -> str:
    """Formats an effective rank, marked if it is low."""
    return show(value, ".1f") + (" !" if value is not None and value < LOW_RANK else "")


def layer_rows(group: Group, measures: Sequence[str]) -> list[list[str]]:
    """Returns one row per layer: index, name, change by measure and run, step ratio by run, and effective rank."""
    profiles = [last(run, measure) for measure in measures for run in group.runs]
    columns: list[Sequence[Any]] = [p.change if p else () for p in profiles]
    columns += [run.step_ratio.mean for run in group.runs]
    ranks = max((run.effective_rank for run in group.runs), key=len)
    return [
        [str(i), name, *(show(_at(column, i)) for column in columns), show_rank(_at(ranks, i))]
        for i, name in enumerate(group.layers)
    ]


def _at(column: Sequence[float | None], index: int) -> float | None:
    """Returns one value of a column, or None if the column is too short."""
    return column[index] if index < len(column) else None
