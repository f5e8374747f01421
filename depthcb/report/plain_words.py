"""One closing sentence in plain words for each pair and each verdict, which says no more than its rules allow."""

from __future__ import annotations

from depthcb.glossary import VERDICTS
from depthcb.report.groups import Group, Replicates, last
from depthcb.verdict import FEWEST_PAIRS, NULL_EXPLAINS, percent

#: Below this spread the layers' steps were nearly equal before the control, which had little to remove [ours].
LITTLE_SPREAD = 1.5
_NOISE = "random weight changes that change the representations as much"


def pair_sentence(group: Group) -> str:
    """Returns what a compared pair shows on its probe's rows, in plain words; empty without a comparison.

    It uses none of the words of a verdict, and ends by saying that one pair carries none.
    """
    if group.comparison is None:
        return ""
    parts = [_slopes(group), _null(group), _spread(group.spread)]
    if group.agreement == "disagree":
        parts.append("the measures disagree on the sign of the slope, so all of this holds for the first one alone")
    text = "; ".join(part for part in parts if part)
    return f"In plain words: {text}. What training does in general takes at least {FEWEST_PAIRS} seeds."


def _slopes(group: Group) -> str:
    found, standard = group.comparison, last(group.runs[0], group.measures[0])
    assert found is not None
    assert standard is not None
    if found.share is None:
        other = "nor from" if found.difference.sign == 0 else "but can from"
        return f"on this probe the standard run's slope can't be told from 0, {other} that of the equal-step run"
    steeper = found.difference.sign * (1 if standard.slope > 0 else -1)
    if steeper == 0:
        return "this probe does not tell the slopes of the two runs apart"
    return f"on this probe the slope is {'steeper' if steeper > 0 else 'smaller'} with equal steps"


def _null(group: Group) -> str:
    run, measure = group.runs[0], group.measures[0]
    found, standard = group.comparison, last(run, measure)
    if found is None or found.share is None or standard is None or standard.relative_slope is None:
        return ""
    slopes = [p.relative_slope for p in run.matched_null.get(measure, ()) if p.relative_slope is not None]
    if not slopes:
        return "whether noise alone would give the standard slope was not measured"
    shares = [slope / standard.relative_slope for slope in slopes]
    mean = f"{sum(shares) / len(shares):.0%} of the standard slope on average"
    if min(shares) > NULL_EXPLAINS:
        return f"{_NOISE} have {mean}, so that the slope alone is no sign of training"
    if max(shares) > NULL_EXPLAINS:
        return f"{_NOISE} have {mean} and more in some draws, so that noise may explain it"
    return f"{_NOISE} have {mean} and at most {max(shares):.0%} in a draw"


def _spread(spread: float | None) -> str:
    if spread is None:
        return "how far apart the layers' steps were is not known"
    if spread < LITTLE_SPREAD:
        return f"the layers' steps were nearly equal before the control ({spread:.3g}x), which had little to remove"
    return f"before the control the layers' steps were up to {spread:.3g}x apart"


def verdict_sentence(found: Replicates) -> str:
    """Returns what the words of replicated pairs mean, and what the null and the spread leave of them."""
    verdicts = list(found.verdicts.values())
    if not verdicts:
        return ""
    parts = [VERDICTS[word] for word in dict.fromkeys(verdict.word for verdict in verdicts)]
    first = verdicts[0]
    if first.share is not None and first.null == "undecided" and first.null_share is not None:
        share = percent(first.null_share)
        parts.append(f"But {_NOISE} have {share} of the standard slope: whether it is more than noise is open.")
    elif first.share is not None and first.null == "not measured":
        parts.append("Whether noise alone would give the standard slope was not measured.")
    spreads = [pair.spread for pair in found.pairs if pair.spread is not None]
    if spreads and max(spreads) < LITTLE_SPREAD:
        parts.append("The layers' steps were nearly equal before the control: it had little to remove.")
    return " ".join(parts)
