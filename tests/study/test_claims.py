"""The claims on planted studies, and their statistics against independent ones. ``make calibrate`` runs more studies."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from calibrate import Scenario, rates, scenarios
from planted import BOTH, SMALL, everywhere, nowhere, paper, study
from scipy import stats

import depthcb_recipes
from depthcb_recipes import CONFIGS
from depthcb_recipes.objectives.classification import Classification
from depthcb_recipes.studies.claims import NEW_HEAD, Claim, _distance_note, claims, variance_difference, within_models
from depthcb_recipes.studies.result import Result
from depthcb_recipes.studies.tables import runs_table

STUDIES = 10


def decided(results: list[Result]) -> dict[str, Claim]:
    return {claim.name: claim for claim in claims(runs_table(results))}


@pytest.mark.parametrize("scenario", list(scenarios()), ids=lambda s: f"{s.claim}, {s.name}")
def test_a_claim_is_supported_where_it_holds_and_nowhere_else(scenario: Scenario) -> None:
    found = rates(scenario, STUDIES)
    supported = round(found["supported"] * STUDIES)
    if not scenario.enough:
        assert found["not enough"] == 1
    elif scenario.holds:
        oracle = round(found["oracle"] * STUDIES)
        assert stats.binomtest(supported, STUDIES, 0.97 * oracle / STUDIES, alternative="less").pvalue > 0.005
    else:
        assert stats.binomtest(supported, STUDIES, 0.05, alternative="greater").pvalue > 0.005


def test_the_papers_pattern_is_found_in_profiles() -> None:
    found = decided(study(paper, BOTH))
    assert {found[name].verdict for name in ("C1", "C2", "C3")} == {"supported"}
    assert found["C4"].verdict == "not enough objectives (4 of 5)"
    assert found["C4"].estimate == pytest.approx(1, abs=0.05)
    assert found["C1"].estimate == 1


def test_where_it_does_not_hold_it_is_not_found() -> None:
    found = decided(study(everywhere, BOTH))
    assert (found["C1"].verdict, found["C2"].verdict, found["C3"].verdict) == (
        "supported",
        "not supported",
        "undecided",
    )
    assert decided(study(nowhere, BOTH))["C1"].verdict in ("not supported", "undecided")


def test_three_runs_decide_nothing() -> None:
    found = decided(study(paper, {"seq0": ("sequential", 1e8)}, seeds=1)[:3])
    assert all(c.verdict.startswith("not enough") for c in found.values())
    assert all(c.estimate is None and c.interval is None and c.p is None for c in found.values())


def test_a_missing_size_class_leaves_its_claim_open() -> None:
    found = decided(study(paper, SMALL))
    assert found["C3"].verdict == "not enough models"
    assert found["C2"].verdict == "supported"


def test_a_model_of_another_kind_does_not_blur_what_blocks_are_compared_by() -> None:
    with_one = decided(study(paper, SMALL | {"mamba": ("single", 1.3e8)}))["C2"]
    assert with_one.verdict == decided(study(paper, SMALL))["C2"].verdict == "supported"


def test_a_control_with_nothing_to_do_and_a_null_that_explains_are_said() -> None:
    found = decided(study(paper, BOTH, spread=1.1, null=0.95))
    assert any("1.10x: little to remove, so a kept slope is weak evidence" in note for note in found["C2"].notes)
    assert any(note.startswith("change-matched null: no more than noise in ") for note in found["C1"].notes)
    clean = decided(study(paper, BOTH))
    assert not any("weak evidence" in note for c in clean.values() for note in c.notes)
    assert any(note == "change-matched null: beyond noise in 56 cells" for note in clean["C1"].notes)


def test_p_values_are_corrected_by_holm() -> None:
    found = [c for c in claims(runs_table(study(paper, BOTH))) if c.p is not None]
    order = sorted(found, key=lambda c: c.p or 0.0)
    for rank, claim in enumerate(order):
        assert claim.p is not None
        assert claim.holm is not None
        assert claim.holm >= claim.p * (len(found) - rank) * (1 - 1e-12) or claim.holm == 1


def test_the_permutation_test_counts_all_orders_of_the_objectives() -> None:
    """Against scipy's Spearman in every order, one order for all models."""
    rng = np.random.default_rng(0)
    objectives, names = [f"o{i}" for i in range(5)], ["a", "b", "c"]
    table = pd.DataFrame(
        [(m, o, rng.normal(), rng.normal()) for m, o in itertools.product(names, objectives)],
        columns=["model", "objective", "slope", "distance"],
    )

    def mean_correlation(order: tuple[int, ...]) -> float:
        values = []
        for _, own in table.groupby("model"):
            values.append(stats.spearmanr(own["slope"], own["distance"].to_numpy()[list(order)]).statistic)
        return float(np.mean(values))

    every = [mean_correlation(order) for order in itertools.permutations(range(5))]
    found = within_models(table)
    assert found is not None
    assert found[0] == pytest.approx(every[0])
    assert found[1] == pytest.approx(np.mean([value >= every[0] - 1e-9 for value in every]))
    assert found[2] == 5


