"""Error rates and power of the verdicts and claims on planted studies: tables, no training.

``make calibrate`` prints them over 1,000 studies per scenario. Where a claim is false in the planted truth, it may be
"supported" in at most 5 % of the studies. Where it is true, its power stands beside that of an oracle: a test on the
same design that knows the planted variances, or sees the values without noise. A false winner of ``depthcb advise
--test`` may be named in at most 5 % of the planted tables.
"""

from __future__ import annotations

import itertools
import sys
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from planted_advice import planted_tables
from scipy import stats

from depthcb.verdict import BOUNDS, WORDS, judge
from depthcb_recipes.studies.claims import CLAIMS, LEVEL, within_models
from depthcb_recipes.studies.tables import cells_table

CAUSAL = "causal_lm"
PAPER_OBJECTIVES = (CAUSAL, "sequence_classification", "token_classification", "contrastive")
SIX = (*PAPER_OBJECTIVES, "masked_lm", "completion_lm")
#: Standard deviation of a run's relative slope around its cell's truth; the slopes themselves are near 1.
NOISE = 0.15

Truth = Callable[[pd.DataFrame, np.random.Generator], pd.DataFrame]


def models(sequential: int, parallel: int, size: str = "small") -> list[tuple[str, str, str, int]]:
    """Models of each block type: name, block, size, layers."""
    kinds = [("sequential", i) for i in range(sequential)] + [("parallel", i) for i in range(parallel)]
    return [(f"{size} {block} {i}", block, size, 12 + 2 * i) for block, i in kinds]


PAPER_SMALL = models(7, 3)
BOTH_SIZES = models(7, 3) + models(3, 3, "medium")


@dataclass(frozen=True)
class Scenario:
    """A planted truth.

    Args:
        name: What is planted.
        claim: The claim that it is about.
        holds: Whether the claim is true in it.
        truth: Sets the columns ``slope``, ``share``, ``width`` and ``distance`` of a table of cells.
        design: The models.
        objectives: The objectives.
        seeds: Seeds per cell.
        oracle: Whether a test with more knowledge supports the claim, from the cells' truth and the runs.
        enough: Whether the design can carry a word at all.
    """

    name: str
    claim: str
    holds: bool
    truth: Truth
    design: list[tuple[str, str, str, int]] = field(default_factory=lambda: PAPER_SMALL)
    objectives: tuple[str, ...] = PAPER_OBJECTIVES
    seeds: int = 2
    oracle: Callable[[pd.DataFrame, pd.DataFrame], bool] | None = None
    enough: bool = True

    def study(self, number: int) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Returns the cells' truth and the runs of one planted study."""
        rng = np.random.default_rng([zlib.crc32(self.name.encode()), number])
        facts = [(*m, o) for m, o in itertools.product(self.design, self.objectives)]
        cells = pd.DataFrame(facts, columns=["model", "block", "size", "layers", "objective"])
        cells = self.truth(cells.assign(slope=1.0, share=1.0, width=0.6, distance=0.5, family="decoder"), rng)
        return cells, runs(cells, self.seeds, rng)


def runs(cells: pd.DataFrame, seeds: int, rng: np.random.Generator) -> pd.DataFrame:
    """Runs with noise of seeds; half of its variance is shared by the two runs of a pair."""
    parts = []
    for seed in range(seeds):
        shared = rng.normal(0, NOISE / np.sqrt(2), len(cells))
        for control, mean in (("standard", cells["slope"]), ("equal-step", cells["slope"] * cells["share"])):
            own = mean + shared + rng.normal(0, NOISE / np.sqrt(2), len(cells))
            width = cells["width"] + rng.normal(0, 0.02, len(cells))
            parts.append(cells.assign(seed=seed, control=control, relative_slope=own, width=width))
    return pd.concat(parts, ignore_index=True).assign(
        matched_null=np.nan, null_low=np.nan, null_high=np.nan, floor=np.nan, spread=4.0,
        distance_low=np.nan, distance_high=np.nan, worth=np.nan,
    )  # fmt: skip


