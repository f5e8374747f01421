"""Simulated study results with known effects."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
from studies import FIGURES

from depthcb.profile import Profile
from depthcb_recipes.studies.grid import RunConfig
from depthcb_recipes.studies.result import FINISHED, Figures, Result

OBJECTIVES = ("causal_lm", "sequence_classification", "token_classification", "contrastive")
DISTANCE = dict(zip(OBJECTIVES, (0.0, 0.9, 0.8, 1.1), strict=True))


def profile(rng: np.random.Generator, slope: float, layers: int = 8, noise: float = 0.02) -> Profile:
    """A profile with mean 1 and the given slope."""
    change = np.clip(1 + slope * (np.linspace(0, 1, layers) - 0.5) + rng.normal(0, noise, layers), 0, None)
    halves = np.clip(change + rng.normal(0, noise, (200, layers)), 0, None)
    return Profile.from_halves(change.tolist(), halves, layer_names=tuple(map(str, range(layers))), measure="cka")


def figures(result: Result) -> Figures:
    """The figures of a run that has some."""
    assert result.figures is not None
    return result.figures


def changed(result: Result, **own: Any) -> Result:
    """The same result but for some of its figures."""
    return dataclasses.replace(result, figures=dataclasses.replace(figures(result), **own))


def study(
    truth: Any, models: dict[str, tuple[str, float]], objectives: tuple[str, ...] = OBJECTIVES, seeds: int = 2, rng_seed: int = 0,
    spread: float = 5.0, null: float = 0.1,
) -> list[Result]:  # fmt: skip
    """Results of all runs; ``truth(model, block, size, objective, control, rng)`` is a run's slope."""
    rng = np.random.default_rng(rng_seed)
    results = []
    for (model, (block, size)), objective, seed, control in itertools.product(
        models.items(), objectives, range(seeds), ("standard", "equal-step")
    ):
        own = profile(rng, truth(model, block, size, objective, control, rng), layers=6 + 2 * list(models).index(model))
        own_figures = dataclasses.replace(
            FIGURES, pair=f"{model} {objective} {seed}", slope=own.slope,
            backbone={"family": "decoder", "block": block, "layers": len(own.change), "parameters": size},
            profiles={"cka": own.to_dict(), "cka_normalized": own.to_dict()},
            null={"cka": [profile(rng, null / 3).to_dict()]}, matched_null={"cka": [profile(rng, null).to_dict()]},
            wanted_spread=spread,
            objective_distance=DISTANCE[objective],
            initial_weights=f"{model} {objective} {seed}", data_order=f"{objective} {seed}",
        )  # fmt: skip
        results.append(Result(FINISHED, RunConfig(model, objective, "sgd", control, seed), own_figures))
    return results


SMALL = {f"seq{i}": ("sequential", 1.5e8) for i in range(4)} | {f"par{i}": ("parallel", 2e8) for i in range(4)}
BOTH = (
    SMALL | {f"seqm{i}": ("sequential", 1.3e9) for i in range(3)} | {f"parm{i}": ("parallel", 1.4e9) for i in range(3)}
)


def paper(model: str, block: str, size: float, objective: str, control: str, rng: np.random.Generator) -> float:
    """The paper's pattern: a slope in all runs but those of parallel blocks under the control, except for causal LM."""
    kept = control == "standard" or block == "sequential" or objective == "causal_lm" or size > 1e9
    return (0.4 + 0.5 * DISTANCE[objective] if kept else -0.2) + rng.normal(0, 0.03)


def everywhere(model: str, block: str, size: float, objective: str, control: str, rng: np.random.Generator) -> float:
    return float(0.6 + rng.normal(0, 0.03))


def nowhere(model: str, block: str, size: float, objective: str, control: str, rng: np.random.Generator) -> float:
    return float(rng.normal(0, 0.3))