def test_the_correlation_with_uncertain_distances_is_a_range() -> None:
    names, objectives = ["a", "b", "c"], [f"o{i}" for i in range(5)]
    facts = [(m, o, float(i), float(i)) for m in names for i, o in enumerate(objectives)]
    cells = pd.DataFrame(facts, columns=["model", "objective", "slope", "distance"])

    def noted(width: float) -> list[str]:
        return _distance_note(
            cells.assign(distance_low=cells["distance"] - width, distance_high=cells["distance"] + width)
        )

    assert noted(0.0) == ["with the distances drawn from their intervals: +1.00 to +1.00"]
    low, high = (float(end) for end in noted(100.0)[0].split(": ")[1].split(" to "))  # far wider than the differences
    expected = 1.96 / np.sqrt(3 * 4)  # three models of five ranks without correlation
    assert (low, high) == pytest.approx((-expected, expected), abs=0.15)
    assert noted(float("nan")) == []


def test_variance_components_are_the_textbooks() -> None:
    """Mean squares against scipy's one-way tests on tables without the other factor."""
    rng = np.random.default_rng(0)
    table = rng.normal(0, 0.3, (6, 1)) + rng.normal(0, 0.2, (1, 4)) + rng.normal(0, 0.05, (6, 4))
    estimate, low, high, p = variance_difference(table)
    without = [table - table.mean(axis=0), (table - table.mean(axis=1, keepdims=True)).T]
    # F of the one-way test, with the other factor's mean squares in its error: solve for the mean squares
    between = [part.shape[1] * part.mean(axis=1).var(ddof=1) for part in without]
    error = (table - table.mean(axis=1, keepdims=True) - table.mean(axis=0) + table.mean()).var(ddof=0) * 24 / 15
    assert estimate == pytest.approx((between[0] - error) / 4 - (between[1] - error) / 6)
    assert low < estimate < high
    assert (p <= 0.025) == (low > 0)


def test_the_interval_of_variances_covers_the_truth() -> None:
    rng, hits = np.random.default_rng(1), 0
    for _ in range(300):
        table = rng.normal(0, 0.3, (15, 1)) + rng.normal(0, 0.2, (1, 4)) + rng.normal(0, 0.1, (15, 4))
        _, low, high, _ = variance_difference(table, draws=1000)
        hits += low <= 0.3**2 - 0.2**2 <= high
    assert 0.92 <= hits / 300 <= 0.985


def test_depth_as_a_covariate_explains_what_depth_explains() -> None:
    depth = np.array([6.0, 12, 18, 24, 30, 36])
    rng = np.random.default_rng(2)
    table = 0.02 * depth[:, None] + rng.normal(0, 0.002, (6, 4)) + rng.normal(0, 0.002, (1, 4))
    assert variance_difference(table)[1] > 0
    low, high = variance_difference(table, depth)[1:3]
    assert low < 0 < high
    assert high < 1e-3


def test_objectives_with_a_new_head_are_named() -> None:
    names = [path.stem for path in CONFIGS.glob("*.yaml")]
    classes = {
        name: getattr(depthcb_recipes, name.title().replace("_", "").replace("Lm", "LM").replace("Dpo", "DPO"))
        for name in names
    }
    assert {name for name, kind in classes.items() if issubclass(kind, Classification)} == set(NEW_HEAD)
