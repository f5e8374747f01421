"""The page of a test by training: its panel and table say what the trainings' results say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from advised import trained
from planted import OBJECTIVES, SMALL, paper, study
from scipy import stats

from depthcb.advice import LAST, RANDOM, RULES
from depthcb_recipes.advice.arms import ALL, Arm
from depthcb_recipes.advice.page import TESTED, budget_chart, entries_of, write_tested
from depthcb_recipes.studies.page import write_study
from depthcb_recipes.studies.tables import pairs_table, runs_table

SEEDS = 4
PANEL = "Validation loss by budget"


def by_seed(rule: str, found: list[Arm], losses: dict[str, float]) -> list[float]:
    of_rule = [(arm.config.seed, losses[arm.config.hash]) for arm in found if arm.rule == rule]
    return [float(np.mean([loss for s, loss in of_rule if s == seed])) for seed in range(SEEDS)]


def test_the_bars_are_scipys_paired_t_intervals_of_the_difference_from_all_layers(tmp_path: Path) -> None:
    table, found, losses = trained(tmp_path, 0.25)
    fig = budget_chart(entries_of(0.25, [table]))
    traces = {trace.name: trace for trace in fig.data}
    rules = [rule for rule in RULES if any(arm.rule == rule for arm in found)]
    assert list(traces) == [*rules, ALL], "the rules have the same order and colour whatever came out"
    everything = by_seed(ALL, found, losses)
    for rule in rules:
        own = by_seed(rule, found, losses)
        reference = stats.ttest_rel(own, everything).confidence_interval(1 - 0.05 / len(rules))
        assert traces[rule].y == pytest.approx([np.mean(own)])
        assert traces[rule].error_y.array == pytest.approx([(reference.high - reference.low) / 2])
        assert traces[rule].x == ("budget 25 %<br>200",)
    assert traces[ALL].y == pytest.approx([np.mean(everything)])
    (line,) = fig.layout.shapes
    assert line.y0 == line.y1 == pytest.approx(np.mean(everything))
    low, high = fig.layout.yaxis.range
    for trace in fig.data:
        bar = trace.error_y.array[0] if trace.error_y.array else 0
        assert low < trace.y[0] - bar <= trace.y[0] + bar < high
    styles = [(trace.marker.color, trace.marker.symbol) for trace in fig.data]
    assert len(set(styles)) == len(styles)


def test_budgets_of_the_same_training_share_a_page(tmp_path: Path) -> None:
    def budgets() -> list[float]:
        return [entry["budget"] for entry in json.loads((tmp_path / TESTED).read_text())["tested"]]

    half, quarter = (trained(tmp_path, share)[0] for share in (0.5, 0.25))
    for share, table in ((0.5, half), (0.25, quarter), (0.25, quarter)):
        page = write_tested(tmp_path, "a", share, [table], "planted")
    assert budgets() == [0.25, 0.5]
    text = page.read_text(encoding="utf-8")
    assert text.count(PANEL) == 1
    assert text.index("Budget 25 %: No rule beats") < text.index("Budget 50 %: ")
    (expected,) = (row.loss for row in quarter.rows if row.rule == LAST)
    assert f"<td>{expected:.4f}</td>" in text
    write_tested(tmp_path, "another training", 0.25, [quarter], "planted")
    assert budgets() == [0.25]
    write_tested(tmp_path, "another training", 0.125, [trained(tmp_path, 0.125, seeds=2)[0]], "planted")
    assert budgets() == [0.125], "with other seeds all layers are another line"


def test_without_budgets_there_is_no_panel(tmp_path: Path) -> None:
    table, found, _ = trained(tmp_path, 0.25, seeds=1)
    nothing: dict[str, Any] = {"rows": (), "seeds": (), "missing": len(found)}
    page = write_tested(tmp_path, "a", 0.25, [dataclasses.replace(table, **nothing)], "planted")
    assert PANEL not in page.read_text(encoding="utf-8")
    runs = runs_table(study(paper, SMALL, objectives=OBJECTIVES[:1]))
    write_study(runs, pairs_table(runs), tmp_path / "study.html", title="planted")
    assert PANEL not in (tmp_path / "study.html").read_text(encoding="utf-8")


def test_one_seed_has_no_bars(tmp_path: Path) -> None:
    table, _, _ = trained(tmp_path, 0.25, seeds=1)
    (entry,) = entries_of(0.25, [table])
    assert {row["minus_all"] for row in entry["rows"]} == {None}
    assert {trace.error_y.array[0] for trace in budget_chart([entry]).data if trace.name != ALL} == {0.0}
    assert RANDOM in {trace.name for trace in budget_chart([entry]).data}
