"""The table of a study's pairs, and the paper's claims, computed from the results of its runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from depthcb.profile import Profile
from depthcb.verdict import judge
from depthcb_recipes.studies.grid import AXES
from depthcb_recipes.studies.result import Result

#: Largest number of parameters in each size class [paper: 125M-350M, 1.3B-1.4B, up to 6.9B].
SIZES = (("small", 0.6e9), ("medium", 2e9), ("large", np.inf))
#: A claim with fewer models or runs than this on one side is not decided [ours].
FEWEST_MODELS, FEWEST_RUNS = 2, 4
#: A control that removed a smaller spread of step ratios than this had little effect [ours].
LITTLE_SPREAD = 1.5
#: The null explains a run's shape if it has at least this share of its relative slope [ours].
NULL_EXPLAINS = 0.5
DRAWS = 400

#: Runs as a frame, or as one array per column.
Rows = Mapping[str, Any]


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, as decided by a study.

    Args:
        name: Its short name, such as ``"C1"``.
        says: The claim.
        effect: The quantity that decides it, in words.
        estimate: The effect's size; None without enough runs.
        interval: Its 95 % interval over models and seeds; None without enough of them.
        verdict: ``"supported"``, ``"not supported"`` or ``"not enough runs"``.
        notes: The figures behind the effect, and what the null or the spread explain.
    """

    name: str
    says: str
    effect: str
    estimate: float | None
    interval: tuple[float, float] | None
    verdict: str
    notes: tuple[str, ...] = ()


def runs_table(results: Sequence[Result]) -> pd.DataFrame:
    """One row per finished run.

    Args:
        results: The runs' results; runs without figures are skipped.

    Returns:
        The axes, facts on the model, slope and shape with intervals, losses, distance, step-ratio spread, null.
    """
    rows = []
    for result in results:
        figures = result.figures
        if figures is None:
            continue
        profile = {m: Profile.from_dict(p) for m, p in figures.profiles.items()}
        first = next(iter(profile.values()))
        null = [Profile.from_dict(p) for p in figures.null.get(first.measure, ())]
        low, high = first.slope_interval or (np.nan, np.nan)
        rows.append({
            **{axis: getattr(result.config, axis) for axis in AXES},
            "pair": figures.pair,
            **{key: figures.backbone[key] for key in ("family", "block", "layers", "parameters")},
            "size": _size(figures.backbone["parameters"]),
            "slope": first.slope, "slope_low": low, "slope_high": high,
            "relative_slope": first.relative_slope, "width": first.width, "centre": first.centre, "mean": first.mean,
            "distance": figures.objective_distance, "loss": figures.loss, "loss_before": figures.loss_before,
            "spread": figures.wanted_spread, "null_relative_slope": _mean(p.relative_slope for p in null),
            "null_slope": _mean(p.slope for p in null), "null_width": _mean(p.width for p in null),
            "profiles": profile, "initial_weights": figures.initial_weights, "data_order": figures.data_order,
            "precision": figures.precision,
        })  # fmt: skip
    return pd.DataFrame(rows)


def pairs_table(runs: pd.DataFrame) -> pd.DataFrame:
    """One row per pair of finished runs, standard and equal-step.

    Args:
        runs: What `runs_table` gives.

    Returns:
        The pairs, with both slopes, what the control retained, the verdict and its context.

    Raises:
        ValueError: The runs of a pair differ in precision, in their initial weights or in their batches.
    """
    rows = []
    for _, both in runs.groupby("pair", sort=False):
        sides = {row["control"]: row for _, row in both.iterrows()}
        if set(sides) != {"standard", "equal-step"}:
            continue
        a, b = sides["standard"], sides["equal-step"]
        for fact in ("precision", "initial_weights", "data_order"):
            if a[fact] != b[fact]:
                names = ", ".join(str(a[axis]) for axis in AXES if axis != "control")
                raise ValueError(
                    f"The pair {names} differs in {fact}, so it does not isolate the control. Run it again."
                )
        verdict = judge(a["profiles"], b["profiles"], b["spread"])
        share = b["relative_slope"] / a["relative_slope"] if a["relative_slope"] else np.nan
        rows.append({
            **{key: a[key] for key in (*AXES, "family", "block", "size", "parameters") if key != "control"},
            **{f"{key}_{side}": row[key] for side, row in (("standard", a), ("equal", b))
               for key in ("slope", "slope_low", "slope_high", "relative_slope", "loss", "null_relative_slope")},
            "retained": share, "verdict": verdict.verdict, "measures_agree": verdict.measures_agree,
            "width": a["width"], "distance": a["distance"], "spread": b["spread"],
        })  # fmt: skip
    return pd.DataFrame(rows)


