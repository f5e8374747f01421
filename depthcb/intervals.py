"""95 % intervals of means and of shares, over replicated runs or over halves of a probe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from scipy import special

from depthcb.profile import FloatArray, interval_over_halves


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval.

    Args:
        value: The estimate.
        low: Lower end of the interval.
        high: Upper end.

    Example:
        >>> str(Estimate(0.5, 0.4, 0.6)), Estimate(0.5, 0.4, 0.6).sign
        ('+0.5 [+0.4, +0.6]', 1)
    """

    value: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 or -1 if the whole interval is on that side of 0, else 0."""
        return (self.low > 0) - (self.high < 0)

    def __neg__(self) -> Self:
        return type(self)(-self.value, -self.high, -self.low)

    def __str__(self) -> str:
        return f"{self.value:+.3g} [{self.low:+.3g}, {self.high:+.3g}]"


def _t(degrees: int) -> float:
    """Returns the 97.5 % point of Student's t distribution."""
    return float(special.stdtrit(degrees, 0.975))  # scipy.stats takes a second to import


def mean_interval(values: Sequence[float] | FloatArray) -> Estimate:
    """Returns the mean of n >= 2 replicates with Student's t interval on n - 1 degrees of freedom.

    Example:
        >>> str(mean_interval([1.0, 2.0, 3.0]))
        '+2 [-0.484, +4.48]'
    """
    x = np.asarray(values, dtype=np.float64)
    half = _t(len(x) - 1) * math.sqrt(float(x.var(ddof=1)) / len(x))
    mean = float(x.mean())
    return Estimate(mean, mean - half, mean + half)


def share_interval(parts: Sequence[float] | FloatArray, wholes: Sequence[float] | FloatArray) -> Estimate | None:
    """Returns the share mean(part) / mean(whole) over n >= 2 paired replicates, with its interval by Fieller's theorem.

    The interval contains the shares q for which the t interval of the mean of part - q whole contains 0, so that no
    ratio of noisy numbers is taken. None if the interval of the mean whole contains 0: then any share is possible.

    Example:
        >>> str(share_interval([0.5, 0.6, 0.4], [1.0, 1.1, 0.9]))
        '+0.5 [+0.335, +0.599]'
        >>> share_interval([0.5, 0.6, 0.4], [1.0, -1.0, 0.5]) is None
        True
    """
    x, y = np.asarray(parts, dtype=np.float64), np.asarray(wholes, dtype=np.float64)
    if mean_interval(y).sign == 0:
        return None
    n = len(x)
    cov = np.cov(x, y, ddof=1) * _t(n - 1) ** 2 / n
    # (x - q y)^2 <= t^2 var(x - q y) / n is a quadratic inequality in q
    a, b, c = y.mean() ** 2 - cov[1, 1], x.mean() * y.mean() - cov[0, 1], x.mean() ** 2 - cov[0, 0]
    root = math.sqrt(max(b * b - a * c, 0.0))  # below 0 by rounding alone, when the replicates are equal
    return Estimate(float(x.mean() / y.mean()), float((b - root) / a), float((b + root) / a))


def percentile_interval(value: float, samples: FloatArray) -> Estimate:
    """Returns an estimate with the 2.5 % and 97.5 % points of its values over random halves of the probe."""
    return Estimate(value, *interval_over_halves(samples))
