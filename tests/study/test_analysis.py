"""The study's table and claims on simulated studies with known effects."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from planted import BOTH, OBJECTIVES, SMALL, changed, everywhere, figures, nowhere, paper, study
from scipy import stats

from depthcb.profile import Profile
from depthcb_recipes.studies.analysis import Claim, claims, explained, interval, pairs_table, runs_table
from depthcb_recipes.studies.result import Result


def decided(results: list[Result]) -> dict[str, Claim]:
    return {claim.name: claim for claim in claims(runs_table(results))}


def test_the_papers_pattern_is_found() -> None:
    found = decided(study(paper, BOTH))
    assert {found[name].verdict for name in ("C1", "C2", "C3", "C4")} == {"supported"}
    assert found["C2"].estimate == pytest.approx(1)
    assert found["C3"].estimate == pytest.approx(1)
    assert found["C1"].estimate == 1


def test_where_it_does_not_hold_it_is_not_found() -> None:
    found = decided(study(everywhere, BOTH))
    assert (found["C1"].verdict, found["C2"].verdict, found["C3"].verdict) == (
        "supported",
        "not supported",
        "not supported",
    )
    assert found["C4"].verdict == "not supported"
    assert decided(study(nowhere, BOTH))["C1"].verdict == "not supported"


def test_three_runs_decide_nothing() -> None:
    found = decided(study(paper, {"seq0": ("sequential", 1e8)}, seeds=1)[:3])
    assert {c.verdict for c in found.values()} == {"not enough runs"}
    assert all(c.estimate is None and c.interval is None for c in found.values())
    assert found["C1"].notes == ("2 runs of 1 models",)


def test_a_missing_size_class_leaves_its_claim_open() -> None:
    found = decided(study(paper, SMALL))
    assert found["C3"].verdict == "not enough runs"
    assert found["C2"].verdict == "supported"


def test_a_model_of_another_kind_does_not_blur_what_blocks_are_compared_by() -> None:
    with_one = decided(study(paper, SMALL | {"mamba": ("single", 1.3e8)}))["C2"]
    without = decided(study(paper, SMALL))["C2"]
    assert with_one.verdict == without.verdict == "supported"
    assert with_one.interval is not None
    assert with_one.estimate == pytest.approx(1.0)


def test_width_is_the_models_or_the_objectives() -> None:
    rng = np.random.default_rng(0)
    rows = [
        {"model": m, "objective": o, "seed": s, "control": "standard", "width": own[m] + rng.normal(0, 0.01)}
        for own in [dict(zip("abcdef", np.linspace(0.3, 0.9, 6), strict=True))]
        for m, o, s in itertools.product("abcdef", OBJECTIVES, range(2))
    ]
    frame = pd.DataFrame(rows)
    assert explained(frame, "model") > 0.95
    assert explained(frame, "objective") < 0.05
    groups = [g["width"].to_numpy() for _, g in frame.groupby("objective")]
    f = stats.f_oneway(*groups).statistic  # eta squared computed differently: F = (eta^2 / df1) / ((1 - eta^2) / df2)
    df1, df2 = len(groups) - 1, len(frame) - len(groups)
    assert explained(frame, "objective") == pytest.approx(f * df1 / (f * df1 + df2), rel=1e-9)


def test_a_null_that_explains_and_a_control_with_nothing_to_do_are_said() -> None:
    found = decided(study(paper, BOTH, spread=1.1, null=0.9))
    assert any("the null explains the shape of most" in note for note in found["C1"].notes)
    assert any("1.10x: little to remove, so a kept slope is weak evidence" in note for note in found["C2"].notes)
    assert any("the null explains the shape of most" in note for note in found["C2"].notes)
    clean = decided(study(paper, BOTH))
    assert not any("explains the shape" in note or "weak evidence" in note for c in clean.values() for note in c.notes)


def test_an_effect_that_the_null_has_too_is_said() -> None:
    """If each run's null equals its profile, there is no evidence; if the null is flat, there may be."""
    results = study(paper, BOTH)
    same = [changed(result, null={"cka": [figures(result).profiles["cka"]]}) for result in results]
    for name in ("C4", "C5"):
        claim = decided(same)[name]
        assert f"on the null's profiles the effect is {claim.estimate:+.3g}: the null explains it" in claim.notes[-1]
        assert "explains" not in decided(results)[name].notes[-1]


def test_the_table_has_a_row_a_pair_with_its_figures() -> None:
    results = study(paper, SMALL, seeds=1)
    runs = runs_table(results)
    pairs = pairs_table(runs)
    assert len(pairs) == len(results) / 2
    row = pairs[(pairs["model"] == "par0") & (pairs["objective"] == "contrastive")].iloc[0]
    standard, equal = (
        Profile.from_dict(figures(r).profiles["cka"])
        for control in ("standard", "equal-step")
        for r in results
        if (r.config.model, r.config.objective, r.config.control) == ("par0", "contrastive", control)
    )
    assert (row["slope_standard"], row["slope_equal"]) == (standard.slope, equal.slope)
    assert (row["slope_low_equal"], row["slope_high_equal"]) == equal.slope_interval
    assert standard.relative_slope is not None
    assert equal.relative_slope is not None
    assert row["retained"] == pytest.approx(equal.relative_slope / standard.relative_slope)
    assert row["verdict"] == "reverses"
    assert pairs[pairs["block"] == "sequential"]["verdict"].isin(["persists", "weakens"]).all()


def test_a_pair_that_did_not_start_alike_is_refused() -> None:
    results = study(paper, SMALL, seeds=1)
    results[0] = changed(results[0], data_order="other")
    with pytest.raises(ValueError, match="The pair seq0, causal_lm, sgd, 0 differs in data_order"):
        pairs_table(runs_table(results))


def test_half_a_pair_has_no_row_and_a_failed_run_none() -> None:
    results = study(paper, SMALL, seeds=1)
    results[1] = Result("out of memory", results[1].config, message="CUDA out of memory")
    assert len(runs_table(results)) == len(results) - 1
    assert len(pairs_table(runs_table(results))) == len(results) / 2 - 1


@pytest.mark.parametrize(
    ("models", "seeds"),
    [(8, 2), pytest.param(4, 2, marks=pytest.mark.slow), pytest.param(15, 2, marks=pytest.mark.slow)],
)
def test_the_interval_covers_the_truth(models: int, seeds: int) -> None:
    """500 simulated studies with random effects of models and seeds; the interval must cover the true mean."""
    rng, hits = np.random.default_rng(1), 0
    for study_number in range(500):
        effects = rng.normal(0.3, 0.2, models)
        rows = [
            {"model": str(m), "seed": s, "x": effects[m] + rng.normal(0, 0.1)}
            for m in range(models)
            for s in range(seeds)
        ]
        _, low, high = interval(pd.DataFrame(rows), lambda r: float(r["x"].mean()), draws=40, seed=study_number)
        hits += low <= 0.3 <= high
    assert 0.92 <= hits / 500 <= 0.985
