"""The verdict on a pair of runs, standard and equal-step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from depthcb.profile import Interval, Profile

#: An equal-step profile "weakens" below this fraction of the standard relative slope [ours].
WEAKENS_BELOW = 0.8


@dataclass(frozen=True)
class Verdict:
    """A verdict with the context needed to interpret it.

    Args:
        verdict: ``"none"``, ``"collapses"``, ``"reverses"``, ``"weakens"`` or ``"persists"``.
        reason: One sentence with the numbers behind the verdict.
        spread: max r_l / min r_l of the step ratios, which the control removed (1: nothing to remove).
        measures_agree: Whether all measures of the standard run agree on the sign of the slope.
    """

    verdict: str
    reason: str
    spread: float
    measures_agree: bool


def judge(standard: Mapping[str, Profile], equal_step: Mapping[str, Profile], spread: float) -> Verdict:
    """Compares a standard with an equal-step run by the relative slope of their first measure [ours].

    Args:
        standard: Last profile of the standard run, by measure; the first measure decides.
        equal_step: Last profile of the equal-step run, by measure.
        spread: max / min of the per-layer step ratios before the control changed them.

    Raises:
        ValueError: A profile has no interval.

    Example:
        >>> def run(slope, low, high):
        ...     change = (1 - slope / 2, 1 + slope / 2)
        ...     return {"cka": Profile(change, ("a", "b"), "cka", relative_slope_interval=(low, high))}
        >>> judge(run(0.5, 0.4, 0.6), run(0.3, 0.1, 0.5), spread=4.0).verdict
        'weakens'
        >>> judge(run(0.5, 0.4, 0.6), run(0.1, -0.1, 0.3), spread=4.0).verdict
        'collapses'
    """
    measure = next(iter(standard))
    signs = {name: (p.slope > 0) - (p.slope < 0) for name, p in standard.items()}
    agree = len(set(signs.values())) == 1
    before, before_interval = _relative(standard[measure])
    after, after_interval = _relative(equal_step[measure])
    if before is None or before_interval is None or _contains_zero(before_interval):
        verdict, reason = "none", f"the standard slope is not distinguishable from 0 ({_show(before, before_interval)})"
    elif not agree:
        shown = ", ".join(f"{name} {p.slope:+.3g}" for name, p in standard.items())
        verdict, reason = "none", f"the measures disagree on the sign of the standard slope ({shown})"
    elif after is None or after_interval is None:
        verdict, reason = "none", "nothing changed under equal step"
    elif _contains_zero(after_interval):
        shown = _show(after, after_interval)
        verdict, reason = "collapses", f"the equal-step slope is not distinguishable from 0 ({shown})"
    elif (after > 0) != (before > 0):
        verdict, reason = "reverses", f"relative slope {before:+.3g} became {after:+.3g}"
    elif abs(after) < WEAKENS_BELOW * abs(before):
        verdict, reason = "weakens", f"relative slope {before:+.3g} became {after:+.3g}, {after / before:.0%} of it"
    else:
        verdict, reason = "persists", f"relative slope {before:+.3g} became {after:+.3g}, {after / before:.0%} of it"
    return Verdict(verdict, reason, spread, agree)


def _relative(profile: Profile) -> tuple[float | None, Interval | None]:
    if profile.mean > 0 and profile.slope_interval is None and profile.relative_slope_interval is None:
        raise ValueError(f"The {profile.measure} profile has no slope interval: a verdict needs one.")
    return profile.relative_slope, profile.relative_slope_interval


def _contains_zero(interval: Interval) -> bool:
    return interval[0] <= 0 <= interval[1]


def _show(value: float | None, interval: Interval | None) -> str:
    if value is None:
        return "nothing changed"
    return f"{value:+.3g}" + ("" if interval is None else f" [{interval[0]:+.3g}, {interval[1]:+.3g}]")
