"""Tables of a study: one row per run, per pair of runs, and per cell (a model with an objective)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from depthcb.intervals import Estimate
from depthcb.profile import Profile
from depthcb.verdict import BOUNDS, FEWEST_PAIRS, NULL_EXPLAINS, compare_pair, judge
from depthcb_recipes.studies.grid import AXES
from depthcb_recipes.studies.result import Result

#: Largest number of parameters in each size class [paper: 125M-350M, 1.3B-1.4B, up to 6.9B].
SIZES = (("small", 0.6e9), ("medium", 2e9), ("large", np.inf))
#: A cell keeps its slope if more than this share of it is left under the control [ours].
KEEPS = BOUNDS[1]
CELL = ["model", "objective"]


def runs_table(results: Sequence[Result], measure: str | None = None) -> pd.DataFrame:
    """One row per finished run.

    Args:
        results: The runs' results; runs without figures are skipped.
        measure: The measure that slopes and nulls are of; None for each run's first one.

    Returns:
        The axes, facts on the model, slope and shape with intervals, losses, distance, step-ratio spread, nulls.
    """
    rows = []
    for result in results:
        figures = result.figures
        if figures is None:
            continue
        profile = {m: Profile.from_dict(p) for m, p in figures.profiles.items()}
        first = next(iter(profile.values())) if measure is None else profile[measure]
        nulls = [Profile.from_dict(p).relative_slope for p in figures.null.get(first.measure, ())]
        matched = [Profile.from_dict(p).relative_slope for p in figures.matched_null.get(first.measure, ())]
        low, high = first.slope_interval or (np.nan, np.nan)
        distance = figures.objective_distance_interval or (np.nan, np.nan)
        rows.append({
            **{axis: getattr(result.config, axis) for axis in AXES},
            "pair": figures.pair,
            **{key: figures.backbone[key] for key in ("family", "block", "layers", "parameters")},
            "size": _size(figures.backbone["parameters"]),
            "slope": first.slope, "slope_low": low, "slope_high": high, "relative_slope": first.relative_slope,
            "depth_corrected_slope": first.depth_corrected_slope,
            "width": first.width, "centre": first.centre, "mean": first.mean,
            "distance": figures.objective_distance, "distance_low": distance[0], "distance_high": distance[1],
            "distance_procrustes": _mean([figures.objective_procrustes_uncorrected]),
            "loss": figures.loss, "loss_before": figures.loss_before,
            "spread": figures.wanted_spread, "floor": max(first.floor) if first.floor else np.nan,
            "null": _mean(nulls), "null_low": _extreme(min, nulls),
            "null_high": _extreme(max, nulls), "matched_null": _mean(matched),
            "worth": np.nan if figures.worth_correlation is None else figures.worth_correlation,
            "profiles": profile, "measure": first.measure,
            "initial_weights": figures.initial_weights, "data_order": figures.data_order,
            "precision": figures.precision,
        })  # fmt: skip
    return pd.DataFrame(rows)


def pairs_table(runs: pd.DataFrame) -> pd.DataFrame:
    """One row per pair of finished runs, standard and equal-step.

    Args:
        runs: What `runs_table` gives.

    Returns:
        The pairs, with both slopes and what is left of the slope, by paired intervals over the probe's halves.

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
        found = compare_pair(*(row["profiles"][row["measure"]] for row in (a, b)))
        rows.append({
            **{key: a[key] for key in (*AXES, "family", "block", "size", "layers", "parameters") if key != "control"},
            **{f"{key}_{side}": row[key] for side, row in (("standard", a), ("equal", b)) for key in _SIDES},
            **_columns("difference", found.difference if found else None),
            **_columns("share", found.share if found else None),
            "width": a["width"], "distance": a["distance"], "spread": b["spread"],
        })  # fmt: skip
    return pd.DataFrame(rows)


#: The columns of a pair that each of its two runs has.
_SIDES = (
    "slope", "slope_low", "slope_high", "relative_slope", "depth_corrected_slope", "loss", "null", "null_low",
    "null_high", "matched_null",
)  # fmt: skip


