"""What a study's finished runs say: a table of pairs, and the paper's five claims. Pure functions over results."""

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

#: Largest network, in parameters, of each class of size [paper: 125M-350M, 1.3B-1.4B, up to 6.9B].
SIZES = (("small", 0.6e9), ("medium", 2e9), ("large", np.inf))
#: With fewer models or runs than this on a side of a claim, it is not decided [ours].
FEWEST_MODELS, FEWEST_RUNS = 2, 4
#: A control that removed a smaller spread of step ratios than this had little to remove [ours].
LITTLE_SPREAD = 1.5
#: A null whose relative slope is this share of the run's, or more, explains its shape [ours].
NULL_EXPLAINS = 0.5
DRAWS = 400

#: Runs as a frame, or as one array per column.
Rows = Mapping[str, Any]


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, as a study decides it.

    Args:
        name: ``"C1"`` ... ``"C5"``.
        says: What the paper says.
        effect: What it is read off, in words.
        estimate: The effect's size; None without enough runs.
        interval: Its 95 % interval over models and seeds; None without enough of them.
        verdict: ``"supported"``, ``"not supported"`` or ``"not enough runs"``.
        notes: What else must be known: figures behind the effect, and what the null or the spread explain.
    """

    name: str
    says: str
    effect: str
    estimate: float | None
    interval: tuple[float, float] | None
    verdict: str
    notes: tuple[str, ...] = ()


def runs_table(results: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row per finished run.

    Args:
        results: As the runs' folders hold them.

    Returns:
        The axes, what the model is, slope and shape with intervals, losses, distance, step-ratio spread, null.
    """
    rows = []
    for result in results:
        if result["status"] != "finished":
            continue
        profile = {m: Profile.from_dict(p) for m, p in result["profiles"].items()}
        first = next(iter(profile.values()))
        null = [Profile.from_dict(p) for p in result["null"].get(first.measure, ())]
        low, high = first.slope_interval or (np.nan, np.nan)
        rows.append({
            **{axis: result["config"][axis] for axis in AXES},
            "pair": result["pair"],
            **{key: result["backbone"][key] for key in ("family", "block", "layers", "parameters")},
            "size": _size(result["backbone"]["parameters"]),
            "slope": first.slope, "slope_low": low, "slope_high": high,
            "relative_slope": first.relative_slope, "width": first.width, "centre": first.centre, "mean": first.mean,
            "distance": result["objective_distance"], "loss": result["loss"], "loss_before": result["loss_before"],
            "spread": result["wanted_spread"], "null_relative_slope": _mean(p.relative_slope for p in null),
            "null_slope": _mean(p.slope for p in null), "null_width": _mean(p.width for p in null),
            "profiles": profile, "initial_weights": result["initial_weights"], "data_order": result["data_order"],
            "precision": result.get("precision"),  # older results don't say
        })  # fmt: skip
    return pd.DataFrame(rows)


