"""The study's tables on simulated studies with known effects."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import wandb
from offline import summary
from planted import BOTH, SMALL, changed, everywhere, figures, paper, study
from scipy import stats

from depthcb.profile import Profile
from depthcb.verdict import compare_pair
from depthcb_recipes.studies.measures import agreement_lines, tables_by_measure
from depthcb_recipes.studies.page import all_cells
from depthcb_recipes.studies.result import Result
from depthcb_recipes.studies.tables import cells_table, pairs_table, pooled, runs_table
from depthcb_recipes.studies.wandb_summary import publish


def test_the_table_of_pairs_has_their_figures() -> None:
    results = study(paper, SMALL, seeds=1)
    pairs = pairs_table(runs_table(results))
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
    found = compare_pair(standard, equal)
    assert found is not None
    assert found.share is not None
    assert (row["difference"], row["difference_low"]) == (found.difference.value, found.difference.low)
    assert (row["share"], row["share_high"]) == (found.share.value, found.share.high)


def test_cells_are_means_over_seeds_with_a_pooled_variance() -> None:
    runs = runs_table(study(paper, SMALL, seeds=3))
    cells = cells_table(runs)
    assert len(cells) == len(SMALL) * 4
    standard = runs[runs["control"] == "standard"]
    groups = {key: g["relative_slope"].to_numpy() for key, g in standard.groupby(["model", "objective"])}
    variance = np.mean([g.var(ddof=1) for g in groups.values()])  # as of equally large groups
    half = stats.t.ppf(0.975, 2 * len(groups)) * np.sqrt(variance / 3)
    for _, cell in cells.iterrows():
        own = groups[cell["model"], cell["objective"]]
        assert cell["slope"] == pytest.approx(own.mean())
        assert cell["slope_high"] - cell["slope"] == pytest.approx(half)
        kept = cell["block"] == "sequential" or cell["objective"] == "causal_lm"
        assert cell["keeps"] == ("keeps" if kept else "does not")
        assert cell["word"] == "3 of 4 seeds"
        assert cell["share"] == pytest.approx(cell["equal"] / cell["slope"])


def test_a_cell_without_a_slope_is_open() -> None:
    def flat(model: str, block: str, size: float, objective: str, control: str, rng: np.random.Generator) -> float:
        return float(rng.normal(0, 0.1))

    cells = cells_table(runs_table(study(flat, SMALL)))
    assert (cells["keeps"] == "open").mean() > 0.8
    assert cells[cells["keeps"] == "open"]["share"].isna().mean() > 0.8


def test_four_seeds_carry_a_word() -> None:
    cells = cells_table(runs_table(study(paper, SMALL, seeds=4)))
    sequential = cells[cells["block"] == "sequential"]
    assert set(sequential["word"]) == {"persists", "undecided"}
    assert set(cells[(cells["block"] == "parallel") & (cells["objective"] == "contrastive")]["word"]) <= {
        "reverses",
        "undecided",
    }


def test_a_null_that_explains_is_found_in_each_cell() -> None:
    def flat(model: str, block: str, size: float, objective: str, control: str, rng: np.random.Generator) -> float:
        return float(0.8 + rng.normal(0, 0.02))

    words = [cells_table(runs_table(study(flat, SMALL, null=null)))["null_word"] for null in (0.2, 0.8)]
    assert set(words[0]) == {"beyond noise"}
    assert set(words[1]) == {"no more than noise"}
    results = [changed(r, matched_null={}) for r in study(flat, SMALL)]
    assert set(cells_table(runs_table(results))["null_word"]) == {"not measured"}


def test_one_seed_per_cell_has_no_interval() -> None:
    rows = pd.DataFrame({"model": ["a", "b"], "objective": ["x", "x"]})
    table = pooled(rows, pd.Series([1.0, 2.0]), "y")
    assert list(table["y"]) == [1.0, 2.0]
    assert table[["y_low", "y_high"]].isna().all().all()
    assert set(cells_table(runs_table(study(paper, SMALL, seeds=1)))["keeps"]) == {"open"}


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
    assert len(cells_table(runs_table(results))) == len(SMALL) * 4


def test_slopes_of_models_of_different_depth_are_corrected() -> None:
    for layers, relative in ((4, 1.2), (48, 1.9183673469387754)):
        even = Profile(tuple(range(1, layers + 1)), tuple(map(str, range(layers))), "cka")
        assert even.relative_slope == pytest.approx(relative)
        assert even.depth_corrected_slope == pytest.approx(2.0)
    assert runs_table(study(paper, BOTH, seeds=1))["depth_corrected_slope"].notna().all()


def test_a_study_is_summarised_in_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the real client, offline: one run per cell, read back by W&B's own reader."""
    runs = runs_table(study(paper, {"seq0": ("sequential", 1e8)}, objectives=("causal_lm", "contrastive"), seeds=4))
    cells = all_cells(runs)
    wandb.teardown()  # W&B reads these variables once per process
    with monkeypatch.context() as context:
        context.setenv("WANDB_MODE", "offline")
        context.setenv("WANDB_DIR", str(tmp_path))
        assert publish(cells, "my-study", "depthcb-test") == 2
    wandb.teardown()
    found = [summary(folder) for folder in tmp_path.glob("wandb/offline-run-*")]
    found.sort(key=lambda run: run["config"]["objective"])  # names of folders tell no order within a second
    assert [f["config"]["objective"] for f in found] == ["causal_lm", "contrastive"]
    for logged, (_, cell) in zip(found, cells.iterrows(), strict=True):
        assert logged["summary"]["study/word"] == cell["word"]
        assert logged["summary"]["study/share"] == pytest.approx(cell["share"])
        assert logged["summary"]["study/null_low"] == pytest.approx(cell["null_low"])
        assert logged["summary"]["study/spread"] == pytest.approx(5.0)
        assert "study/floor" not in logged["summary"], "not measured in these profiles"
        assert logged["config"]["study"] == "my-study"


