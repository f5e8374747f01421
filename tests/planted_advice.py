"""Planted losses of sets of layers, in which one knows which rules beat random sets and the last layers."""

from __future__ import annotations

import itertools
import statistics
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from runs import make_run

from depthcb.advice import LAST, RANDOM, RULES, Place, within
from depthcb_recipes.advice.arms import draws_of
from depthcb_recipes.advice.conclusion import conclude

#: The loss of each set of layers, without noise.
Truth = Mapping[tuple[int, ...], float]
#: Makes a truth, given all sets and the sets of the last layers and of the rules.
World = Callable[[list[tuple[int, ...]], list[tuple[int, ...]], np.random.Generator], Truth]
Noise = Callable[[np.random.Generator, int], np.ndarray]

_RUN = make_run(0, "SGD", "standard", 2, 0)


def normal(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.normal(0, 1, count)


def heavy(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.standard_t(3, count)


def nothing(sets: list[tuple[int, ...]], known: list[tuple[int, ...]], rng: np.random.Generator) -> Truth:
    return dict.fromkeys(sets, 0.0)


def additive(sets: list[tuple[int, ...]], known: list[tuple[int, ...]], rng: np.random.Generator) -> Truth:
    layers = rng.normal(0, 3, 1 + max(map(max, sets)))
    return {own: -float(layers[list(own)].sum()) for own in sets}


def one_layer(sets: list[tuple[int, ...]], known: list[tuple[int, ...]], rng: np.random.Generator) -> Truth:
    layer = rng.integers(1 + max(map(max, sets)))
    return {own: -10.0 * (layer in own) for own in sets}


def two_layers(sets: list[tuple[int, ...]], known: list[tuple[int, ...]], rng: np.random.Generator) -> Truth:
    pair = set(rng.choice(1 + max(map(max, sets)), 2, replace=False).tolist())
    return {own: -10.0 * (pair <= set(own)) for own in sets}


def skewed(sets: list[tuple[int, ...]], known: list[tuple[int, ...]], rng: np.random.Generator) -> Truth:
    return {own: -5 * rng.exponential() for own in sets}


def as_random(sets: list[tuple[int, ...]], known: list[tuple[int, ...]], rng: np.random.Generator) -> Truth:
    """Every rule is exactly as good as random sets are on average, whatever single sets are; the last layers are bad."""
    truth = dict(additive(sets, known, rng))
    others = statistics.fmean(loss for own, loss in truth.items() if own not in known)
    truth |= dict.fromkeys(known, others)
    gap = 30.0
    truth[known[0]] += gap
    rise = gap / (len(sets) - len(set(known[1:]) - {known[0]}))  # the rules' own loss is part of the mean
    return truth | {own: others + rise for own in known[1:] if own != known[0]}


def as_last(sets: list[tuple[int, ...]], known: list[tuple[int, ...]], rng: np.random.Generator) -> Truth:
    """Every rule is exactly as good as the last layers, and all other sets are bad."""
    return {own: 0.0 if own in known else 10.0 + rng.normal(0, 2) for own in sets}


def one_wins(gain: float) -> World:
    """The first rule's layers are better than all others."""

    def world(sets: list[tuple[int, ...]], known: list[tuple[int, ...]], rng: np.random.Generator) -> Truth:
        return {own: rng.normal(0, 1) - gain * (own == known[1] != known[0]) for own in sets}

    return world


@dataclass(frozen=True)
class Table:
    """Planted tables of a test by training.

    Args:
        name: What is planted.
        world: The loss of each set of layers, drawn anew for each table.
        layers: Number of layers.
        count: Number of layers that are trained.
        rules: Number of rules, which choose sets at random: the same in all seeds.
        seeds: Seeds.
        noise: Of a training, in units of which the worlds' losses are.
        power: Share of the tables with a true winner that must name it; None for no promise.
    """

    name: str
    world: World
    layers: int = 6
    count: int = 2
    rules: int = 7
    seeds: int = 4
    noise: Noise = normal
    power: float | None = None

    def rates(self, tables: int) -> tuple[float, float]:
        """Returns the share of tables with a false winner, and of those with a true one in which a true one is named."""
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        sets = list(itertools.combinations(range(self.layers), self.count))
        wrong = named = able = 0
        for _ in range(tables):
            known = [tuple(range(self.layers - self.count, self.layers))]
            known += [sets[i] for i in rng.integers(len(sets), size=self.rules)]
            truth = self.world(sets, known, rng)
            winners = set(conclude(self._losses(known, truth, rng)).winners)
            mean, last = statistics.fmean(truth.values()), truth[known[0]]
            true = {str(i) for i, own in enumerate(known[1:]) if truth[own] < min(mean, last) - 1e-9}
            wrong += bool(winners - true)
            able += bool(true)
            named += bool(winners & true)
        return wrong / tables, named / able if able else float("nan")

    def _losses(self, known: list[tuple[int, ...]], truth: Truth, rng: np.random.Generator) -> dict[str, list[float]]:
        """Losses by rule and seed; equal sets share their training, and a seed shares its data order."""
        draws = self.layers // self.count
        losses: dict[str, list[float]] = {name: [] for name in (LAST, RANDOM, *map(str, range(self.rules)))}
        for _ in range(self.seeds):
            order = rng.normal(0, 2)
            trained = dict(
                zip(truth, order + np.array(list(truth.values())) + self.noise(rng, len(truth)), strict=True)
            )
            for name, own in zip((LAST, *map(str, range(self.rules))), known, strict=True):
                losses[name].append(trained[own])
            numbers = draws_of(int(rng.integers(10**6)), draws)
            random = [RULES[RANDOM].rank(_RUN, Place(self.layers, self.count, n)) for n in numbers]
            equal, share = [1] * self.layers, self.count / self.layers
            losses[RANDOM].append(statistics.fmean(trained[within(order, equal, share)] for order in random))
        return losses


def planted_tables() -> Iterator[Table]:
    """Worlds without a winner, with winners that are hard to tell, and with one."""
    for layers, count, seeds in ((6, 2, 4), (12, 3, 4), (6, 2, 8)):
        size = {"layers": layers, "count": count, "seeds": seeds}
        shown = f"{count} of {layers} layers, {seeds} seeds"
        yield Table(f"no layer matters, {shown}", nothing, **size)
        yield Table(f"no layer matters, heavy tails, {shown}", nothing, noise=heavy, **size)
        yield Table(f"each layer adds its part, {shown}", additive, **size)
        yield Table(f"one layer matters, {shown}", one_layer, **size)
        yield Table(f"two layers matter together, {shown}", two_layers, **size)
        yield Table(f"few sets are good, {shown}", skewed, **size)
        yield Table(f"rules are as good as random, last k is bad, {shown}", as_random, **size)
        yield Table(f"rules are as good as last k, random is bad, {shown}", as_last, **size)
    yield Table("no layer matters, one rule", nothing, rules=1)
    yield Table("one rule of seven wins by 10 sd, 4 seeds", one_wins(10), power=0.5)
    yield Table("one rule of seven wins by 5 sd, 8 seeds", one_wins(5), seeds=8, power=0.9)
    yield Table("the only rule wins by 5 sd, 4 seeds", one_wins(5), rules=1, power=0.5)
