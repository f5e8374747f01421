"""The verdict over replicated pairs, and the comparison of one pair."""

from __future__ import annotations

import numpy as np
import pytest
from calibrate import Planted, planted_words
from scipy import stats

from depthcb.intervals import Estimate, mean_interval, share_interval
from depthcb.profile import Profile
from depthcb.verdict import FEWEST_PAIRS, Verdict, agreement, compare_pair, judge, possible_words

NAMES = ("a", "b", "c")
#: Deviations of four seeds from their mean, with standard deviation 1.
SEEDS = np.array([1.0, -1.0, 1.0, -1.0]) * np.sqrt(3 / 4)


def pairs(standard: float, equal_step: float, noise: float = 0.02, null: float | None = None) -> Verdict:
    s, e = standard + noise * SEEDS, equal_step + noise * SEEDS[[0, 1, 3, 2]]
    return judge(s.tolist(), e.tolist(), [] if null is None else (null + noise * SEEDS).tolist())


@pytest.mark.parametrize(
    ("standard", "equal_step", "word"),
    [
        (0.5, 0.5, "persists"),
        (-0.5, -0.5, "persists"),
        (0.5, 0.25, "weakens"),
        (-0.5, -0.25, "weakens"),
        (0.5, 0.01, "collapses"),
        (0.5, -0.01, "collapses"),
        (0.5, -0.3, "reverses"),
        (-0.5, 0.3, "reverses"),
        (0.5, 0.9, "strengthens"),
        (0.5, 0.41, "undecided"),
        (0.01, 0.5, "emerges"),
        (-0.01, 0.5, "emerges"),
        (0.01, 0.01, "undecided"),
    ],
)
def test_rule(standard: float, equal_step: float, word: str) -> None:
    found = pairs(standard, equal_step)
    assert found.word == word
    assert found.standard.value == pytest.approx(standard)
    assert found.equal_step.value == pytest.approx(equal_step)


def test_the_null_is_asked_first() -> None:
    assert (pairs(0.5, 0.5, null=0.5).word, pairs(0.5, 0.5, null=0.5).null) == ("no more than noise",) * 2
    assert (pairs(0.5, 0.5, null=0.1).word, pairs(0.5, 0.5, null=0.1).null) == ("persists", "beyond noise")
    assert pairs(0.5, 0.5, null=0.4).null == "undecided"
    assert pairs(0.5, 0.5).null == "not measured"


def test_an_undecided_verdict_names_what_is_possible() -> None:
    found = pairs(0.5, 0.41)
    assert "so weakens or persists is possible" in found.reason
    assert possible_words(Estimate(0.0, -0.5, 1.3)) == ("reverses", "collapses", "weakens", "persists", "strengthens")


def test_bounds_are_arguments() -> None:
    s, e = [0.5, 0.51, 0.49, 0.5], [0.3, 0.31, 0.29, 0.3]
    assert judge(s, e).word == "weakens"
    assert judge(s, e, bounds=(-0.2, 0.2, 0.5, 1.25)).word == "persists"
    assert judge(s, e, e).null == "beyond noise"
    assert judge(s, e, e, null_explains=0.5).word == "no more than noise"


def test_few_or_unpaired_runs_are_refused() -> None:
    with pytest.raises(ValueError, match=f"3 pairs: a verdict needs at least {FEWEST_PAIRS} seeds"):
        judge([0.5] * 3, [0.5] * 3)
    with pytest.raises(ValueError, match="4 standard slopes, 3 equal-step, 0 null: unpaired"):
        judge([0.5] * 4, [0.5] * 3)