#: The functions that decide the claims, in the order of their definition.
_CLAIMS: list[Callable[[pd.DataFrame], Claim]] = []


def _claim(decide: Callable[[pd.DataFrame], Claim]) -> Callable[[pd.DataFrame], Claim]:
    """Registers a function that decides a claim."""
    _CLAIMS.append(decide)
    return decide


def claims(runs: pd.DataFrame) -> list[Claim]:
    """Decides the paper's claims by the runs of one optimizer.

    Args:
        runs: Rows of `runs_table`.
    """
    return [decide(runs) for decide in _CLAIMS]


def interval(
    runs: pd.DataFrame,
    statistic: Callable[[Rows], float],
    within: Sequence[str] = (),
    bounds: tuple[float, float] = (-np.inf, np.inf),
    draws: int = DRAWS,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Computes an estimate and its 95 % interval by a hierarchical bootstrap over models, and seeds within them [ours].

    The bootstrap's standard error is widened by Student's t and sqrt(m / (m - 1)) for m models: with few of them the
    percentiles of the draws are too narrow. The interval is cut at the bounds of the statistic.

    Args:
        runs: Rows with ``model`` and ``seed``.
        statistic: A function of such rows, given as one array per column, which is much faster than a frame.
        within: Columns whose groups the statistic compares; each group keeps its number of models in a draw.
        bounds: Smallest and largest possible value of the statistic.
        draws: Bootstrap draws.
        seed: Seed of the draws.

    Returns:
        The estimate and the ends of the interval, which are NaN if there are too few models.
    """
    rng = np.random.default_rng(seed)
    strata: dict[Any, list[list[list[int]]]] = {}  # row numbers by stratum, model and seed
    numbered = runs.reset_index(drop=True)
    columns = {name: numbered[name].to_numpy() for name in numbered}
    for key, of in numbered.groupby([*within, "model"], sort=True):
        strata.setdefault(key[:-1], []).append([list(rows.index) for _, rows in of.groupby("seed")])
    values = []
    for _ in range(draws):
        rows: list[int] = []
        labels: list[int] = []  # a model that is drawn twice counts as two models
        for models in strata.values():
            for choice in rng.integers(len(models), size=len(models)):
                seeds = models[choice]
                own = [row for i in rng.integers(len(seeds), size=len(seeds)) for row in seeds[i]]
                labels += [labels[-1] + 1 if labels else 0] * len(own)
                rows += own
        drawn = np.array(rows)
        value = statistic({name: column[drawn] for name, column in columns.items()} | {"model": np.array(labels)})
        if np.isfinite(value):
            values.append(value)
    estimate, fewest = statistic(columns), min(map(len, strata.values()))
    if len(values) < draws / 2 or fewest < 2:
        return estimate, np.nan, np.nan
    freedom = sum(len(models) - 1 for models in strata.values())
    half = stats.t.ppf(0.975, freedom) * np.std(values, ddof=1) * np.sqrt(fewest / (fewest - 1))
    return estimate, max(estimate - half, bounds[0]), min(estimate + half, bounds[1])


@_claim
def _c1(runs: pd.DataFrame) -> Claim:
    says = "Change concentrates in output-proximal layers in every standard run but one."
    standard = runs[runs["control"] == "standard"]
    effect = "share of standard runs whose slope interval lies above 0"
    if _few(standard):
        return _undecided("C1", says, effect, standard)
    value = interval(standard, _kept, bounds=(0.0, 1.0))
    exceptions = int((~(standard["slope_low"] > 0)).sum())
    allowed = max(1, round(len(standard) / 120))  # one of the paper's 120 standard runs
    notes = [f"{exceptions} of {len(standard)} runs are exceptions", *_shape_notes(standard)]
    return _decided("C1", says, effect, value, exceptions <= allowed, notes)


def _kept(rows: Rows, where: Any = True) -> float:
    """Returns the share of the (masked) runs whose slope interval lies above 0."""
    kept = (rows["slope_low"] > 0)[np.broadcast_to(where, len(rows["slope_low"]))]
    return float(kept.mean()) if len(kept) else np.nan


def _contrast(rows: Rows, size: str = "small") -> float:
    """Returns the share of runs that keep the slope, sequential minus parallel, for objectives other than causal LM."""
    other = (rows["objective"] != "causal_lm") & (rows["size"] == size)
    return _kept(rows, other & (rows["block"] == "sequential")) - _kept(rows, other & (rows["block"] == "parallel"))


def _compared(runs: pd.DataFrame, sizes: Sequence[str]) -> pd.DataFrame:
    """Returns the equal-step runs of transformer blocks of these sizes, which C2 and C3 are about."""
    return runs[
        (runs["control"] == "equal-step") & runs["block"].isin(["sequential", "parallel"]) & runs["size"].isin(sizes)
    ]


@_claim
def _c2(runs: pd.DataFrame) -> Claim:
    says = (
        "Under equal step, sequential blocks keep the slope across objectives, parallel blocks only for causal "
        "language modelling (125M-350M)."
    )
    effect = "share of equal-step runs that keep the slope, sequential minus parallel, objectives other than causal LM"
    equal = _compared(runs, ["small"])
    sides = {block: equal[equal["block"] == block] for block in ("sequential", "parallel")}
    if any(_few(side) or side["objective"].nunique() < 2 for side in sides.values()):
        return _undecided("C2", says, effect, equal)
    value = interval(equal, _contrast, ("block",), bounds=(-1.0, 1.0))
    by = {(b, o): _kept(rows) for b, side in sides.items() for o, rows in side.groupby("objective")}
    sequential = min(share for (block, _), share in by.items() if block == "sequential")
    causal = by.get(("parallel", "causal_lm"), np.nan)
    shares = ", ".join(f"{block} {objective} {share:.0%}" for (block, objective), share in by.items())
    notes = [f"keep the slope: {shares}", *_spread_note(equal), *_shape_notes(equal)]
    return _decided("C2", says, effect, value, bool(value[1] > 0 and sequential > 0.5 and causal > 0.5), notes)


@_claim
def _c3(runs: pd.DataFrame) -> Claim:
    says = "The distinction narrows at 1.3B-1.4B."
    effect = "the contrast of C2 at 125M-350M minus that at 1.3B-1.4B"
    equal = _compared(runs, ["small", "medium"])
    cells = equal.groupby(["block", "size"]).size()
    if any(cells.get((b, s), 0) < FEWEST_RUNS for b in ("sequential", "parallel") for s in ("small", "medium")):
        return _undecided("C3", says, effect, equal)

    def narrowing(rows: Rows) -> float:
        return _contrast(rows, "small") - _contrast(rows, "medium")

    value = interval(equal, narrowing, ("block", "size"), bounds=(-2.0, 2.0))
    return _decided("C3", says, effect, value, value[1] > 0, [*_spread_note(equal), *_shape_notes(equal)])


@_claim
def _c4(runs: pd.DataFrame) -> Claim:
    says = "Steepness tracks the objective's distance at initialisation."
    effect = "rank correlation of slope with objective distance over standard runs"
    standard = runs[(runs["control"] == "standard") & runs["distance"].notna()]
    if _few(standard) or standard["distance"].nunique() < 3:
        return _undecided("C4", says, effect, standard)

    def correlation(rows: Rows) -> float:
        a, b = stats.rankdata(rows["slope"]), stats.rankdata(rows["distance"])
        return float(np.corrcoef(a, b)[0, 1]) if np.ptp(a) and np.ptp(b) else np.nan

    value = interval(standard, correlation, bounds=(-1.0, 1.0))
    null = correlation(standard.assign(slope=standard["null_slope"]))
    return _decided("C4", says, effect, value, value[1] > 0, [_null_note(value[0], null)])


@_claim
def _c5(runs: pd.DataFrame) -> Claim:
    says = "The width of the profile is dominated by the architecture."
    effect = "share of the variance of width that the model explains, minus that which the objective explains"
    standard = runs[(runs["control"] == "standard") & runs["width"].notna()]
    if _few(standard) or standard["objective"].nunique() < 2:
        return _undecided("C5", says, effect, standard)

    def difference(rows: Rows) -> float:
        return explained(rows, "model") - explained(rows, "objective")

    value, null = interval(standard, difference, bounds=(-1.0, 1.0)), standard.assign(width=standard["null_width"])
    shares = f"model {explained(standard, 'model'):.0%}, objective {explained(standard, 'objective'):.0%}"
    return _decided("C5", says, effect, value, value[1] > 0, [shares, _null_note(value[0], difference(null))])


def explained(rows: Rows, factor: str, column: str = "width") -> float:
    """Returns the share of a column's variance between the levels of a factor (eta squared)."""
    values = np.asarray(rows[column], dtype=float)
    _, level = np.unique(np.asarray(rows[factor]), return_inverse=True)
    means = (np.bincount(level, values) / np.bincount(level))[level]
    total = float(((values - values.mean()) ** 2).sum())
    return float(((means - values.mean()) ** 2).sum()) / total if total > 0 else np.nan


def _few(rows: pd.DataFrame) -> bool:
    return len(rows) < FEWEST_RUNS or rows["model"].nunique() < FEWEST_MODELS


def _spread_note(equal: pd.DataFrame) -> list[str]:
    """Says whether the control had something to remove."""
    spread = float(equal["spread"].median())
    note = f"the control removed a median step-ratio spread of {spread:.2f}x"
    return [note + (": little to remove, so a kept slope is weak evidence" if spread < LITTLE_SPREAD else "")]


def _mean(values: Iterable[float | None]) -> float:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else np.nan


def _shape_notes(rows: pd.DataFrame) -> list[str]:
    """Says how many of the runs' slopes the null explains."""
    kept = rows[rows["slope_low"] > 0]
    explained_ones = int((kept["null_relative_slope"] / kept["relative_slope"] >= NULL_EXPLAINS).sum())
    note = f"of the {len(kept)} runs with a slope, the null has {NULL_EXPLAINS:.0%} of it or more in {explained_ones}"
    if len(kept) and explained_ones / len(kept) >= 0.5:
        return [note, "the null explains the shape of most of these profiles: it is no evidence about training"]
    return [note]


def _null_note(estimate: float, null: float) -> str:
    """Says how large the effect is on the null's profiles instead of the runs'."""
    explains = null / estimate >= NULL_EXPLAINS if estimate else False
    note = f"on the null's profiles the effect is {null:+.3g}"
    return note + (": the null explains it, so it is no evidence about training" if explains else "")


def _decided(
    name: str, says: str, effect: str, value: tuple[float, float, float], holds: bool, notes: Sequence[str]
) -> Claim:
    estimate, low, high = value
    verdict = "supported" if holds else "not supported"
    found = None if np.isnan([low, high]).any() else (low, high)
    return Claim(name, says, effect, estimate, found, verdict, tuple(notes))


def _undecided(name: str, says: str, effect: str, rows: pd.DataFrame) -> Claim:
    there = f"{len(rows)} runs of {rows['model'].nunique() if len(rows) else 0} models"
    return Claim(name, says, effect, None, None, "not enough runs", (there,))


def _size(parameters: float) -> str:
    return next(name for name, largest in SIZES if parameters <= largest)