# Truths


def signs(positive: float) -> Truth:
    def truth(cells: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
        return cells.assign(slope=np.where(rng.random(len(cells)) < positive, 1.0, -1.0))

    return truth


def kept(sequential: float = 1.0, causal: float = 1.0, other: float = 0.0, **own: float) -> Truth:
    """Shares left: of sequential blocks, parallel ones with causal LM, and with others; or of single objectives."""

    def truth(cells: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
        is_sequential, is_causal = cells["block"] == "sequential", cells["objective"] == CAUSAL
        share = np.where(is_sequential, sequential, np.where(is_causal, causal, other))
        for objective, value in own.items():
            share = np.where(is_sequential & (cells["objective"] == objective), value, share)
        return cells.assign(share=share)

    return truth


def some_parallel_keep(fraction: float) -> Truth:
    def truth(cells: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
        cells = kept()(cells, rng)
        other = (cells["block"] == "parallel") & (cells["objective"] != CAUSAL)
        return cells.assign(share=cells["share"].where(~(other & (rng.random(len(cells)) < fraction)), 1.0))

    return truth


def contrasts(small: float, medium: float, between: float = 0.1) -> Truth:
    """Parallel blocks keep 1 - contrast of what sequential ones keep; models differ."""

    def truth(cells: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
        names = cells["model"].unique()
        own = cells["model"].map(dict(zip(names, rng.normal(0, between, len(names)), strict=True)))
        contrast = np.where(cells["size"] == "small", small, medium)
        share = np.where(cells["block"] == "parallel", 0.6 - contrast / 2, 0.6 + contrast / 2) + own
        return cells.assign(share=share)

    return truth


def tracking(slope: float, objective_sd: float = 0.0, model_sd: float = 0.0, driven: float = 0.0) -> Truth:
    """Slopes that follow the distance within a model, and effects of objectives and models on either."""

    def truth(cells: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
        objectives, names = cells["objective"].unique(), cells["model"].unique()
        base = cells["objective"].map(
            dict(zip(objectives, rng.permutation(np.linspace(0, 1, len(objectives))), strict=True))
        )
        other = cells["objective"].map(dict(zip(objectives, rng.normal(0, objective_sd, len(objectives)), strict=True)))
        own = cells["model"].map(dict(zip(names, rng.normal(0, model_sd, len(names)), strict=True)))
        distance = base + driven * own + rng.normal(0, 0.05, len(cells))
        return cells.assign(distance=distance, slope=1 + slope * base + other + own)

    return truth


def widths(model_sd: float, objective_sd: float, interaction_sd: float) -> Truth:
    def truth(cells: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
        effects = {
            axis: dict(zip(cells[axis].unique(), rng.normal(0, sd, cells[axis].nunique()), strict=True))
            for axis, sd in (("model", model_sd), ("objective", objective_sd))
        }
        own = cells["model"].map(effects["model"]) + cells["objective"].map(effects["objective"])
        return cells.assign(width=0.6 + own + rng.normal(0, interaction_sd, len(cells)))

    return truth


# Oracles


def true_signs(cells: pd.DataFrame, runs: pd.DataFrame) -> bool:
    """Knows the sign of each cell's slope without noise."""
    positive = int((cells["slope"] > 0).sum())
    return bool(stats.binomtest(positive, len(cells), 0.75, alternative="greater").proportion_ci(0.95).low > 0.75)


def known_noise(cells: pd.DataFrame, runs: pd.DataFrame) -> bool:
    """C2 by normal tests with the planted variance."""
    wide = runs.pivot_table(index=["block", "objective", "model", "seed"], columns="control", values="relative_slope")
    contrast = wide["equal-step"] - 0.2 * wide["standard"]
    variance = NOISE**2 / 2 * (0.8**2 + 1 + 0.2**2)
    groups = contrast.groupby(["block", "objective"])
    return all(
        stats.norm.sf((1 if block == "sequential" or o == CAUSAL else -1) * g.mean() / np.sqrt(variance / len(g)))
        <= LEVEL
        for (block, o), g in groups
    )


def known_models(between: float, small: float, medium: float) -> Callable[[pd.DataFrame, pd.DataFrame], bool]:
    """C3 by normal tests on the models' true shares, with the planted variance between models."""

    def oracle(cells: pd.DataFrame, runs: pd.DataFrame) -> bool:
        mean = cells.groupby(["size", "block"])["share"].mean()
        count = cells.groupby(["size", "block"])["model"].nunique()
        a, b = (mean[size, "sequential"] - mean[size, "parallel"] for size in ("small", "medium"))
        one = between * np.sqrt((1 / count["small"]).sum())
        both = between * np.sqrt((1 / count).sum())
        z = [abs(a) / one, (abs(a) - b) / both, (abs(a) + b) / both]
        return bool(min(z) > stats.norm.isf(LEVEL))

    return oracle


def true_slopes(cells: pd.DataFrame, runs: pd.DataFrame) -> bool:
    """C4's permutation test on slopes without noise."""
    found = within_models(cells)
    return found is not None and found[1] <= LEVEL


def known_model_variance(model_sd: float, interaction_sd: float) -> Callable[[pd.DataFrame, pd.DataFrame], bool]:
    """C5 by the most powerful test against objectives as variable as the models, whose variance is known."""

    def oracle(cells: pd.DataFrame, runs: pd.DataFrame) -> bool:
        table = cells.pivot_table(index="model", columns="objective", values="width").to_numpy()
        a, b = table.shape
        squares = a * ((table.mean(axis=0) - table.mean()) ** 2).sum()
        return bool(squares < (a * model_sd**2 + interaction_sd**2) * stats.chi2.ppf(LEVEL, b - 1))

    return oracle


def scenarios() -> Iterator[Scenario]:
    """All planted truths."""
    one = models(11, 0)
    yield Scenario("coin flips, 11 cells", "C1", False, signs(0.5), one[:11], (CAUSAL,))
    yield Scenario("coin flips, 44 cells", "C1", False, signs(0.5), one)
    yield Scenario("75 % positive, 44 cells", "C1", False, signs(0.75), one)
    yield Scenario("97.5 % positive, 60 cells", "C1", True, signs(0.975), models(8, 7), oracle=true_signs)
    yield Scenario("all positive, 11 cells", "C1", True, signs(1.0), one, (CAUSAL,), oracle=true_signs)

    yield Scenario("all blocks keep", "C2", False, kept(other=1.0))
    yield Scenario("no block keeps", "C2", False, kept(0.0, 0.0, 0.0))
    yield Scenario("parallel keep in 60 % of cells outside causal LM", "C2", False, some_parallel_keep(0.6))
    yield Scenario("parallel keep 60 % outside causal LM", "C2", False, kept(other=0.6))
    yield Scenario("parallel keep exactly 20 % outside causal LM", "C2", False, kept(other=0.2))
    yield Scenario("sequential keep but for contrastive", "C2", False, kept(contrastive=0.0))
    yield Scenario("sequential keep exactly 20 % with contrastive", "C2", False, kept(contrastive=0.2))
    yield Scenario("parallel don't keep with causal LM", "C2", False, kept(causal=0.0))
    yield Scenario("the paper's pattern", "C2", True, kept(), oracle=known_noise)
    yield Scenario("the paper's pattern, 3 seeds", "C2", True, kept(), seeds=3, oracle=known_noise)
    yield Scenario("the paper's pattern, half as clear", "C2", True, kept(0.6, 0.6, -0.2), oracle=known_noise)
    yield Scenario("4 cells of parallel blocks", "C2", False, kept(), models(5, 2), PAPER_OBJECTIVES[:3], enough=False)

    yield Scenario("same contrast at both sizes", "C3", False, contrasts(0.8, 0.8), BOTH_SIZES)
    yield Scenario("reversed contrast at large size", "C3", False, contrasts(0.8, -0.8), BOTH_SIZES)
    yield Scenario("no contrast at either size", "C3", False, contrasts(0.0, 0.0), BOTH_SIZES)
    yield Scenario("contrast grows", "C3", False, contrasts(0.2, 0.9), BOTH_SIZES)
    narrows = known_models(0.1, 0.9, 0.0)
    yield Scenario("contrast vanishes", "C3", True, contrasts(0.9, 0.0), BOTH_SIZES, oracle=narrows)
    paper_grid = models(7, 3) + models(1, 1, "medium")
    yield Scenario("contrast vanishes, the paper's grid", "C3", True, contrasts(0.9, 0.0), paper_grid, enough=False)

    yield Scenario("objectives differ for other reasons", "C4", False, tracking(0.0, objective_sd=0.5), objectives=SIX)
    yield Scenario("only models drive both", "C4", False, tracking(0.0, model_sd=0.5, driven=1.0), objectives=SIX)
    yield Scenario("opposite within every model", "C4", False, tracking(-0.5, model_sd=2.0, driven=1.0), objectives=SIX)
    yield Scenario(
        "slope follows distance, 6 objectives", "C4", True, tracking(0.8), objectives=SIX, oracle=true_slopes
    )
    yield Scenario("slope follows distance, 4 objectives", "C4", True, tracking(0.8), enough=False)

    fifteen = models(8, 7)
    yield Scenario("equal variances", "C5", False, widths(0.1, 0.1, 0.03), fifteen)
    yield Scenario("interaction alone", "C5", False, widths(0.0, 0.0, 0.1), fifteen)
    yield Scenario("objectives alone", "C5", False, widths(0.0, 0.1, 0.03), fifteen)
    yield Scenario("nothing", "C5", False, widths(0.0, 0.0, 0.0), fifteen)
    for ratio in (4, 16, 64, 256, 1024):
        sd = 0.1 / np.sqrt(ratio)
        oracle = known_model_variance(0.1, 0.01)
        yield Scenario(f"models {ratio} x objectives", "C5", True, widths(0.1, sd, 0.01), fifteen, oracle=oracle)
    yield Scenario("models alone, 6 objectives", "C5", True, widths(0.1, 0.0, 0.02), fifteen, SIX,
                   oracle=known_model_variance(0.1, 0.02))  # fmt: skip


def rates(scenario: Scenario, studies: int) -> dict[str, float]:
    """Returns how often the claim was supported, undecided or without enough runs, and how often the oracle supports it."""
    counts = {"supported": 0, "not supported": 0, "undecided": 0, "not enough": 0, "oracle": 0}
    for number in range(studies):
        cells, table = scenario.study(number)
        verdict = CLAIMS[scenario.claim](cells_table(table), table).verdict
        counts["not enough" if verdict.startswith("not enough") else verdict] += 1
        counts["oracle"] += bool(scenario.oracle and scenario.oracle(cells, table))
    return {name: count / studies for name, count in counts.items()}


@dataclass(frozen=True)
class Planted:
    """Pairs with a planted share of the slope, and a planted share of the null."""

    share: float
    seeds: int = 4
    noise: float = 0.1
    slope: float = 1.0
    null: float = 0.2

    @property
    def true_words(self) -> set[str]:
        """The words that are true of it: two at a bound."""
        if self.slope == 0:
            return {"emerges"} if self.share else set()
        nulls = {"no more than noise"} if self.null >= 0.8 else set()
        if self.null <= 0.8:
            nulls |= {"beyond noise"}
        edges = (-np.inf, *BOUNDS, np.inf)
        return nulls | {
            w for w, low, high in zip(WORDS, edges[:-1], edges[1:], strict=True) if low <= self.share <= high
        }

    def words(self, studies: int) -> dict[str, float]:
        """Returns how often each word was given."""
        rng = np.random.default_rng(0)
        found: dict[str, float] = {}
        for _ in range(studies):
            shared = rng.normal(0, self.noise / np.sqrt(2), self.seeds)
            own = rng.normal(0, self.noise / np.sqrt(2), (3, self.seeds))
            s = self.slope + shared + own[0]
            e = (self.share * self.slope if self.slope else self.share) + shared + own[1]
            verdict = judge(s.tolist(), e.tolist(), (self.null * (self.slope or 1) + own[2]).tolist())
            said = verdict.word if verdict.null in ("undecided", verdict.word) else f"{verdict.word}, {verdict.null}"
            found[said] = found.get(said, 0) + 1 / studies
        return found


def planted_words() -> Iterator[Planted]:
    """Planted pairs: the middle of each word, both sides of each bound, no slope, and a null that explains."""
    for share in (-0.5, 0.0, 0.5, 1.0, 1.6, *BOUNDS):
        yield Planted(share)
    yield Planted(1.0, noise=0.5)
    yield Planted(1.0, seeds=8)
    yield Planted(0.0, slope=0.0)
    yield Planted(1.0, slope=0.0)
    yield Planted(1.0, null=1.0)
    yield Planted(1.0, null=0.8)


def _rates(index: int, studies: int) -> dict[str, float]:
    return rates(list(scenarios())[index], studies)


def main(studies: int) -> int:
    """Prints the tables; returns 1 if a false word or claim is too frequent, or a true one too rare."""
    wrong = 0
    print(f"Verdicts over {studies} planted sets of pairs: rate of false words, and of each word")
    for planted in planted_words():
        words = planted.words(studies)
        true = {*planted.true_words, "undecided", "not measured"}
        false = sum(rate for said, rate in words.items() if not set(said.split(", ")) <= true)
        bad = stats.binomtest(round(false * studies), studies, 0.05, alternative="greater").pvalue < 0.01
        wrong += bad
        shown = ", ".join(f"{word} {rate:.1%}" for word, rate in sorted(words.items(), key=lambda item: -item[1]))
        print(f"  {'FAIL' if bad else 'ok':5}{false:6.1%} false  {planted}: {shown}")
    print(f"Winners of `depthcb advise --test` over {studies} planted tables")
    for table in planted_tables():
        false, named = table.rates(studies)
        bad = false > 0.05 or (table.power is not None and named < table.power)
        wrong += bad
        print(f"  {'FAIL' if bad else 'ok':5}{false:6.1%} false, {named:6.1%} of true winners named  {table.name}")
    print(f"Claims over {studies} planted studies")
    planted_studies = list(scenarios())
    with ProcessPoolExecutor() as pool:
        found_rates = pool.map(_rates, range(len(planted_studies)), itertools.repeat(studies))
        wrong += sum(_told(*both) for both in zip(planted_studies, found_rates, strict=False))
    return 1 if wrong else 0


def _told(scenario: Scenario, found: dict[str, float]) -> bool:
    """Prints a line; returns whether the rates are wrong."""
    bad = found["supported"] > 0.05 if not scenario.holds else found["oracle"] >= 0.9 > found["supported"]
    bad = bad or (not scenario.enough and found["not enough"] < 1)
    oracle = f", oracle {found['oracle']:.1%}" if scenario.oracle else ""
    rest = ", ".join(
        f"{name} {found[name]:.1%}" for name in ("not supported", "undecided", "not enough") if found[name]
    )
    truth = "true " if scenario.holds else "false"
    print(
        f"  {'FAIL' if bad else 'ok':5}{scenario.claim} {truth} supported {found['supported']:6.1%}{oracle}"
        f"  ({rest})  {scenario.name}",
        flush=True,
    )
    return bad


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000))
