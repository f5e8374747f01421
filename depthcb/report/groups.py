"""Groups of runs that are reported together, and the text of their reports."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from depthcb.glossary import LOW_RANK
from depthcb.intervals import Estimate
from depthcb.profile import RESOLVED, Profile, Profiles
from depthcb.run import Record, Run
from depthcb.style import MISSING, show, show_interval
from depthcb.verdict import (
    FEWEST_PAIRS,
    Agreement,
    PairComparison,
    Verdict,
    agreement,
    compare_pair,
    judge,
    percent,
)

#: Class of the callback that freezes layers during a fit, which changes the training.
FREEZING = "FreezeByChange"
#: Marks a change that rounding alone may give.
UNRESOLVED = "~"
UNRESOLVED_NOTE = f"{UNRESOLVED} below {RESOLVED:g} x the rounding error of the forward: no evidence of a change"
ONE_PAIR = f"one pair: this speaks of its probe rows, not of training; a word takes at least {FEWEST_PAIRS} seeds"


@dataclass(frozen=True)
class Group:
    """Runs shown in one chart.

    Args:
        runs: A standard run and its equal-step counterpart, in this order; or any other runs.
        paired: Whether they are such a pair.
        replicated: Whether there are further pairs that differ only in their seed.
    """

    runs: tuple[Run, ...]
    paired: bool = False
    replicated: bool = False

    @property
    def title(self) -> str:
        """The optimizer of a pair (and its seed); otherwise the name of a single run, or the number of runs."""
        if self.paired:
            return _optimizer(self.runs[0]) + (f", seed {_seed(self.runs[0])}" if self.replicated else "")
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
    def complete(self) -> bool:
        """Whether it is a pair of finished runs with profiles."""
        return self.paired and all(run.finished and any(run.profiles.values()) for run in self.runs)

    @cached_property
    def comparison(self) -> PairComparison | None:
        """The comparison of a complete pair by the first measure; None without intervals or without any change."""
        if not self.complete:
            return None
        standard, equal = (last(run, self.measures[0]) for run in self.runs)
        return compare_pair(standard, equal) if standard and equal else None

    @property
    def spread(self) -> float | None:
        """The step-ratio spread that the control removed from a pair; None if no step of it was logged."""
        return self.runs[1].wanted_ratio.spread if self.paired else None

    @property
    def agreement(self) -> Agreement:
        """Whether the measures agree on the sign of each run's slope, by its interval over the probe's halves."""
        signs = {m: [_sign(last(run, m)) for run in self.runs] for m in self.measures}
        return agreement(signs) if signs else "undecided"


@dataclass(frozen=True)
class Replicates:
    """Complete pairs that differ only in their seed.

    Args:
        pairs: One or more pairs.
    """

    pairs: tuple[Group, ...]

    @property
    def title(self) -> str:
        """The optimizer and the seeds."""
        seeds = ", ".join(sorted((_seed(pair.runs[0]) for pair in self.pairs), key=lambda seed: (len(seed), seed)))
        s = "s" * (len(self.pairs) > 1)
        return f"{_optimizer(self.pairs[0].runs[0])}, {len(self.pairs)} pair{s} (seed{s} {seeds})"

    @cached_property
    def verdicts(self) -> dict[str, Verdict]:
        """The verdict by each measure, the deciding one first; empty with too few pairs, or if nothing changed."""
        slopes = {m: self.relative_slopes(m) for m in self.pairs[0].measures}
        if len(self.pairs) < FEWEST_PAIRS or any(None in [*s, *e] for s, e, _ in slopes.values()):
            return {}
        return {m: _judge(*found) for m, found in slopes.items()}

    @property
    def agreement(self) -> Agreement:
        """Whether the measures agree on the sign of the mean slope of both kinds of runs."""
        return agreement({m: [v.standard.sign, v.equal_step.sign] for m, v in self.verdicts.items()})

    def relative_slopes(self, measure: str) -> tuple[list[float | None], list[float | None], list[float | None]]:
        """Returns each pair's relative slopes: standard, equal-step, and the mean of the standard run's matched null.

        None is where nothing changed, or no such null was measured.
        """
        standard, equal = ([_relative_slope(last(pair.runs[i], measure)) for pair in self.pairs] for i in (0, 1))
        nulls = [pair.runs[0].matched_null.get(measure, Profiles()).mean_relative_slope for pair in self.pairs]
        return standard, equal, nulls


def _judge(standard: Sequence[float | None], equal: Sequence[float | None], null: Sequence[float | None]) -> Verdict:
    """Returns the verdict over slopes that are all known; a null counts only if all pairs have one."""
    s, e, n = ([slope for slope in slopes if slope is not None] for slopes in (standard, equal, null))
    return judge(s, e, n if len(n) == len(s) else ())


def groups(runs: Sequence[Run]) -> list[Group]:
    """Returns pairs that differ only in the control, in the order of the standard runs, then one group of the rest."""
    by_settings: dict[str, dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if not run.unpaired:
            by_settings[settings_key(run)][run.control].append(run)
    pairs = [p for same in by_settings.values() for p in zip(same["standard"], same["equal-step"], strict=False)]
    paired = {id(run) for pair in pairs for run in pair}
    rest = tuple(run for run in runs if id(run) not in paired)
    keys = [_seedless(pair) for pair in pairs]
    found = [Group(pair, paired=True, replicated=keys.count(key) > 1) for pair, key in zip(pairs, keys, strict=True)]
    return [*found, *([Group(rest)] if rest else [])]


def replicates(found: Sequence[Group], fewest: int = 2) -> list[Replicates]:
    """Returns the complete pairs of `groups` that differ only in their seed, where there are at least ``fewest``."""
    by_settings: dict[str, dict[str, Group]] = defaultdict(dict)
    for group in found:
        if group.complete:
            by_settings[_seedless(group.runs)].setdefault(_seed(group.runs[0]), group)
    return [Replicates(tuple(pairs.values())) for pairs in by_settings.values() if len(pairs) >= fewest]


def settings_key(run: Run, seedless: bool = False, weights: bool = True, freezing: bool = True) -> str:
    """Returns a key of all that a pair must share: training settings, seed, initial weights, layers, measures, probe.

    Args:
        run: A run that can be paired.
        seedless: Whether the seed may differ, and with it the initial weights and the probe that a data module draws.
        weights: Whether the initial weights count.
        freezing: Whether `FreezeByChange` counts.
    """
    depth = run.record("DepthProfile")
    assert depth is not None
    measured = {k: depth.settings.get(k) for k in ("layers", "rows", *(() if seedless else ("probe_hash",)))}
    measured["measures"] = list(run.definitions)  # names alone: a reworded definition is the same measure
    fit = dict(depth.fit)
    if seedless:
        fit["hparams"] = {name: v for name, v in fit.get("hparams", {}).items() if "seed" not in name}
    if seedless or not weights:
        del fit["initial_weights"]
    steering = {name: found for name, found in _steering(depth).items() if freezing or found[0] != FREEZING}
    return json.dumps([measured, fit, steering, None if seedless else _seed(run)], sort_keys=True)


def _steering(depth: Record) -> dict[str, Any]:
    """Returns the callbacks other than the control that change the training, such as `FreezeByChange`."""
    callbacks = [(name, *c) for part in depth.parts for name, c in part["callbacks"].items()]
    return {name: [kind, settings] for name, kind, settings in callbacks if settings and kind != "EqualStep"}


def _seedless(pair: Sequence[Run]) -> str:
    """Returns a key of all that replicates share: `settings_key` without the seed, and what the steps are equal in."""
    unit = {key: pair[1].controlled.get(key) for key in ("unit", "groups")}
    return json.dumps([settings_key(pair[0], seedless=True), unit], sort_keys=True)


def _seed(run: Run) -> str:
    depth = run.record("DepthProfile")
    return str(depth.provenance["seed"]) if depth else ""


def _sign(profile: Profile | None) -> int:
    interval = profile.relative_slope_interval if profile else None
    return 0 if interval is None else Estimate(0.0, *interval).sign


def _relative_slope(profile: Profile | None) -> float | None:
    return profile.relative_slope if profile else None


def _optimizer(run: Run) -> str:
    names = [o["class"] for record in run.records.values() for o in record.fit.get("optimizers", ())]
    return " and ".join(dict.fromkeys(names)) or run.name


def label(run: Run, group: Group) -> str:
    """Returns a run's label in a chart: its control in a pair, else its name; notes if the run did not finish."""
    name = run.control if group.paired else run.name + (f" (mixed: {run.mixed})" if run.mixed else "")
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


