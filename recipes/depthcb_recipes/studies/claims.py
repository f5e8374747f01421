"""The paper's five claims, decided by the runs of a study."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from depthcb.profile import FloatArray
from depthcb.style import show
from depthcb_recipes.studies.tables import cells_table, has_slope

#: Claims are tested one-sided at this level [ours].
LEVEL = 0.025
#: C1: the share of cells with a positive slope that its lower bound (at 95 %, one-sided) must exceed [ours].
MOST = 0.75
#: C1: with fewer cells, the bound stays below that share even if all slopes are positive.
FEWEST_CELLS = 11
#: C2: fewer cells of parallel blocks with other objectives than causal LM decide nothing [ours].
FEWEST_PARALLEL = 6
#: C3: with one model of a kind, models cannot be told from kinds.
FEWEST_MODELS = 2
#: C4: with fewer objectives, not even a perfect correlation is significant under permutation.
FEWEST_OBJECTIVES = 5
#: C5: fewer levels of a factor leave its variance open.
FEWEST_LEVELS = 3
#: Objectives that train a new head: its random weights alone make their distance about 1.
NEW_HEAD = ("sequence_classification", "token_classification")
#: A control that removed a smaller spread of step ratios than this had little effect [ours].
LITTLE_SPREAD = 1.5
#: Draws for C5's interval.
DRAWS = 20_000
#: Draws of the distances from their intervals, for C4's note.
DISTANCE_DRAWS = 200


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, as decided by a study.

    Args:
        name: Its short name, such as ``"C1"``.
        says: The claim.
        effect: The quantity that decides it, in words.
        verdict: ``"supported"``, ``"not supported"``, ``"undecided"`` or ``"not enough ..."``.
        estimate: The effect's size; None if there is not enough to estimate it.
        interval: Its 95 % interval; None where the test has none.
        p: One-sided p-value of the claim; None if it was not tested.
        holm: The same, Holm-corrected over the tested claims.
        notes: The figures behind the effect, and what limits it.
    """

    name: str
    says: str
    effect: str
    verdict: str
    estimate: float | None = None
    interval: tuple[float, float] | None = None
    p: float | None = None
    holm: float | None = None
    notes: tuple[str, ...] = ()


#: A function that decides a claim by the rows of `cells_table` and of `runs_table`.
Decide = Callable[[pd.DataFrame, pd.DataFrame], Claim]
#: These functions by the claim's name, in the order of their definition.
CLAIMS: dict[str, Decide] = {}


def _claim(name: str) -> Callable[[Decide], Decide]:
    """Registers a function that decides a claim."""

    def register(decide: Decide) -> Decide:
        CLAIMS[name] = decide
        return decide

    return register


def claims(runs: pd.DataFrame) -> list[Claim]:
    """Decides the paper's claims by the runs of one optimizer [ours].

    The unit is the cell: a model with an objective, over its seeds. Tests are one-sided at 2.5 %.

    Args:
        runs: Rows of `runs_table`.
    """
    cells = cells_table(runs)
    found = [decide(cells, runs) for decide in CLAIMS.values()]
    corrected = iter(_holm([claim.p for claim in found if claim.p is not None]))
    return [claim if claim.p is None else dataclasses.replace(claim, holm=next(corrected)) for claim in found]


