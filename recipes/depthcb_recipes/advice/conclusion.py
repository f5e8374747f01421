"""Whether a rule beats random sets and the last layers, over seeds: pure functions of losses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from depthcb.advice import LAST, RANDOM
from depthcb.intervals import Estimate
from depthcb.verdict import FEWEST_PAIRS

#: Probability that any of a table's intervals misses its truth.
LEVEL = 0.05


@dataclass(frozen=True)
class Comparison:
    """The validation loss of a rule against that of the two usual choices, paired by seed.

    Args:
        rule: Name of the rule.
        random: Its loss minus the mean over the seed's random sets, with a simultaneous interval.
        last: Its loss minus that of the last layers, likewise.
    """

    rule: str
    random: Estimate
    last: Estimate

    @property
    def wins(self) -> bool:
        """Whether both intervals lie below 0."""
        return self.random.sign < 0 and self.last.sign < 0


@dataclass(frozen=True)
class Conclusion:
    """What the seeds say.

    Args:
        seeds: Number of seeds.
        comparisons: One per rule; none with fewer than two seeds.
    """

    seeds: int
    comparisons: tuple[Comparison, ...]

    @property
    def winners(self) -> list[str]:
        """Names of the rules that beat random sets and the last layers; none with too few seeds for a word."""
        return [c.rule for c in self.comparisons if c.wins] if self.seeds >= FEWEST_PAIRS else []

    def __str__(self) -> str:
        if self.seeds < FEWEST_PAIRS:
            return f"Undecided: {self.seeds} of {FEWEST_PAIRS} seeds."
        if not self.winners:
            return f"No rule beats both random and last k with these {self.seeds} seeds."
        return f"{', '.join(self.winners)}: lower validation loss than random and than last k, {self.seeds} seeds."


def conclude(losses: Mapping[str, Sequence[float]]) -> Conclusion:
    """Compares every rule with random sets and the last layers.

    The intervals are Student's over seeds, Bonferroni-corrected for the number of rules [ours]. A rule wins if both of
    its intervals lie below 0 (intersection-union: no correction for the two), so that a false winner is stated in at
    most 2.5 % of tables, if differences over seeds are normal.

    Args:
        losses: Validation losses by rule, one per seed, in the same order for all; those of `RANDOM` are means over the
            seed's sets.

    Raises:
        ValueError: `RANDOM` or `LAST` is missing.

    Example:
        >>> losses = {"random": [2.0, 2.1, 2.2, 2.1], "last k": [2.1, 2.1, 2.3, 2.2], "worth": [1.0, 1.1, 1.2, 1.1]}
        >>> str(conclude(losses))
        'worth: lower validation loss than random and than last k, 4 seeds.'
    """
    missing = [name for name in (RANDOM, LAST) if name not in losses]
    if missing:
        raise ValueError(f"There is no {' and no '.join(missing)} to compare with.")
    rules = [name for name in losses if name not in (RANDOM, LAST)]
    seeds = len(losses[LAST])
    if seeds < 2:
        return Conclusion(seeds, ())
    return Conclusion(
        seeds,
        tuple(
            Comparison(rule, *(simultaneous(losses[rule], losses[other], len(rules)) for other in (RANDOM, LAST)))
            for rule in rules
        ),
    )


def simultaneous(a: Sequence[float], b: Sequence[float], count: int) -> Estimate:
    """Returns the mean of a - b over n >= 2 pairs, with an interval that is one of ``count`` at 95 % together.

    Example:
        >>> str(simultaneous([1.0, 2.0, 3.0], [0.0, 0.0, 0.0], 1))
        '+2 [-0.484, +4.48]'
    """
    x = np.subtract(a, b, dtype=np.float64)
    point = float(special.stdtrit(len(x) - 1, 1 - LEVEL / (2 * count)))
    mean, half = float(x.mean()), point * math.sqrt(float(x.var(ddof=1)) / len(x))
    return Estimate(mean, mean - half, mean + half)
