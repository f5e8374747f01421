"""Profile statistics, compared to scipy, numpy and closed forms."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from depthcb import Profile

changes = st.lists(st.floats(0, 2, allow_subnormal=False), min_size=2, max_size=40).filter(lambda c: sum(c) > 1e-9)


def profile(change: list[float], **fields: object) -> Profile:
    return Profile(tuple(change), tuple(f"h.{i}" for i in range(len(change))), "cka", **fields)  # type: ignore[arg-type]


@given(changes)
def test_agrees_with_scipy(change: list[float]) -> None:
    p = profile(change)
    x = np.arange(len(change)) / (len(change) - 1)
    assert p.depth == pytest.approx(x)
    assert p.slope == pytest.approx(scipy.stats.linregress(x, change).slope, abs=1e-9)
    assert p.relative_slope == pytest.approx(p.slope / np.mean(change))
    assert p.centre == pytest.approx(np.average(x, weights=change))
    if len(set(change)) > 1:
        assert p.spearman == pytest.approx(scipy.stats.spearmanr(x, change).statistic, abs=1e-9)
    else:
        assert p.spearman is None


@given(st.integers(1, 30), st.integers(1, 30), st.floats(1e-12, 1))
def test_width_is_the_share_of_layers_that_changed_alike(changed: int, unchanged: int, size: float) -> None:
    assert profile([0.0] * unchanged + [size] * changed).width == pytest.approx(changed / (changed + unchanged))


@given(st.integers(2, 50), st.floats(-0.01, 0.01), st.floats(0.02, 1))
def test_slope_of_a_line(layers: int, slope: float, start: float) -> None:
    p = profile([start + slope * i / (layers - 1) for i in range(layers)])
    assert p.slope == pytest.approx(slope, abs=1e-12)


def test_tiny_changes_keep_their_shape() -> None:
    p, tiny = profile([1.0, 2.0, 4.0]), profile([1e-180, 2e-180, 4e-180])
    assert tiny.width == pytest.approx(p.width)
    assert tiny.relative_slope == pytest.approx(p.relative_slope)


def test_no_change_has_no_shape() -> None:
    p = profile([0.0, 0.0, 0.0])
    assert (p.slope, p.mean) == (0.0, 0.0)
    assert p.relative_slope is p.centre is p.width is p.spearman is None


def test_intervals_are_percentiles_over_halves() -> None:
    halves = np.random.default_rng(0).uniform(0.1, 1, (200, 3))
    p = Profile.from_halves([0.1, 0.2, 0.3], halves, layer_names=("a", "b", "c"), measure="cka")
    slopes = [scipy.stats.linregress([0, 0.5, 1], row).slope for row in halves]
    relative = slopes / halves.mean(axis=1)
    assert p.slope_interval == pytest.approx(np.quantile(slopes, [0.025, 0.975]))
    assert p.relative_slope_interval == pytest.approx(np.quantile(relative, [0.025, 0.975]))
    assert p.band is not None
    assert p.band[0] == pytest.approx(np.quantile(halves, 0.025, axis=0))
    assert p.band[1] == pytest.approx(np.quantile(halves, 0.975, axis=0))


@given(changes, st.integers(0, 10**6))
def test_json_round_trip_is_exact(change: list[float], step: int) -> None:
    p = profile(change, step=step, epoch=2, rows=9, slope_interval=(-0.1, 1 / 3), band=(tuple(change), tuple(change)))
    assert Profile.from_json(p.to_json()) == p
    assert json.loads(p.to_json())["slope"] == p.slope


def test_saves_and_loads(tmp_path) -> None:
    p = profile([0.1, 0.2])
    p.save(tmp_path / "p.json")
    assert Profile.load(tmp_path / "p.json") == p


@pytest.mark.parametrize("text", ["[1, 2]", "{}", '{"change": 3, "layer_names": ["a"], "measure": "cka"}', "nonsense"])
def test_another_file_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - json's own message is clear enough
        Profile.from_json(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [([0.1], "at least 2 layers"), ([0.1, math.nan], "'h.1' is nan"), ([0.1, -0.2], "'h.1' is -0.2")],
)
def test_bad_changes_are_refused(change: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        profile(change)