def pairs_table(runs: pd.DataFrame) -> pd.DataFrame:
    """One row per pair of finished runs, standard and equal-step.

    Args:
        runs: What `runs_table` gives.

    Returns:
        The table that a study is made for.

    Raises:
        ValueError: A pair whose runs differ in precision, did not start from the same weights, or did not see the same
            batches.
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
                    f"The pair {names} differs in {fact}: what it shows is not the control's. Run it again."
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


def claims(runs: pd.DataFrame) -> list[Claim]:
    """The five claims of the paper, decided by the runs of one optimizer."""
    return [_c1(runs), _c2(runs), _c3(runs), _c4(runs), _c5(runs)]


def interval(
    runs: pd.DataFrame,
    statistic: Callable[[Rows], float],
    within: Sequence[str] = (),
    bounds: tuple[float, float] = (-np.inf, np.inf),
    draws: int = DRAWS,
    seed: int = 0,
) -> tuple[float, float, float]:
    """An estimate with its 95 % interval by a hierarchical bootstrap: models are drawn, and seeds within them [ours].

    The bootstrap's standard error is widened by Student's t and sqrt(m / (m - 1)) for m models: with few of them the
    percentiles of the draws are too narrow. What lies beyond the values that the statistic can have is left out.

    Args:
        runs: Rows with ``model`` and ``seed``.
        statistic: Of such rows, given as one array per column, which is many times as fast as a frame.
        within: Columns whose groups each keep their number of models in a draw: sides that the statistic compares.
        bounds: Least and largest value that the statistic can have.
        draws: Bootstrap draws.
        seed: Of the draws.

    Returns:
        The estimate, and the interval's ends.
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
        labels: list[str] = []  # a model that is drawn twice counts as two
        for number, models in enumerate(strata.values()):
            for position, choice in enumerate(rng.integers(len(models), size=len(models))):
                seeds = models[choice]
                own = [row for i in rng.integers(len(seeds), size=len(seeds)) for row in seeds[i]]
                rows += own
                labels += [f"{number} {position}"] * len(own)
        value = statistic({name: column[rows] for name, column in columns.items()} | {"model": np.array(labels)})
        if np.isfinite(value):
            values.append(value)
    estimate, fewest = statistic(columns), min(map(len, strata.values()))
    if len(values) < draws / 2 or fewest < 2:
        return estimate, np.nan, np.nan
    freedom = sum(len(models) - 1 for models in strata.values())
    half = stats.t.ppf(0.975, freedom) * np.std(values, ddof=1) * np.sqrt(fewest / (fewest - 1))
    return estimate, max(estimate - half, bounds[0]), min(estimate + half, bounds[1])


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
    """Share of the runs, or of those that a mask selects, whose slope interval lies above 0."""
    kept = (rows["slope_low"] > 0)[np.broadcast_to(where, len(rows["slope_low"]))]
    return float(kept.mean()) if len(kept) else np.nan


def _contrast(rows: Rows, size: str = "small") -> float:
    """How much more often sequential blocks keep the slope than parallel ones, where the objective is not causal LM."""
    other = (rows["objective"] != "causal_lm") & (rows["size"] == size)
    return _kept(rows, other & (rows["block"] == "sequential")) - _kept(rows, other & (rows["block"] == "parallel"))


def _compared(runs: pd.DataFrame, sizes: Sequence[str]) -> pd.DataFrame:
    """The equal-step runs that C2 and C3 speak of: transformer blocks of these sizes."""
    return runs[
        (runs["control"] == "equal-step") & runs["block"].isin(["sequential", "parallel"]) & runs["size"].isin(sizes)
    ]


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
    """Share of a column's variance that lies between the levels of a factor (eta squared)."""
    values = np.asarray(rows[column], dtype=float)
    _, level = np.unique(np.asarray(rows[factor]), return_inverse=True)
    means = (np.bincount(level, values) / np.bincount(level))[level]
    total = float(((values - values.mean()) ** 2).sum())
    return float(((means - values.mean()) ** 2).sum()) / total if total > 0 else np.nan


def _few(rows: pd.DataFrame) -> bool:
    return len(rows) < FEWEST_RUNS or rows["model"].nunique() < FEWEST_MODELS


def _spread_note(equal: pd.DataFrame) -> list[str]:
    """Whether the control had something to remove."""
    spread = float(equal["spread"].median())
    note = f"the control removed a median step-ratio spread of {spread:.2f}x"
    return [note + (": little to remove, so a kept slope is weak evidence" if spread < LITTLE_SPREAD else "")]


def _mean(values: Iterable[float | None]) -> float:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else np.nan


def _shape_notes(rows: pd.DataFrame) -> list[str]:
    """Whether the null has the slopes that these runs have or keep."""
    kept = rows[rows["slope_low"] > 0]
    explained_ones = int((kept["null_relative_slope"] / kept["relative_slope"] >= NULL_EXPLAINS).sum())
    note = f"of the {len(kept)} runs with a slope, the null has {NULL_EXPLAINS:.0%} of it or more in {explained_ones}"
    if len(kept) and explained_ones / len(kept) >= 0.5:
        return [note, "the null explains the shape of most of these profiles: it is no evidence about training"]
    return [note]


def _null_note(estimate: float, null: float) -> str:
    """What the effect is on the null's profiles in place of the runs'."""
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
