"""Rank correlations over layers, and how often chance gets a word."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from depthcb.rank_correlation import rank_correlation


def curve(rng: np.random.Generator, layers: int, smooth: bool) -> np.ndarray:
    values = rng.normal(size=layers)
    return values.cumsum() if smooth else values


@pytest.mark.parametrize("layers", [6, 12])
def test_rho_is_scipys_and_p_the_larger_of_two_permutation_tests(layers: int) -> None:
    rng = np.random.default_rng(0)
    for smooth in (False, True):
        x = curve(rng, layers, smooth).round(1)
        y = (x + rng.normal(size=layers)).round(1)
        found = rank_correlation(x.tolist(), y.tolist())
        expected = []
        for a, b in ((x, y), (np.diff(x), np.diff(y))):

            def statistic(v: np.ndarray, axis: int, b: np.ndarray = b) -> np.ndarray:
                return np.abs(np.apply_along_axis(lambda w: stats.spearmanr(w, b)[0], axis, v))

            # of an even statistic, "greater" is two-sided
            options = {"permutation_type": "pairings", "n_resamples": 400 if layers > 7 else 5040}
            expected.append(stats.permutation_test((a,), statistic, alternative="greater", **options).pvalue)
        assert found.rho == pytest.approx(stats.spearmanr(x, y)[0])
        assert found.p_value == pytest.approx(max(expected), abs=0.1 if layers > 7 else 1e-12)


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("layers", [6, 12, 24])
def test_curves_that_have_nothing_in_common_are_rarely_called_correlated(layers: int, smooth: bool) -> None:
    rng = np.random.default_rng(1)
    runs = 150
    words = [rank_correlation(curve(rng, layers, smooth), curve(rng, layers, smooth)).word for _ in range(runs)]
    false = runs - words.count("undecided")
    assert stats.binomtest(false, runs, 0.05, alternative="greater").pvalue > 0.01, false


def test_a_clear_relation_is_called_by_its_sign() -> None:
    rng = np.random.default_rng(2)
    x = curve(rng, 12, smooth=True)
    near = x + 0.1 * rng.normal(size=12)
    assert rank_correlation(x, near).word == "positive"
    assert rank_correlation(x, -near).word == "negative"


def test_few_layers_carry_no_word() -> None:
    for layers in range(2, 6):
        found = rank_correlation(range(layers), [v**2 for v in range(layers)])
        assert found.word == "undecided", layers
    assert str(rank_correlation([1, 1, 1], [1, 2, 3])).endswith("a curve is flat: undecided")
    with pytest.raises(ValueError, match="have 2 and 3 layers"):
        rank_correlation([1, 2], [1, 2, 3])
