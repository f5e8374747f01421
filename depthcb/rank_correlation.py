"""The rank correlation of two curves over the layers, and whether it can be told from chance."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from depthcb.profile import FloatArray, ranks

#: Values up to which all orders are counted (5,040); above, so many random ones.
EXACT, DRAWS = 7, 9999


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rank correlation of two curves over L layers, with a permutation test.

    Args:
        rho: The correlation; None if a curve has the same value everywhere.
        p_value: The larger of two permutation p-values, of the curves and of their steps from layer to layer; 1 if
            the correlations of the two have different signs or one is undefined.
        layers: L.

    Example:
        >>> str(rank_correlation([1, 2, 5, 3, 8, 4], [2, 3, 9, 4, 20, 7]))
        'rank correlation +1.00 over 6 layers (p = 0.017): positive'
    """

    rho: float | None
    p_value: float
    layers: int

    @property
    def word(self) -> str:
        """``"positive"`` or ``"negative"`` if p < 0.05, else ``"undecided"``; always so for fewer than 6 layers."""
        if self.rho is None or self.p_value >= 0.05:
            return "undecided"
        return "positive" if self.rho > 0 else "negative"

    def __str__(self) -> str:
        if self.rho is None:
            return f"rank correlation undefined over {self.layers} layers, a curve is flat: {self.word}"
        return f"rank correlation {self.rho:+.2f} over {self.layers} layers (p = {self.p_value:.2g}): {self.word}"


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> RankCorrelation:
    """Returns Spearman's rank correlation of two curves over the same layers [test ours].

    Neighboring layers resemble one another, so any two smooth curves are strongly correlated, and a permutation test of
    the layers alone calls half of all pairs of random walks over 24 layers significant. So the steps from each layer to
    the next must be correlated too, by the same test.

    Args:
        first: One value per layer, input side first.
        second: Likewise.

    Raises:
        ValueError: The curves differ in length.
    """
    x, y = (np.asarray(curve, dtype=np.float64) for curve in (first, second))
    if x.shape != y.shape:
        raise ValueError(f"The curves have {len(x)} and {len(y)} layers: pass two over the same ones.")
    (rho, p), (steps, p_steps) = _test(x, y), _test(np.diff(x), np.diff(y))
    agree = rho is not None and steps is not None and rho * steps > 0
    return RankCorrelation(rho, max(p, p_steps) if agree else 1.0, len(x))


def _test(x: FloatArray, y: FloatArray) -> tuple[float | None, float]:
    """Returns Spearman's correlation and the share of orders of ``y`` that give one at least as far from 0."""
    a, b = (_standard(values) for values in (x, y))
    if not (a.any() and b.any()):
        return None, 1.0
    rho = float(a @ b)
    if len(x) <= EXACT:
        orders = np.array(list(itertools.permutations(range(len(x)))))
    else:  # the observed order counts as one of them
        drawn = np.random.default_rng(0).permuted(np.tile(np.arange(len(x)), (DRAWS, 1)), axis=1)
        orders = np.vstack([np.arange(len(x)), drawn])
    return rho, float((np.abs(b[orders] @ a) >= abs(rho) - 1e-12).mean())


def _standard(values: FloatArray) -> FloatArray:
    """Returns the ranks, centered and with norm 1; zeros if all are equal."""
    found = ranks(values) - (len(values) - 1) / 2
    size = float(np.linalg.norm(found))
    return found / size if size else found