def _holm(values: Sequence[float]) -> list[float]:
    """Returns p-values corrected by Holm's method.

    >>> [round(p, 6) for p in _holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    p = np.asarray(values, dtype=np.float64)
    order = np.argsort(p)
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)
    return [float(value) for value in corrected]


@_claim("C1")
def _c1(cells: pd.DataFrame, runs: pd.DataFrame) -> Claim:
    claim = Claim(
        "C1",
        "Change concentrates in output-proximal layers in every standard run but one.",
        "share of cells (model x objective) whose mean standard slope is positive",
        "not enough cells",
    )
    positive, total = int((cells["slope"] > 0).sum()), len(cells)
    standard = runs[(runs["control"] == "standard") & runs["relative_slope"].notna()]
    nulls = cells["null_word"].value_counts()
    notes = (
        f"{positive} of {total} cells, the interval of {int((~has_slope(cells)).sum())} holds 0",
        f"{int((standard['relative_slope'] > 0).sum())} of {len(standard)} runs; the paper: 189 of 190",
        "change-matched null: " + ", ".join(f"{word} in {count} cells" for word, count in nulls.items()),
    )
    if total < FEWEST_CELLS:
        return dataclasses.replace(claim, verdict=f"not enough cells ({total} of {FEWEST_CELLS})", notes=notes)
    exact = stats.binomtest(positive, total, MOST, alternative="greater")
    low = exact.proportion_ci(0.95).low
    high = stats.binomtest(positive, total, MOST, alternative="less").proportion_ci(0.95).high
    verdict = "supported" if low > MOST else "not supported" if high < MOST else "undecided"
    return dataclasses.replace(
        claim, verdict=verdict, estimate=positive / total, interval=(low, high), p=float(exact.pvalue), notes=notes
    )


@_claim("C2")
def _c2(cells: pd.DataFrame, runs: pd.DataFrame) -> Claim:
    claim = Claim(
        "C2",
        "Under equal step, sequential blocks keep the slope across objectives, parallel blocks only for causal "
        "language modelling (125M-350M).",
        "mean of equal-step minus 0.2 x standard slope, by block type and objective: above 0 is kept",
        "not enough cells",
    )
    small = cells[(cells["size"] == "small") & cells["block"].isin(["sequential", "parallel"]) & (cells["pairs"] > 0)]
    counts = small.groupby(["block", "objective"])["keeps"].value_counts().unstack(fill_value=0)
    notes = tuple(
        f"{block} {objective}: " + ", ".join(f"{row[word]} {word}" for word in counts.columns if row[word])
        for (block, objective), row in counts.iterrows()
    )
    notes = (*notes, *_spread_note(runs))
    parallel = small[small["block"] == "parallel"]
    others = parallel[parallel["objective"] != "causal_lm"]
    missing = [
        *([f"{len(others)} of {FEWEST_PARALLEL} cells of parallel blocks with other objectives than causal LM"]
          if len(others) < FEWEST_PARALLEL else []),
        *(["no parallel block with causal LM"] if len(others) == len(parallel) else []),
        *(["fewer than 2 objectives with sequential blocks"]
          if small[small["block"] == "sequential"]["objective"].nunique() < 2 else []),
    ]  # fmt: skip
    if missing:
        return dataclasses.replace(claim, verdict=f"not enough cells ({'; '.join(missing)})", notes=notes)
    freedom = int((cells["pairs"] - 1).clip(lower=0).sum())  # of the pooled variance that "above_se" comes from
    parts = [_part(group, block == "sequential" or objective == "causal_lm", freedom)
             for (block, objective), group in small.groupby(["block", "objective"])]  # fmt: skip
    if freedom < 1 or any(part is None for part in parts):
        return dataclasses.replace(claim, verdict="undecided", notes=notes)
    held = [part for part in parts if part is not None]
    p = max(part[0] for part in held)
    against = len(held) * min(part[1] for part in held)
    verdict = "supported" if p <= LEVEL else "not supported" if against <= LEVEL else "undecided"
    return dataclasses.replace(claim, verdict=verdict, p=p, notes=notes)


def _part(group: pd.DataFrame, keeps: bool, freedom: int) -> tuple[float, float] | None:
    """Tests whether the blocks of a type keep the slope with an objective, or don't, on average over its models.

    Args:
        group: Their cells.
        keeps: Whether they are expected to keep it.
        freedom: Degrees of freedom of the cells' standard errors.

    Returns:
        The p-values for and against the expectation; None if at most half of the cells have a standard slope.
    """
    known = group[has_slope(group)]
    if 2 * len(known) <= len(group):
        return None
    mean, error = known["above"].mean(), np.sqrt((known["above_se"] ** 2).sum()) / len(known)
    t = (mean if keeps else -mean) / error
    return float(stats.t.sf(t, freedom)), float(stats.t.cdf(t, freedom))


@_claim("C3")
def _c3(cells: pd.DataFrame, runs: pd.DataFrame) -> Claim:
    claim = Claim(
        "C3",
        "The distinction narrows at 1.3B-1.4B.",
        "share of the slope left under equal step, objectives other than causal LM: |sequential - parallel| at "
        "125M-350M minus the same at 1.3B-1.4B",
        "not enough models",
    )
    compared = cells[
        cells["block"].isin(["sequential", "parallel"])
        & cells["size"].isin(["small", "medium"])
        & (cells["objective"] != "causal_lm")
        & cells["share"].notna()
    ]
    shares = compared.groupby(["size", "block", "model"])["share"].mean()
    groups = {
        (size, block): shares[size][block].to_numpy() if (size, block) in shares.index.droplevel(2) else np.empty(0)
        for size, block in itertools.product(("small", "medium"), ("sequential", "parallel"))
    }
    notes = tuple(f"{size} {block}: {len(s)} models" for (size, block), s in groups.items())
    if min(map(len, groups.values())) < FEWEST_MODELS:
        return dataclasses.replace(claim, notes=notes)
    freedom = sum(len(s) - 1 for s in groups.values())
    variance = sum(float(((s - s.mean()) ** 2).sum()) for s in groups.values()) / freedom
    small, medium = (groups[z, "sequential"].mean() - groups[z, "parallel"].mean() for z in ("small", "medium"))
    errors = {z: variance * sum(1 / len(groups[z, b]) for b in ("sequential", "parallel")) for z in ("small", "medium")}
    sign = 1.0 if small >= 0 else -1.0
    both = np.sqrt(errors["small"] + errors["medium"])
    there = 2 * float(stats.t.sf(abs(small) / np.sqrt(errors["small"]), freedom))
    narrower, not_reversed = (float(stats.t.sf((sign * small + side * medium) / both, freedom)) for side in (-1, 1))
    p = max(there, narrower, not_reversed)
    wider = 2 * (1 - max(narrower, not_reversed))
    verdict = "supported" if p <= LEVEL else "not supported" if wider <= LEVEL else "undecided"
    contrasts = f"sequential - parallel: {small:+.2f} small, {medium:+.2f} medium"
    return dataclasses.replace(
        claim, verdict=verdict, estimate=abs(small) - abs(medium), p=p, notes=(contrasts, *notes, *_spread_note(runs))
    )


@_claim("C4")
def _c4(cells: pd.DataFrame, runs: pd.DataFrame) -> Claim:
    claim = Claim(
        "C4",
        "Steepness tracks the objective's distance at initialisation.",
        "rank correlation of standard slope with objective distance within a model, mean over models",
        "not enough objectives",
    )
    unresolved = int(cells["distance"].isna().sum())
    found, without = (
        within_models(cells[keep]) for keep in (cells["distance"].notna(), ~cells["objective"].isin(NEW_HEAD))
    )
    notes = tuple([f"{unresolved} of {len(cells)} cells have no resolved distance"] if unresolved else [])
    if without is not None:
        notes = (
            *notes,
            f"without objectives that bring a new head ({without[2]} left): {without[0]:+.2f}, p = {without[1]:.3g}",
        )
    if found is None:
        return dataclasses.replace(claim, notes=notes)
    correlation, p, objectives = found
    few = objectives < FEWEST_OBJECTIVES
    verdict = f"not enough objectives ({objectives} of {FEWEST_OBJECTIVES})"
    if not few:
        verdict = "supported" if p <= LEVEL else "not supported" if p >= 1 - LEVEL else "undecided"
    notes = (f"exact permutation over {objectives} objectives: p = {p:.3g}", *_distance_note(cells), *notes)
    return dataclasses.replace(claim, verdict=verdict, estimate=correlation, p=None if few else p, notes=notes)


def within_models(cells: pd.DataFrame) -> tuple[float, float, int] | None:
    """Computes the mean rank correlation of slope with distance within a model.

    Returns:
        The correlation, its exact p-value over permutations of the objectives (the same one in all models), and the
        number of objectives; None with fewer than 3. Models without some objective are left out.
    """
    tables = _complete(cells)
    if tables is None:
        return None
    slopes, distances = map(_standard_ranks, tables)
    orders = np.array(list(itertools.permutations(range(slopes.shape[1]))))
    values = np.einsum("mo,pmo->p", slopes, np.moveaxis(distances[:, orders], 1, 0)) / len(slopes)
    observed = float((slopes * distances).sum() / len(slopes))
    return observed, float((values >= observed - 1e-12).mean()), slopes.shape[1]


def _complete(cells: pd.DataFrame) -> tuple[FloatArray, FloatArray] | None:
    """Returns the slopes and distances (models, objectives) of models with all objectives; None with fewer than 3."""
    slopes, distances = (
        cells.pivot_table(index="model", columns="objective", values=column).dropna()
        for column in ("slope", "distance")
    )
    models = slopes.index.intersection(distances.index)
    if slopes.shape[1] < 3 or not len(models) or slopes.shape[1] != distances.shape[1]:
        return None
    return slopes.loc[models].to_numpy(), distances.loc[models].to_numpy()


def _distance_note(cells: pd.DataFrame) -> list[str]:
    """Says where the correlation would lie if each distance were drawn from its interval."""
    cells = cells[cells["distance"].notna()]
    tables = _complete(cells.assign(distance=cells["distance_high"] - cells["distance_low"]))
    values = _complete(cells)
    if tables is None or values is None or len(tables[1]) != len(values[1]):
        return []  # some distance has no interval
    slopes, distances = _standard_ranks(values[0]), values[1]
    errors = tables[1] / (2 * stats.norm.ppf(0.975))
    drawn = np.random.default_rng(0).normal(distances, errors, (DISTANCE_DRAWS, *distances.shape))
    correlations = [float((slopes * _standard_ranks(draw)).sum() / len(slopes)) for draw in drawn]
    low, high = np.percentile(correlations, (2.5, 97.5))
    return [f"with the distances drawn from their intervals: {low:+.2f} to {high:+.2f}"]


def _standard_ranks(values: FloatArray) -> FloatArray:
    """Returns each row's ranks, centred and with norm 1 (0 if all are equal)."""
    ranks = stats.rankdata(values, axis=1)
    ranks -= ranks.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(ranks, axis=1, keepdims=True)
    found: FloatArray = np.divide(ranks, norms, where=norms > 0, out=np.zeros_like(ranks))
    return found


