"""A run to advise on, and what planted trainings of its proposals found."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from runs import changed, make_run
from studies import FIGURES

from depthcb.advice import propose
from depthcb.run import Run
from depthcb_recipes.advice.arms import Arm, arms
from depthcb_recipes.advice.trained import Trained, trained_table
from depthcb_recipes.studies.grid import RunConfig
from depthcb_recipes.studies.result import FINISHED, Result, write_result
from depthcb_recipes.studies.store import Store

BASE = RunConfig("bert-tiny", "sequence_classification", "adamw", "standard", 5, options={"model.lr": 1e-3})
LAYERS = 8


def run_with(layers: int = LAYERS) -> Run:
    """Returns a run whose record says how large its layers are."""

    def describe(found: dict[str, Any]) -> None:
        found["settings"] |= {"parameters": [100] * layers, "linear": ["mlp"]}

    return changed(make_run(0, "SGD", "standard", layers, 4), "DepthProfile", describe)


def trained(folder: Path, share: float, seeds: int = 4) -> tuple[Trained, list[Arm], dict[str, float]]:
    """Returns the table of trainings with planted losses, these trainings and their losses."""
    store, draws = Store(folder), round(1 / share)
    proposals = propose(run_with(), share, range(seeds * draws))
    found = arms(BASE, proposals, LAYERS, ["full"], seeds, draws, rank=4)
    losses = {}
    for arm in found:
        rng = np.random.default_rng([arm.config.seed, *arm.layers])
        losses[arm.config.hash] = 3 - 0.1 * len(arm.layers) + arm.config.seed + float(rng.normal(0, 0.01))
        own = {"loss": losses[arm.config.hash], "trained_parameters": 100 * len(arm.layers), "peak_memory": 10**9}
        figures = dataclasses.replace(FIGURES, **own)
        write_result(store.prepare(arm.config), Result(FINISHED, arm.config, figures))
    return trained_table(proposals, found, store), found, losses
