"""What the trainings of a test found, as a table of rules."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from depthcb.advice import LAST, RANDOM, RULES, Proposal
from depthcb_recipes.advice.arms import ALL, Arm, Mode, candidates
from depthcb_recipes.advice.conclusion import Conclusion, conclude
from depthcb_recipes.studies.result import Figures
from depthcb_recipes.studies.store import Store


@dataclass(frozen=True)
class Row:
    """The trainings of one rule.

    Args:
        rule: Name of the rule, or `ALL`.
        cost: What the rule itself needs.
        sets: The sets of layers that were trained.
        parameters: Number of trained parameters, heads and adapters included: the mean over the trainings.
        losses: Validation loss at the end by seed, nats; the mean where a seed has several sets.
        seconds: Median wall-clock time of a training.
        memory: Median of the most bytes that a training's process held.
    """

    rule: str
    cost: str
    sets: tuple[tuple[int, ...], ...]
    parameters: float
    losses: tuple[float, ...]
    seconds: float
    memory: float

    @property
    def loss(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.losses)


@dataclass(frozen=True)
class Trained:
    """What one mode's trainings found.

    Args:
        mode: What of the layers was trained.
        rows: One per rule, the best mean loss first.
        seeds: The seeds of which all trainings have figures.
        missing: Number of trainings without figures.
        conclusion: What the seeds say.
    """

    mode: Mode
    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    missing: int
    conclusion: Conclusion


def trained_table(proposals: Sequence[Proposal], own: Sequence[Arm], store: Store) -> Trained:
    """Returns the table of one mode.

    Args:
        proposals: What was proposed.
        own: The trainings of the mode.
        store: Their folder.
    """
    figures = {arm.config.hash: _figures(store, arm) for arm in own}
    lacking = {arm.config.seed for arm in own if figures[arm.config.hash] is None}
    seeds = tuple(sorted({arm.config.seed for arm in own} - lacking))
    rules = [ALL, *(p.rule.name for p in proposals if p.sets)]
    complete = [(arm, found) for arm in own if arm.config.seed in seeds and (found := figures[arm.config.hash])]
    rows = [_row(rule, [pair for pair in complete if pair[0].rule == rule], seeds) for rule in rules if seeds]
    losses = {row.rule: row.losses for row in rows if row.rule in (*candidates(proposals), RANDOM, LAST)}
    conclusion = conclude(losses) if seeds else Conclusion(0, ())
    missing = sum(found is None for found in figures.values())
    return Trained(own[0].mode, tuple(sorted(rows, key=lambda row: row.loss)), seeds, missing, conclusion)


def _row(rule: str, trainings: Sequence[tuple[Arm, Figures]], seeds: Sequence[int]) -> Row:
    losses = [statistics.fmean(f.loss for arm, f in trainings if arm.config.seed == seed) for seed in seeds]
    return Row(
        rule,
        RULES[rule].cost if rule in RULES else "",
        tuple(dict.fromkeys(arm.layers for arm, _ in trainings)),
        statistics.fmean(f.trained_parameters or math.nan for _, f in trainings),
        tuple(losses),
        statistics.median(f.seconds or math.nan for _, f in trainings),
        statistics.median(f.peak_memory or math.nan for _, f in trainings),
    )


def _figures(store: Store, arm: Arm) -> Figures | None:
    result = store.result(arm.config)
    return result.figures if result is not None else None
