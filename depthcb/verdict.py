"""What the equal-step control did to the slope: one pair of runs, and the verdict over replicated pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from depthcb.intervals import Estimate, mean_interval, percentile_interval, share_interval
from depthcb.profile import Profile

#: The words by the share of the standard relative slope that is left under the control, each between its two bounds.
WORDS = ("reverses", "collapses", "weakens", "persists", "strengthens")
#: The bounds between the words [ours].
BOUNDS = (-0.2, 0.2, 0.8, 1.25)
#: The null explains a slope if its share of the relative slope lies above this bound [ours].
NULL_EXPLAINS = 0.8
#: Fewer pairs carry no word [ours].
FEWEST_PAIRS = 4

Agreement = Literal["agree", "disagree", "undecided"]
NullWord = Literal["no more than noise", "beyond noise", "undecided", "not measured"]


@dataclass(frozen=True)
class PairComparison:
    """What one pair shows about its probe rows; one pair carries no verdict on training.

    Args:
        difference: Relative slope of the equal-step run minus that of the standard run, with its paired interval over
            the same halves of the probe.
        share: The share of the standard relative slope that is left; None if the standard run's own interval
            contains 0.
    """

    difference: Estimate
    share: Estimate | None


def compare_pair(standard: Profile, equal_step: Profile) -> PairComparison | None:
    """Compares the relative slopes of two runs on the same halves of the same probe [ours].

    Args:
        standard: The last profile of the standard run.
        equal_step: That of the equal-step run, on the same probe and under the same measure.

    Returns:
        The comparison; None if a profile has no interval or nothing changed in it.

    Example:
        >>> slopes = [[0.4, 0.5, 0.6], [0.1, 0.2, 0.3]]
        >>> runs = [Profile((0.75, 1.25), ("a", "b"), "cka", half_relative_slopes=tuple(s)) for s in slopes]
        >>> str(compare_pair(*runs).difference)
        '+0 [-0.3, -0.3]'
    """
    before, after = standard.relative_slope, equal_step.relative_slope
    halves, others = standard.half_relative_slopes or (), equal_step.half_relative_slopes or ()
    both = [pair for pair in zip(halves, others, strict=False) if None not in pair]
    if before is None or after is None or len(halves) != len(others) or not both:
        return None
    s, e = np.asarray(both, dtype=np.float64).T
    known = standard.relative_slope_interval is not None and percentile_interval(before, s).sign != 0
    share = percentile_interval(after / before, e / s) if known else None
    return PairComparison(percentile_interval(after - before, e - s), share)


@dataclass(frozen=True)
class Verdict:
    """The verdict over replicated pairs, with the estimates that it follows from.

    Args:
        word: One of `WORDS`, ``"emerges"``, ``"no more than noise"`` or ``"undecided"``.
        reason: One sentence with the numbers behind the word.
        standard: Mean relative slope of the standard runs.
        equal_step: Mean relative slope of the equal-step runs.
        share: Share of the standard relative slope that is left under the control; None if the interval of
            ``standard`` contains 0.
        null_share: Share of the standard relative slope that the null has; None without a null or without ``share``.
        null: What the null says about the standard slope.
    """

    word: str
    reason: str
    standard: Estimate
    equal_step: Estimate
    share: Estimate | None = None
    null_share: Estimate | None = None
    null: NullWord = "not measured"


def judge(
    standard: Sequence[float],
    equal_step: Sequence[float],
    null: Sequence[float] = (),
    *,
    bounds: Sequence[float] = BOUNDS,
    null_explains: float = NULL_EXPLAINS,
) -> Verdict:
    """Judges replicated pairs by the relative slopes of their runs, paired by seed [ours].

    The first rule that fits decides. The interval of the standard slope contains 0: *emerges* if the intervals of the
    equal-step slope and of the difference exclude 0, else *undecided*. The null's share of the standard slope lies
    above ``null_explains``: *no more than noise*. The share that is left under the control lies between two bounds:
    *reverses* < -0.2 < *collapses* < 0.2 < *weakens* < 0.8 < *persists* < 1.25 < *strengthens*. Else *undecided*.
    Intervals of means are Student's, those of shares Fieller's, both at 95 % over the pairs.

    Args:
        standard: Relative slopes of the n standard runs.
        equal_step: Relative slopes of their equal-step twins, in the same order.
        null: The mean relative slope of each standard run's null, in the same order; empty if it was not measured.
        bounds: The four bounds between the words.
        null_explains: The null explains the slope if its share lies above this bound.

    Raises:
        ValueError: There are fewer than 4 pairs, or the lengths differ.

    Example:
        >>> verdict = judge([0.50, 0.52, 0.48, 0.51], [0.49, 0.52, 0.47, 0.50])
        >>> verdict.word, str(verdict.share)
        ('persists', '+0.985 [+0.968, +1]')
    """
    if len(standard) < FEWEST_PAIRS:
        raise ValueError(f"{len(standard)} pairs: a verdict needs at least {FEWEST_PAIRS} seeds.")
    if len(equal_step) != len(standard) or len(null) not in (0, len(standard)):
        raise ValueError(f"{len(standard)} standard slopes, {len(equal_step)} equal-step, {len(null)} null: unpaired.")
    sign = 1.0 if np.mean(standard) >= 0 else -1.0
    s, e, noise = (sign * np.asarray(values, dtype=np.float64) for values in (standard, equal_step, null))
    before, after = mean_interval(s), mean_interval(e)
    share = share_interval(e, s)
    measured = (before, after) if sign > 0 else (-before, -after)
    told = f"relative slope {measured[0]} standard, {measured[1]} equal-step over {len(s)} pairs"
    if share is None:
        emerges = after.sign != 0 and mean_interval(e - s).sign != 0
        reason = f"{told}: the standard slope is not distinguishable from 0"
        return Verdict("emerges" if emerges else "undecided", reason, *measured)
    null_share = share_interval(noise, s) if len(noise) else None
    word, why = _word(share, bounds)
    null_word = _null_word(null_share, null_explains)
    if null_share is not None and null_word == "no more than noise":
        word, why = null_word, f"the null alone has {percent(null_share)} of the standard slope"
    return Verdict(word, f"{told}: {why}", *measured, share, null_share, null_word)


def agreement(signs: Mapping[str, Sequence[int]]) -> Agreement:
    """Returns whether the measures agree on the sign of the slope, in the standard and in the equal-step runs [ours].

    Args:
        signs: By measure, the sign of each run's (or mean) slope: 0 where its interval contains 0.

    Returns:
        ``"disagree"`` if two measures have intervals on opposite sides of 0 in the same run; ``"agree"`` if all
        intervals of each run lie on one side or all contain 0; else ``"undecided"``.

    Example:
        >>> agreement({"cka": [1, 1], "cka_normalized": [1, -1]})
        'disagree'
        >>> agreement({"cka": [1, 1], "cka_normalized": [1, 0]})
        'undecided'
    """
    columns = [set(column) for column in zip(*signs.values(), strict=True)]
    if any({1, -1} <= column for column in columns):
        return "disagree"
    return "agree" if all(len(column) == 1 for column in columns) else "undecided"


def possible_words(share: Estimate, bounds: Sequence[float] = BOUNDS) -> tuple[str, ...]:
    """Returns the words that an interval of the share does not exclude; a single one is the verdict.

    Example:
        >>> possible_words(Estimate(0.7, 0.5, 0.9))
        ('weakens', 'persists')
    """
    first, last = (int(np.searchsorted(bounds, end)) for end in (share.low, share.high))
    return WORDS[first : last + 1]


def _word(share: Estimate, bounds: Sequence[float]) -> tuple[str, str]:
    words, left = possible_words(share, bounds), f"{percent(share)} of it is left"
    return (words[0], left) if len(words) == 1 else ("undecided", f"{left}, so {' or '.join(words)} is possible")


def _null_word(share: Estimate | None, bound: float) -> NullWord:
    if share is None:
        return "not measured"
    if share.low > bound:
        return "no more than noise"
    return "beyond noise" if share.high < bound else "undecided"


def percent(share: Estimate) -> str:
    """Formats a share with its interval.

    >>> percent(Estimate(0.5, 0.25, 0.75))
    '50% [25%, 75%]'
    """
    return f"{share.value:.0%} [{share.low:.0%}, {share.high:.0%}]"
