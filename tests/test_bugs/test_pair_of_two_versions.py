"""A standard and an equal-step run were not paired when a later version worded the definition of a measure anew."""

from __future__ import annotations

from typing import Any

from runs import changed, make_runs

from depthcb.report.groups import groups


def reworded(record: dict[str, Any]) -> None:
    record["settings"]["measures"] = {
        name: f"{text} In other words." for name, text in record["settings"]["measures"].items()
    }


def test_the_names_of_the_measures_decide() -> None:
    standard, equal = make_runs(arms=2)
    (group,) = groups([standard, changed(equal, "DepthProfile", reworded)])
    assert group.paired
