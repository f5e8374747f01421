"""What the terminal shows of runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from report_cases import CASES, printed
from runs import changed, make_runs

from depthcb.report.groups import groups, label
from depthcb.run import Run
from depthcb.style import MISSING
from depthcb.verdict import percent


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def runs(request: pytest.FixtureRequest) -> list[Run]:
    return make_runs(**request.param)


@pytest.mark.parametrize("layers", [6, 12, 30, 48])
def test_the_terminal_shows_numbers_and_verdict(layers: int) -> None:
    runs = make_runs(layers)
    text = printed(runs)
    assert max(map(len, text.splitlines())) <= 80
    flat = " ".join(text.split())
    for run in runs:
        last = run.profiles["cka"][-1]
        numbers = [*last.change, *run.profiles["cka_normalized"][-1].change, *run.step_ratio.mean]
        assert all(f" {n:.3g} " in text for n in numbers)
        assert last.slope_interval is not None
        low, high = last.slope_interval
        assert f"slope {last.slope:+.3g} [{low:+.3g}, {high:+.3g}]" in flat
    for group in groups(runs):
        found = group.comparison
        assert found is not None
        assert found.share is not None
        assert f"equal-step minus standard relative slope {found.difference} ({percent(found.share)} of the" in flat
        assert f"the control removed a step-ratio spread of {group.spread:.3g}x" in flat
        null = [p.relative_slope for p in group.runs[0].null["cka"] if p.relative_slope is not None]
        shown = f"{np.mean(null):+.3g} [{min(null):+.3g} to {max(null):+.3g} in 3 draws] at the same size of weights"
        assert f"null of standard: relative slope {shown}" in flat
    assert flat.count("one pair: this speaks of its probe rows, not of training") == 2
    assert flat.count("agree on the sign of the slope") == 2
    assert flat.count("2.5 !") == 2
    assert f" {runs[0].effective_rank[-1]:.1f} " in flat
    assert f"layers.{layers - 1} " in text


def test_the_terminal_marks_what_is_missing(runs: list[Run]) -> None:
    text = printed(runs)
    assert "None" not in text
    assert "nan" not in text
    for group in groups(runs):
        for run in group.runs:
            if not run.profiles:
                assert f"{label(run, group)}: {MISSING} no depth profile was measured" in text


def test_long_names_keep_their_end() -> None:
    text = printed(make_runs(30, name="base_model.model.transformer.decoder.blocks.{}"))
    assert "…blocks.29 " in text
    assert max(map(len, text.splitlines())) <= 80


def test_disagreeing_measures_stand_out() -> None:
    def turn(record: dict[str, Any]) -> None:
        profile = record["rows"][-1]["profiles"]["cka_normalized"]
        profile["change"] = profile["change"][::-1]
        low, high = profile["relative_slope_interval"]
        profile["relative_slope_interval"] = (-high, -low)

    runs = make_runs(arms=2)
    runs[0] = changed(runs[0], "DepthProfile", turn)
    assert "the measures DISAGREE on the sign of the slope (cka, cka_normalized)" in " ".join(printed(runs).split())


@pytest.mark.parametrize("layers", [6, 48])
def test_bars_are_as_long_as_the_changes(layers: int) -> None:
    (run,) = make_runs(layers, arms=1)
    lines = printed([run], bars=True).splitlines()
    assert max(map(len, lines)) <= 80
    last = run.profiles["cka"][-1]
    bars = [line.count("█") for line in lines[1 : layers + 1]]
    assert np.abs(np.array(bars) - np.array(last.change) / max(last.change) * max(bars)).max() < 1.5
    assert all(f" {c:.3g} " in line for c, line in zip(last.change, lines[1:], strict=False))
    assert "no depth profile was measured yet" in printed(make_runs(validations=(0,), arms=1), bars=True)
