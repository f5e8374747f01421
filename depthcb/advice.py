"""Which layers to train within a budget, proposed by named rules: functions of a run's record that know no torch.

A rule ranks the layers; the budget turns the ranking into a set. No rule is known to place training well: a slope of
change is no placement rule [paper], so proposals are to be tested by training, as ``depthcb advise --test`` does.

To add a rule, write a function of a run that returns one score per layer, or raises `MissingData`, and register it with
`by_scores`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from depthcb.profile import Profile
from depthcb.run import NO_RATIOS, Run, StepRatios

#: Name of the rule that draws layers at random, and of the one that takes the layers nearest to the output.
RANDOM, LAST = "random", "last k"
#: Draws of the random rule that are printed [ours].
DRAWS = 4
#: What a rule needs, by the rule's cost.
FREE, STEPS, BATCHES, RUN = "free", "a few steps", "a few batches of gradients, no training", "a finished run"


class MissingData(ValueError):
    """Raised by a rule if the run's record lacks what it ranks the layers by; says how to record it."""


@dataclass(frozen=True)
class Place:
    """What a rule may know besides the run.

    Args:
        layers: Number of layers.
        count: Number of layers of average size that the budget pays for, at least 1.
        draw: Number of the draw, for rules that draw at random.
    """

    layers: int
    count: int
    draw: int = 0

    @property
    def draws_per_deal(self) -> int:
        """Number of disjoint sets of ``count`` layers."""
        return self.layers // self.count

    @property
    def deal(self) -> int:
        """Number of the random order that the draw's set is dealt from."""
        return self.draw // self.draws_per_deal


@dataclass(frozen=True)
class Rule:
    """A named rule.

    Args:
        name: Its name.
        cost: What must have been computed before it can be asked.
        rank: Returns all layers, those to train first.
        reads: Whether it reads measurements of the run, rather than the number of layers alone.
        draws: Whether it ranks differently with each draw.
    """

    name: str
    cost: str
    rank: Callable[[Run, Place], list[int]]
    reads: bool = False
    draws: bool = False


#: All rules by name, in the order in which they are shown.
RULES: dict[str, Rule] = {}


def by_scores(name: str, cost: str) -> Callable[[Callable[[Run], Sequence[float | None]]], Callable[[Run], object]]:
    """Registers a rule that trains the layers with the largest scores; layers without a score come last.

    Args:
        name: The rule's name.
        cost: What it needs.
    """

    def register(scores: Callable[[Run], Sequence[float | None]]) -> Callable[[Run], object]:
        def rank(run: Run, place: Place) -> list[int]:
            found = scores(run)
            if len(found) != place.layers:
                raise MissingData(f"its record has {len(found)} of {place.layers} layers")
            known = [-math.inf if score is None or math.isnan(score) else score for score in found]
            return sorted(range(place.layers), key=lambda i: -known[i])

        RULES[name] = Rule(name, cost, rank, reads=True)
        return scores

    return register


@by_scores("change", RUN)
def change(run: Run) -> Sequence[float | None]:
    """Change since pretraining, 1 - CKA by the run's first measure [paper: change; ours: as a rule]."""
    if not any(run.profiles.values()):
        raise MissingData("no profile: train with DepthProfile() and let the Trainer validate")
    last: Profile = next(iter(run.profiles.values()))[-1]
    return last.change


@by_scores("worth", RUN)
def worth(run: Run) -> Sequence[float | None]:
    """What each layer's change is worth to the loss, see `depthcb.restore_profile` [ours]."""
    if run.worth is None:
        raise MissingData("no worth: train to the end with DepthProfile(pretrained='cpu', worth=True)")
    return run.worth.worth


@by_scores("step ratio", STEPS)
def step_ratio(run: Run) -> Sequence[float | None]:
    """The optimizer's own relative step ||dW|| / ||W|| at the first logged step [paper: ratio; ours: as a rule]."""
    return _first(run.wanted_ratio, "UpdateRatioMonitor()")


@by_scores("gradient norm", STEPS)
def gradient_norm(run: Run) -> Sequence[float | None]:
    """Norm of the gradient at the first logged step [ours]."""
    found = [
        StepRatios.read(record, f"{name}/grad_norm/")
        for name, record in run.records.items()
        if record.callback == "UpdateRatioMonitor"
    ]
    logged = next((ratios for ratios in found if ratios.steps), NO_RATIOS)
    return _first(logged, "UpdateRatioMonitor(extras=['grad_norm'])")


@by_scores("objective distance", BATCHES)
def objective_distance(run: Run) -> Sequence[float | None]:
    """Distance of the gradients of pretraining and of the new objective at the start [paper; ours: as a rule]."""
    record = run.record("ObjectiveDistanceMonitor")
    if record is None:
        raise MissingData("no objective distance: train with the recipes' ObjectiveDistanceMonitor()")
    scores: Sequence[float | None] = record.settings["per_layer"]
    if all(score is None for score in scores):
        raise MissingData("the objective distance is unresolved in every layer: validate on more rows")
    return scores


