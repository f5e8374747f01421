"""The closing sentences agree with the null and the spread, and never say more than the rules of verdicts."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import re
from typing import Any

import pytest
from runs import make_runs

from depthcb.glossary import VERDICTS
from depthcb.profile import Profile
from depthcb.report.groups import Group, Replicates, groups, replicates
from depthcb.report.plain_words import pair_sentence, verdict_sentence
from depthcb.run import Run

DEPTH = 8


def profile(slope: float, wobble: float = 0.01) -> Profile:
    """A profile of a relative slope, whose halves differ by the wobble."""
    change = tuple(1 + slope * (i / (DEPTH - 1) - 0.5) for i in range(DEPTH))
    halves = tuple(slope + wobble * (i / 99 - 1) for i in range(200))
    names = tuple(f"h.{i}" for i in range(DEPTH))
    ends = (slope - 2 * wobble, slope + 2 * wobble)
    return Profile(
        change,
        names,
        "cka",
        half_relative_slopes=halves,
        slope_interval=ends,
        relative_slope_interval=ends,
        rows=64,
        step=1,
    )


def pair(
    standard: float,
    equal: float,
    null: tuple[float, ...] = (),
    spread: float = 3.0,
    wobble: float = 0.01,
    seed: int = 0,
) -> Group:
    """A pair with these relative slopes, matched nulls of the standard run, and step-ratio spread."""
    found = []
    for run, slope in zip(make_runs(DEPTH, (1, 1), arms=2), (standard, equal), strict=True):
        saved: dict[str, Any] = copy.deepcopy(run.to_dict())
        records = saved["records"]
        records.pop("null")
        depth = records["depth"]
        depth["rows"][0]["profiles"] = {"cka": profile(slope, wobble).to_dict()}
        depth["settings"]["measures"] = {"cka": ""}
        depth["provenance"]["seed"] = str(seed)
        if "equal_step" in records:
            ratios = {f"equal_step/ratio/L{i:02d}": 1e-3 * (spread if i == 0 else 1) for i in range(DEPTH)}
            records["equal_step"]["rows"] = [{"step": 0, **ratios}]
        elif null:
            draws = [{"step": i, "profiles": {"cka": profile(s).to_dict()}} for i, s in enumerate(null)]
            records["matched"] = records["depth"] | {"callback": "matched_null_profiles", "rows": draws}
        found.append(dataclasses.replace(Run.from_dict(saved), name=f"{run.name}-{seed}"))
    (group,) = groups(found)
    assert group.comparison is not None
    return group


def test_a_pair_says_none_of_the_words_whatever_it_shows() -> None:
    nulls = ((), (0.1, 0.2), (1.0, 1.4), (-0.5, 0.9), (30.0, 31.0))
    for s, e, null, spread in itertools.product((1.0, -1.0, 0.05), (1.0, 0.4, 0.0, -0.7), nulls, (1.04, 3.0)):
        text = pair_sentence(pair(s, e, tuple(max(-1.9, min(1.9, n * s)) for n in null), spread))
        assert not any(re.search(rf"\b{word}", text) for word in (*VERDICTS, "keep", "cause", "because")), text
        assert text.endswith("What training does in general takes at least 4 seeds.")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((1.0, 0.4), "on this probe the slope is smaller with equal steps"),
        ((1.0, 1.5), "the slope is steeper with equal steps"),
        ((-1.0, -0.4), "the slope is smaller with equal steps"),
        ((-1.0, -1.5), "the slope is steeper with equal steps"),
        ((1.0, 1.0), "does not tell the slopes of the two runs apart"),
        ((0.005, 0.5), "can't be told from 0, but can from that of the equal-step run"),
        ((0.005, 0.005), "can't be told from 0, nor from that of the equal-step run"),
        ((1.0, 1.0), "whether noise alone would give the standard slope was not measured"),
        ((1.0, 1.0, (1.1, 1.3)), "have 120% of the standard slope on average, so that the slope alone is no sign"),
        ((1.0, 1.0, (0.3, 0.9)), "have 60% of the standard slope on average and more in some draws, so that noise may"),
        ((1.0, 1.0, (0.1, 0.3)), "have 20% of the standard slope on average and at most 30% in a draw"),
        ((-1.0, -1.0, (-1.1, -1.3)), "have 120% of the standard slope on average"),
        ((1.0, 1.0, (), 1.04), "nearly equal before the control (1.04x), which had little to remove"),
        ((1.0, 1.0, (), 3.0), "before the control the layers' steps were up to 3x apart"),
    ],
)
def test_a_pair_agrees_with_its_null_and_its_spread(given: Any, said: str) -> None:
    assert said in pair_sentence(pair(*given))


def test_the_words_of_four_seeds_are_qualified_by_null_and_spread() -> None:
    def four(null: tuple[float, ...], spread: float) -> Replicates:
        pairs = [pair(1 + 0.02 * i, 1 + 0.02 * i, null[i : i + 1], spread, seed=i) for i in range(4)]
        (found,) = replicates(pairs)
        return found

    unmeasured, undecided, noise = four((), 1.04), four((0.1, 1.8, 0.2, 1.9), 3.0), four((1.2, 1.25, 1.2, 1.3), 3.0)
    assert [found.verdicts["cka"].word for found in (unmeasured, undecided, noise)] == [
        "persists", "persists", "no more than noise",
    ]  # fmt: skip
    assert "Whether noise alone would give the standard slope was not measured." in verdict_sentence(unmeasured)
    assert "nearly equal before the control: it had little to remove." in verdict_sentence(unmeasured)
    assert "whether it is more than noise is open." in verdict_sentence(undecided)
    assert "little to remove" not in verdict_sentence(undecided)
    assert verdict_sentence(noise) == VERDICTS["no more than noise"]