@_claim("C5")
def _c5(cells: pd.DataFrame, runs: pd.DataFrame) -> Claim:
    claim = Claim(
        "C5",
        "The width of the profile is dominated by the architecture.",
        "variance of width between models minus that between objectives, with their interaction as error",
        "not enough models or objectives",
    )
    table = cells.pivot_table(index="model", columns="objective", values="width").dropna()
    if min(table.shape) < FEWEST_LEVELS:
        return claim
    widths = table.to_numpy()
    depths = cells.groupby("model")["layers"].first().loc[table.index].to_numpy(dtype=np.float64)
    estimate, low, high, p = variance_difference(widths)
    notes = [f"{table.shape[0]} models x {table.shape[1]} objectives"]
    if np.ptp(depths) > 0 and len(table) > FEWEST_LEVELS:
        given = variance_difference(widths, depths)
        notes.append(f"with the number of layers as a covariate: {given[0]:+.3g} [{given[1]:+.3g}, {given[2]:+.3g}]")
    verdict = "supported" if low > 0 else "not supported" if high < 0 else "undecided"
    return dataclasses.replace(claim, verdict=verdict, estimate=estimate, interval=(low, high), p=p, notes=tuple(notes))


def variance_difference(
    table: FloatArray, covariate: FloatArray | None = None, draws: int = DRAWS
) -> tuple[float, float, float, float]:
    """Estimates the variance between rows minus that between columns in a two-way layout without replicates [ours].

    The interval is a generalised confidence interval (Weerahandi, *Generalized confidence intervals*, 1993): the sums
    of squares over independent chi-squared draws.

    Args:
        table: (a, b) values.
        covariate: (a,) a property of the rows, whose linear effect is removed first.
        draws: Draws of the interval; they are seeded.

    Returns:
        The estimate, the ends of the 95 % interval, and the one-sided p-value that the difference is above 0.
    """
    a, b = table.shape
    rows, columns = table.mean(axis=1), table.mean(axis=0)
    residuals = table - rows[:, None] - columns[None, :] + table.mean()
    design = np.ones((a, 1)) if covariate is None else np.column_stack([np.ones(a), covariate])
    rows = rows - design @ np.linalg.lstsq(design, rows, rcond=None)[0]
    freedom = np.array([a - design.shape[1], b - 1, (a - 1) * (b - 1)])
    squares = np.array([b * (rows**2).sum(), a * ((columns - columns.mean()) ** 2).sum(), (residuals**2).sum()])
    weights = np.array([1 / b, -1 / a, 1 / a - 1 / b])
    chi = np.random.default_rng(0).chisquare(freedom, (draws, 3))
    pivots = (squares / chi) @ weights
    low, high = np.percentile(pivots, (2.5, 97.5))
    return float(squares / freedom @ weights), float(low), float(high), float((pivots <= 0).mean())


def _spread_note(runs: pd.DataFrame) -> list[str]:
    """Says whether the control had something to remove."""
    spread = float(runs[runs["control"] == "equal-step"]["spread"].median())
    note = f"the control removed a median step-ratio spread of {show(spread, '.2f')}x"
    return [note + (": little to remove, so a kept slope is weak evidence" if spread < LITTLE_SPREAD else "")]