def _first(ratios: StepRatios, callback: str) -> Sequence[float | None]:
    """Returns the first logged row."""
    if not ratios.by_layer:
        raise MissingData("its units are smaller than layers: add UpdateRatioMonitor() with unit='layer'")
    if not ratios.steps:
        raise MissingData(f"not logged: train with {callback}")
    return ratios.ratios[0]


def _last(run: Run, place: Place) -> list[int]:
    return list(reversed(range(place.layers)))


def _first_layers(run: Run, place: Place) -> list[int]:
    return list(range(place.layers))


def _evenly(run: Run, place: Place) -> list[int]:
    """The middle layer of each of ``count`` equal parts of the stack, then the others."""
    chosen = [(2 * i + 1) * place.layers // (2 * place.count) for i in range(place.count)]
    return [*chosen, *(i for i in range(place.layers) if i not in chosen)]


def _randomly(run: Run, place: Place) -> list[int]:
    """Random layers; consecutive draws share them out, so that each layer is in as many sets as any other [ours].

    Else a few draws may all miss the layers that matter, and say that random sets are worse than they are. The draws
    are the same for the same number of layers on every machine.
    """
    order = random.Random(f"{place.layers} layers, {place.deal}").sample(range(place.layers), place.layers)
    first = place.draw % place.draws_per_deal * place.count
    return order[first:] + order[:first]


RULES |= {
    LAST: Rule(LAST, FREE, _last),
    "first k": Rule("first k", FREE, _first_layers),
    "evenly spaced": Rule("evenly spaced", FREE, _evenly),
    RANDOM: Rule(RANDOM, FREE, _randomly, draws=True),
}


@dataclass(frozen=True)
class Proposal:
    """What a rule proposes for a budget.

    Args:
        rule: The rule.
        sets: The layers to train, one set per draw, each in depth order; none if data is missing.
        missing: What the record lacks; empty if nothing.
    """

    rule: Rule
    sets: tuple[tuple[int, ...], ...] = ()
    missing: str = ""


def parse_budget(text: str) -> float:
    """Returns a budget as a share of the layers' parameters.

    Raises:
        ValueError: It is not a percentage above 0 and up to 100.

    Example:
        >>> parse_budget("25%")
        0.25
    """
    try:
        share = float(text.removesuffix("%")) / 100 if text.endswith("%") else math.nan
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise ValueError(f"--budget {text}: give a percentage of the layers' parameters, such as 25%.")
    return share


def within(ranking: Sequence[int], parameters: Sequence[int], share: float) -> tuple[int, ...]:
    """Returns the layers to train, in depth order: in the order of the ranking, each that the budget still pays for.

    Args:
        ranking: All layers, those to train first.
        parameters: Number of parameters of each layer.
        share: The budget, as a share of all layers' parameters.

    Example:
        >>> within([3, 0, 1, 2], [10, 10, 10, 10], 0.5)
        (0, 3)
    """
    left = share * sum(parameters) * (1 + 1e-9)  # 25 % of 8 equal layers are 2 of them, whatever the rounding
    chosen = []
    for layer in ranking:
        if parameters[layer] <= left:
            chosen.append(layer)
            left -= parameters[layer]
    return tuple(sorted(chosen))


def sizes(run: Run) -> list[int]:
    """Returns the number of parameters of each layer.

    Raises:
        ValueError: The record does not say.
    """
    depth = run.record("DepthProfile")
    found = depth.settings.get("parameters") if depth else None
    if not found:
        raise ValueError(
            f"{run.name} does not record how many parameters its layers have: train with DepthProfile() again."
        )
    return list(found)


def affordable(layers: int, share: float) -> int:
    """Returns the number of layers of average size that a budget pays for, at least 1.

    Example:
        >>> affordable(6, 0.34), affordable(6, 0.1)
        (2, 1)
    """
    return max(1, math.floor(share * layers * (1 + 1e-9)))


def propose(run: Run, share: float, draws: Sequence[int] = range(DRAWS)) -> list[Proposal]:
    """Returns what every rule proposes.

    Args:
        run: The run whose record the rules read.
        share: The budget, as a share of the layers' parameters.
        draws: The draws of the rules that draw at random.

    Raises:
        ValueError: The record does not say how large the layers are, or the budget pays for no layer.
    """
    parameters = sizes(run)
    least = min(parameters) / sum(parameters)
    if share * (1 + 1e-9) < least:
        raise ValueError(
            f"--budget {100 * share:g}%: the smallest layer has {100 * least:.1f} % of the layers' parameters: give at "
            f"least {math.ceil(1000 * least) / 10:g}%."
        )
    count = affordable(len(parameters), share)
    found = []
    for rule in RULES.values():
        places = [Place(len(parameters), count, draw) for draw in (draws if rule.draws else [0])]
        try:
            found.append(Proposal(rule, tuple(within(rule.rank(run, place), parameters, share) for place in places)))
        except MissingData as error:
            found.append(Proposal(rule, missing=str(error)))
    return found