def test_any_measure_decides_and_the_others_are_heard() -> None:
    """By the second measure, the runs of parallel blocks keep their slopes too."""
    results, others = study(paper, SMALL, seeds=4), study(everywhere, SMALL, seeds=4)
    mixed = [
        dataclasses.replace(r, figures=dataclasses.replace(figures(r), profiles={
            "cka": figures(r).profiles["cka"], "procrustes": figures(o).profiles["cka"] | {"measure": "procrustes"},
        }, matched_null={m: figures(r).matched_null["cka"] for m in ("cka", "procrustes")}))
        for r, o in zip(results, others, strict=True)
    ]  # fmt: skip
    by_cka, by_procrustes = tables_by_measure(mixed), tables_by_measure(mixed, "procrustes")
    assert list(by_procrustes) == ["procrustes", "cka"]
    pd.testing.assert_frame_equal(by_cka["procrustes"], by_procrustes["procrustes"])
    assert set(by_procrustes["procrustes"]["measure"]) == {"procrustes"}
    assert set(cells_table(by_procrustes["procrustes"])["keeps"]) == {"keeps"}
    pair = pairs_table(by_procrustes["procrustes"]).iloc[0]
    assert pair["slope_standard"] == Profile.from_dict(figures(mixed[0]).profiles["procrustes"]).slope
    first, second = agreement_lines(by_procrustes)
    assert first == "Decided by procrustes."
    assert re.match(
        r"By cka: the same in \d+ of 32 cells and \d of 5 claims: sgd C2 supported instead of not supported", second
    )
    assert "par3 contrastive sgd reverses instead of persists" in second
    with pytest.raises(ValueError, match="'cosine' was not measured in all runs: name one of cka, procrustes"):
        tables_by_measure(mixed, "cosine")