def null_slope(run: Run, measure: str) -> float | None:
    """Returns the mean relative slope over the null's seeds; None without a null."""
    return run.null[measure].mean_relative_slope if measure in run.null else None


def headline(group: Group) -> str:
    """Returns what a pair shows, with the spread that the control removed; or why it shows nothing."""
    found = group.comparison
    if found is not None:
        left = "" if found.share is None else f" ({percent(found.share)} of the slope is left)"
        return f"{group.title}: equal-step minus standard relative slope {found.difference}{left}; {_removed([group])}"
    if not group.paired:
        return group.title
    absent = [run.control for run in group.runs if not any(run.profiles.values())]
    unfinished = [run.control for run in group.runs if run.profiles and not run.finished]
    why = f"{' and '.join(absent)} not measured" if absent else f"{' and '.join(unfinished)} not finished"
    if not absent and not unfinished:
        why = "; ".join(_without_slopes(group)) or "their intervals are not over the same halves of the probe"
    return f"{group.title}: no comparison ({why})"


def _without_slopes(group: Group) -> list[str]:
    """Names the runs of a complete pair whose slope or interval is missing, with the remedy."""
    told = []
    for run in group.runs:
        profile = last(run, group.measures[0])
        if profile is None or profile.relative_slope is None:
            told.append(f"nothing changed in {run.control}")
        elif not profile.half_relative_slopes:
            told.append(f"{run.control} has no interval: it takes a probe of at least 8 different examples")
    return told


