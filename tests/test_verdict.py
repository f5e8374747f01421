"""The verdict rule, case by case."""

from __future__ import annotations

import pytest

from depthcb.profile import Profile
from depthcb.verdict import judge

NAMES = ("a", "b", "c")


def run(relative: float, half_width: float = 0.1, normalised: float | None = None) -> dict[str, Profile]:
    """Profiles with mean change 1 and the given relative slopes."""

    def one(measure: str, slope: float) -> Profile:
        change = (1 - slope / 2, 1.0, 1 + slope / 2)
        interval = (slope - half_width, slope + half_width)
        return Profile(change, NAMES, measure, slope_interval=interval, relative_slope_interval=interval)

    return {"cka": one("cka", relative), "cka_normalized": one("n", relative if normalised is None else normalised)}


@pytest.mark.parametrize(
    ("standard", "equal_step", "verdict"),
    [
        (run(0.5), run(0.5), "persists"),
        (run(0.5), run(0.41), "persists"),
        (run(0.5), run(0.39), "weakens"),
        (run(-0.5), run(-0.2), "weakens"),
        (run(0.5), run(0.9), "persists"),
        (run(0.5), run(0.05), "collapses"),
        (run(0.5), run(-0.05), "collapses"),
        (run(0.5), run(-0.3), "reverses"),
        (run(-0.5), run(0.3), "reverses"),
        (run(0.05), run(0.5), "none"),
        (run(0.5, normalised=-0.5), run(0.5), "none"),
    ],
)
def test_rule(standard: dict[str, Profile], equal_step: dict[str, Profile], verdict: str) -> None:
    found = judge(standard, equal_step, spread=3.0)
    assert found.verdict == verdict
    assert found.spread == 3.0
    assert found.measures_agree == (standard["cka_normalized"].slope * standard["cka"].slope > 0)


def test_nothing_changed_is_no_verdict() -> None:
    still = {"cka": Profile((0.0, 0.0, 0.0), NAMES, "cka")}
    assert judge(still, still, 1.0).verdict == "none"


def test_no_interval_is_refused() -> None:
    bare = {"cka": Profile((0.1, 0.2, 0.3), NAMES, "cka")}
    with pytest.raises(ValueError, match="no slope interval"):
        judge(bare, bare, 1.0)


def test_a_control_under_which_nothing_changed_decides_nothing() -> None:
    still = {m: Profile((0.0, 0.0, 0.0), NAMES, m) for m in ("cka", "cka_normalized")}
    assert judge(run(0.5), still, 1.5).verdict == "none"