def test_intervals_agree_with_scipy() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(0.6, 0.1, 6), rng.normal(1.0, 0.1, 6)
    own, theirs = mean_interval(x), stats.ttest_1samp(x, 0.0).confidence_interval(0.95)
    assert (own.low, own.high) == pytest.approx((theirs.low, theirs.high))
    share = share_interval(x, y)
    assert share is not None
    for end in (share.low, share.high):  # by definition: a test of mean(x - q y) = 0 has p = 0.05 at both ends
        assert stats.ttest_1samp(x - end * y, 0.0).pvalue == pytest.approx(0.05)
    assert stats.ttest_1samp(x - share.value * y, 0.0).pvalue == pytest.approx(1.0)
    assert share_interval(x, y - y.mean()) is None
    assert share_interval([0.5] * 4, [1.0] * 4) == Estimate(0.5, 0.5, 0.5)


def test_the_share_covers_the_truth() -> None:
    rng, hits = np.random.default_rng(1), 0
    for _ in range(2000):
        shared = rng.normal(0, 0.1, 4)
        share = share_interval(0.7 + shared + rng.normal(0, 0.1, 4), 1.0 + shared + rng.normal(0, 0.1, 4))
        hits += share is not None and share.low <= 0.7 <= share.high
    assert 0.94 <= hits / 2000 <= 0.96


@pytest.mark.parametrize("planted", list(planted_words()), ids=str)
def test_false_words_are_rare(planted: Planted) -> None:
    words = planted.words(400)
    true = {*planted.true_words, "undecided", "not measured"}
    false = sum(rate for said, rate in words.items() if not set(said.split(", ")) <= true)
    assert stats.binomtest(round(400 * false), 400, 0.05, alternative="greater").pvalue > 0.005


def run(slopes: list[float | None], relative: float) -> Profile:
    change = (1 - relative / 2, 1.0, 1 + relative / 2)
    known = [s for s in slopes if s is not None]
    low, high = np.percentile(known, (2.5, 97.5)).tolist()
    return Profile(change, NAMES, "cka", relative_slope_interval=(low, high), half_relative_slopes=tuple(slopes))


def test_one_pair_is_compared_half_by_half() -> None:
    rng = np.random.default_rng(2)
    s = 0.5 + rng.normal(0, 0.2, 200)
    e = s - 0.1 + rng.normal(0, 0.01, 200)
    found = compare_pair(run(s.tolist(), 0.5), run(e.tolist(), 0.4))
    assert found is not None
    assert found.difference.value == pytest.approx(-0.1)
    assert found.difference.high - found.difference.low < 0.1 * np.ptp(np.percentile(s, (2.5, 97.5)))
    assert found.share is not None
    assert (found.share.low, found.share.high) == pytest.approx(np.percentile(e / s, (2.5, 97.5)))
    gaps = compare_pair(run([None, *s[1:].tolist()], 0.5), run([*e[:-1].tolist(), None], 0.4))
    assert gaps is not None
    assert gaps.difference.low == pytest.approx(np.percentile((e - s)[1:-1], 2.5))


def test_a_pair_without_a_standard_slope_has_no_share() -> None:
    rng = np.random.default_rng(3)
    s, e = rng.normal(0, 0.2, 200), rng.normal(0.4, 0.1, 200)
    found = compare_pair(run(s.tolist(), 0.0), run(e.tolist(), 0.4))
    assert found is not None
    assert found.share is None


def test_a_pair_without_intervals_or_change_is_not_compared() -> None:
    bare, still = Profile((0.1, 0.2, 0.3), NAMES, "cka"), Profile((0.0, 0.0, 0.0), NAMES, "cka")
    known = run([0.4, 0.5, 0.6], 0.5)
    assert compare_pair(bare, known) is compare_pair(known, still) is compare_pair(bare, bare) is None
    assert compare_pair(known, run([0.4, 0.5], 0.5)) is None


def test_measures_agree_on_both_runs() -> None:
    assert agreement({"a": [1, 1], "b": [1, 1]}) == "agree"
    assert agreement({"a": [1, 0], "b": [1, 0]}) == "agree"
    assert agreement({"a": [1, 1], "b": [1, -1]}) == "disagree"
    assert agreement({"a": [1, 1], "b": [1, 0]}) == "undecided"
    assert agreement({"a": [1, 1]}) == "agree"