def _removed(pairs: Sequence[Group]) -> str:
    """Returns the spreads that the control removed, or how to get to know them."""
    known = [f"{pair.spread:.3g}" for pair in pairs if pair.spread is not None]
    if not known:
        return "the spread that the control removed is not known: lower the Trainer's log_every_n_steps"
    spreads = f"a step-ratio spread of {known[0]}" if len(pairs) == 1 else f"step-ratio spreads of {', '.join(known)}"
    return f"the control removed {spreads}x"


def context(group: Group) -> list[str]:
    """Returns what limits a pair's comparison, or why runs are not paired; empty if there is nothing to say."""
    if not group.paired and len(group.runs) > 1:
        return [f"{run.name} is not paired: {why}" for run in group.runs if (why := _why_unpaired(run, group.runs))]
    if group.comparison is None:
        return []
    measure = group.measures[0]
    return [
        ONE_PAIR,
        *_agreement_line(group.agreement, group.measures),
        *_unresolved_lines(group),
        *(f"null of {run.control}: {null_line(run, measure)}" for run in group.runs),
    ]


def _why_unpaired(run: Run, others: Sequence[Run]) -> str:
    """Returns why a run has no twin; empty if there just is none."""
    if run.unpaired:
        return run.unpaired
    key, there = settings_key(run, weights=False), [r for r in others if not r.unpaired and r.control != run.control]
    twins = [r.name for r in there if settings_key(r, weights=False) == key]
    return f"its initial weights are not those of {', '.join(twins)}" if twins else ""


def _unresolved_lines(group: Group) -> list[str]:
    """Names the layers of each run whose change rounding alone may give."""
    found = [(run.control, profile.unresolved) for run in group.runs if (profile := last(run, group.measures[0]))]
    return [
        f"{control}: the change of layers {', '.join(map(str, layers))} is below {RESOLVED:g} x the rounding error"
        for control, layers in found
        if layers
    ]


def verdict_lines(found: Replicates) -> list[str]:
    """Returns the headline of replicated pairs, with their verdict, and the lines behind it."""
    verdicts = found.verdicts
    if not verdicts:
        few = len(found.pairs) < FEWEST_PAIRS
        why = f"it needs at least {FEWEST_PAIRS} seeds" if few else "nothing changed in a run"
        return [f"{found.title}: no verdict ({why})"]
    titles = {measure: title_of(found.pairs[0], measure) for measure in verdicts}
    words = dict.fromkeys(map(_word, verdicts.values()))
    first = (
        next(iter(words)) if len(words) == 1 else "; ".join(f"{_word(v)} by {titles[m]}" for m, v in verdicts.items())
    )
    return [
        f"{found.title}: {first}",
        *(f"{titles[m]}: {v.reason}; {_null_reason(v)}" for m, v in verdicts.items()),
        *_agreement_line(found.agreement, list(verdicts)),
        _removed(found.pairs),
    ]


