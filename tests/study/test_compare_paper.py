"""What the paper reports beside what a study found, and the differences of method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from planted import SMALL, paper, study
from studies import command, smoke

from depthcb.cli import main
from depthcb_recipes.studies.grid import load_study
from depthcb_recipes.studies.paper import LIMITS, REPORTS, comparison, differences
from depthcb_recipes.studies.tables import runs_table

STUDIES = Path(__file__).parents[2] / "recipes" / "depthcb_recipes" / "studies"


def named(name: str) -> dict[str, bool | None]:
    loaded = load_study(STUDIES / f"{name}.yaml")
    return {each.what: each.same for each in differences(loaded.runs, loaded.deciding)}


def test_the_preset_follows_what_is_known_of_the_paper() -> None:
    found = named("paper")
    assert {what for what, same in found.items() if same} == {
        "objectives",
        "measures",
        "probe",
        "contrastive",
        "optimizer",
    }
    assert {what for what, same in found.items() if same is False} == {"runs"}, "180 and 46 of 190 and about 50"
    ours = named("paper-ours")
    assert {what for what, same in ours.items() if same is False} >= {
        "measures",
        "probe",
        "text",
        "contrastive",
        "budget",
    }
    mini = named("mini")
    assert {what for what, same in mini.items() if same is False} >= {"models", "optimizer", "objectives"}


def test_each_claim_stands_beside_its_result() -> None:
    """A planted study that follows the paper's pattern: 64 positive standard slopes of 64."""
    runs = runs_table(study(paper, SMALL))
    text = "\n".join(comparison(runs, load_study(STUDIES / "paper.yaml").runs, "procrustes"))
    for name, report in REPORTS.items():
        assert f"{name} paper: {report}" in text
    assert all(limit in text for limit in LIMITS)
    total = int((runs["control"] == "standard").sum())
    positive = int((runs[runs["control"] == "standard"]["relative_slope"] > 0).sum())
    low = (0.025) ** (1 / total)  # Clopper-Pearson of k of k
    assert positive == total
    assert f"{total} of {total} standard runs, 1.000 [{low:.3g}, 1]" in text.replace("+", "")
    assert "differs: runs. Paper: 190 standard" in text
    assert "same: measures. Paper: Procrustes distance and linear CKA [second-hand]" in text
    assert "procrustes decides" in text


@pytest.mark.slow
def test_a_real_study_is_compared(tmp_path: Path, capsys: Any) -> None:
    path, out = smoke(tmp_path, "gpt2-tiny"), tmp_path / "out"
    assert main(command("compare-paper", path, out)[3:]) == 2
    assert "has no finished run of this study" in capsys.readouterr().err
    assert main([*command("run", path, out)[3:], "--jobs", "1"]) == 0
    capsys.readouterr()
    assert main(command("compare-paper", path, out)[3:]) == 0
    printed = capsys.readouterr().out
    assert "2 standard runs" in printed
    assert "not enough cells (2 of 11)" in printed
    assert "differs: optimizer. Paper: AdamW [second-hand]. Here: sgd." in printed
    assert "differs: text. Paper: Wikipedia" in printed