def cells_table(runs: pd.DataFrame) -> pd.DataFrame:
    """One row per cell of one optimizer's runs: a model with an objective, over its seeds.

    Intervals are Student's, with the variance within cells pooled over all cells, so that two seeds per cell are
    enough [ours]. A cell *keeps* its slope if the interval of the share that is left under the control lies above 0.2,
    it *does not* if below 0.2 (by the interval of equal-step minus 0.2 x standard slope, no ratio); else, or if the
    standard slope's interval contains 0, it is *open*. The word is that of `depthcb.verdict.judge`, from 4 seeds on.

    Args:
        runs: Rows of `runs_table`.

    Returns:
        The facts on each model, mean relative slopes with intervals, ``keeps``, the word, mean width and distance.
    """
    usable = runs[runs["relative_slope"].notna()]
    standard = usable[usable["control"] == "standard"]
    cells = standard.groupby(CELL, sort=False).agg(
        family=("family", "first"), block=("block", "first"), size=("size", "first"), layers=("layers", "first"),
        seeds=("seed", "nunique"), width=("width", "mean"), distance=("distance", "mean"),
        distance_low=("distance_low", "mean"), distance_high=("distance_high", "mean"),
        null_low=("null_low", "min"), null_high=("null_high", "max"), floor=("floor", "max"),
    )  # fmt: skip
    equal = usable[usable["control"] == "equal-step"]
    both = standard.merge(equal, on=[*CELL, "seed"], suffixes=("", "_equal"))
    cells = cells.join(pooled(standard, standard["relative_slope"], "slope"))
    weighed = standard[standard["worth"].notna()]
    cells = cells.join(pooled(weighed, weighed["worth"], "worth"))
    sign = np.sign(cells["slope"]).where(lambda s: s != 0, 1.0)
    contrast = both["relative_slope_equal"] - KEEPS * both["relative_slope"]
    cells = cells.join(pooled(both, contrast, "above"))
    cells = cells.join(both.groupby(CELL)["relative_slope_equal"].mean().rename("equal"))
    cells = cells.join(equal.groupby(CELL)["spread"].median())
    cells = cells.join(both.groupby(CELL).size().rename("pairs"))
    cells["pairs"] = cells["pairs"].fillna(0).astype(int)
    decided = has_slope(cells)
    cells["share"] = (cells["equal"] / cells["slope"]).where(decided)
    cells["above"] *= sign  # signed so that the standard slope is positive, as the share is
    cells["above_low"], cells["above_high"] = _signed_ends(cells, "above", sign)
    cells["keeps"] = "open"
    cells.loc[decided & (cells["above_low"] > 0), "keeps"] = "keeps"
    cells.loc[decided & (cells["above_high"] < 0), "keeps"] = "does not"
    cells["null_word"] = _null_words(standard, decided, sign)
    pairs = dict(iter(both.groupby(CELL)))
    cells["word"] = [_word(pairs.get(key, both[:0])) for key in cells.index]
    return cells.reset_index()


def has_slope(cells: pd.DataFrame) -> pd.Series:
    """Returns whether the interval of each cell's standard slope excludes 0."""
    return cells["slope_low"] * cells["slope_high"] > 0


def pooled(rows: pd.DataFrame, values: pd.Series, name: str) -> pd.DataFrame:
    """Returns each cell's mean with a 95 % interval by the variance within cells, pooled over all cells.

    Args:
        rows: Rows with the columns of `CELL`.
        values: One value per row.
        name: Name of the column; those of the ends are ``name_low`` and ``name_high``, NaN if no cell has two rows;
            ``name_se`` is the standard error.

    Returns:
        A frame indexed by cell.
    """
    grouped = values.groupby([rows[key] for key in CELL], sort=False)
    mean, count = grouped.mean(), grouped.size()
    freedom = int((count - 1).sum())
    variance = float(((values - grouped.transform("mean")) ** 2).sum()) / freedom if freedom else np.nan
    error = np.sqrt(variance / count)
    half = error * stats.t.ppf(0.975, freedom) if freedom else error
    return pd.DataFrame({name: mean, f"{name}_se": error, f"{name}_low": mean - half, f"{name}_high": mean + half})


def _null_words(standard: pd.DataFrame, decided: pd.Series, sign: pd.Series) -> pd.Series:
    """Returns what the change-matched null says about each cell's standard slope, as `judge` does about a pair's."""
    known = standard[standard["matched_null"].notna()]
    words = pd.Series("not measured", index=decided.index)
    if known.empty:
        return words
    beyond = pooled(known, known["matched_null"] - NULL_EXPLAINS * known["relative_slope"], "null").reindex(words.index)
    low, high = _signed_ends(beyond, "null", sign)
    words[beyond["null"].notna()] = "undecided"
    words[decided & (low > 0)] = "no more than noise"
    words[decided & (high < 0)] = "beyond noise"
    return words


def _signed_ends(table: pd.DataFrame, name: str, sign: pd.Series) -> tuple[pd.Series, pd.Series]:
    """Returns the ends of each cell's interval, signed so that its standard slope is positive."""
    ends = table[[f"{name}_low", f"{name}_high"]].mul(sign, axis=0)
    return ends.min(axis=1), ends.max(axis=1)


def _word(pairs: pd.DataFrame) -> str:
    """Returns the verdict over a cell's pairs; a note if there are too few."""
    if len(pairs) < FEWEST_PAIRS:
        return f"{len(pairs)} of {FEWEST_PAIRS} seeds"
    null = list(pairs["matched_null"]) if pairs["matched_null"].notna().all() else []
    return judge(list(pairs["relative_slope"]), list(pairs["relative_slope_equal"]), null).word


def _columns(name: str, estimate: Estimate | None) -> dict[str, float]:
    ends = (estimate.value, estimate.low, estimate.high) if estimate else (np.nan, np.nan, np.nan)
    return dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))


def _mean(values: Iterable[float | None]) -> float:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else np.nan


def _extreme(choose: Any, values: Iterable[float | None]) -> float:
    return float(choose((value for value in values if value is not None), default=np.nan))


def _size(parameters: float) -> str:
    return next(name for name, largest in SIZES if parameters <= largest)