def conclusions(runs: Sequence[Run]) -> dict[str, list[dict[str, Any]]]:
    """Returns what the reports say about pairs and replicated pairs, as JSON-serialisable data."""
    found = groups(runs)
    pairs = [
        {"group": g.title, **asdict(g.comparison), "spread": g.spread, "measures": g.agreement}
        for g in found
        if g.comparison
    ]
    words = [
        {"group": r.title, "verdicts": {m: asdict(v) for m, v in r.verdicts.items()}, "measures": r.agreement}
        for r in replicates(found)
    ]
    return {"pairs": pairs, "verdicts": words}


def _word(verdict: Verdict) -> str:
    """Returns the word with what the null says about the standard slope."""
    if verdict.share is None or verdict.word == verdict.null:
        return verdict.word
    return f"{verdict.word} ({'null ' if verdict.null != 'beyond noise' else ''}{verdict.null})"


def _null_reason(verdict: Verdict) -> str:
    if verdict.null_share is None:
        return "change-matched null not measured"
    return f"change-matched null: {verdict.null}, it has {percent(verdict.null_share)} of the standard slope"


def _agreement_line(found: Agreement, measures: Sequence[str]) -> list[str]:
    if len(measures) < 2:
        return []
    verb = {"agree": "agree", "disagree": "DISAGREE", "undecided": "are not shown to agree"}[found]
    return [f"the measures {verb} on the sign of the slope ({', '.join(measures)})"]


def null_line(run: Run, measure: str) -> str:
    """Returns the relative slopes of a run's nulls as one phrase: the mean and range over the draws of each."""
    kinds = {"weights": run.null.get(measure), "change": run.matched_null.get(measure)}
    shown = [f"{show_draws(draws)} at the same size of {size}" for size, draws in kinds.items() if draws]
    if not shown:
        return (
            "not measured: DepthProfile(pretrained='cpu') measures it, with a copy of the weights in main memory and "
            "about 20 passes over the probe at the end"
        )
    return "relative slope " + ", ".join(shown)


def show_draws(draws: Profiles | None) -> str:
    """Formats the mean and the range of the null's relative slopes."""
    slopes = [p.relative_slope for p in draws or () if p.relative_slope is not None]
    if not slopes:
        return MISSING
    return f"{np.mean(slopes):+.3g} [{min(slopes):+.3g} to {max(slopes):+.3g} in {len(slopes)} draws]"


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


def show_rank(value: float | None) -> str:
    """Formats an effective rank, marked if it is low."""
    return show(value, ".1f") + (" !" if value is not None and value < LOW_RANK else "")


def layer_rows(group: Group, measures: Sequence[str], spreads: bool = False) -> list[list[str]]:
    """Returns one row per layer: index, name, change by measure and run, step ratio by run, and effective rank.

    Args:
        group: The runs.
        measures: The measures.
        spreads: Whether the matrix spread by run follows the step ratios.
    """
    profiles = [last(run, measure) for measure in measures for run in group.runs]
    columns: list[Sequence[Any]] = [shown_change(p) if p else () for p in profiles]
    columns += [list(map(show, run.layer_ratio.mean)) for run in group.runs]
    columns += [list(map(show, run.matrix_spread)) for run in group.runs if spreads]
    ranks = max((run.effective_rank for run in group.runs), key=len)
    return [
        [str(i), name, *(_at(column, i) or MISSING for column in columns), show_rank(_at(ranks, i))]
        for i, name in enumerate(group.layers)
    ]


def has_unresolved(rows: Sequence[Sequence[str]]) -> bool:
    """Returns whether `layer_rows` marked a change that rounding alone may give."""
    return any(UNRESOLVED in cell for row in rows for cell in row[2:])


def shown_change(profile: Profile) -> list[str]:
    """Formats the change of each layer, with a mark where it is not above the rounding error."""
    return [show(c) + (f" {UNRESOLVED}" if i in profile.unresolved else "") for i, c in enumerate(profile.change)]


def _at(column: Sequence[Any], index: int) -> Any:
    """Returns one value of a column, or None if the column is too short."""
    return column[index] if index < len(column) else None


def worth_line(run: Run, measure: str) -> str:
    """Returns one sentence on a run's worth: the layer whose change is worth most, and the rank correlation."""
    worth, profile = run.worth, last(run, measure)
    assert worth is not None
    most = max(range(len(worth.worth)), key=worth.worth.__getitem__)
    text = f"{run.name}: the change of {worth.layer_names[most]} is worth most, {worth.restored[most]} of the loss"
    return f"{text}; change and worth: {worth.rank_correlation(profile)}." if profile else f"{text}."
