"""Simulated runs in the format of the callbacks, with known values and any number of layers."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from depthcb.profile import Profile
from depthcb.run import Run
from depthcb.similarity import MEASURES as ALL_MEASURES

MEASURES = ("cka", "cka_normalized")


def make_profile(rng: np.random.Generator, names: Sequence[str], measure: str, size: float, step: int) -> Profile:
    depth = np.linspace(0, 1, len(names))
    change = size * (0.2 + depth**1.5) * np.exp(rng.normal(0, 0.1, len(names)))
    halves = change * np.exp(rng.normal(0, 0.12, (200, len(names))) + rng.normal(0, 0.05, (200, 1)))
    fields: dict[str, Any] = {"layer_names": tuple(names), "measure": measure, "step": step, "epoch": 0, "rows": 512,
                              "title": ALL_MEASURES[measure].title, "unit": ALL_MEASURES[measure].unit}  # fmt: skip
    return Profile.from_halves(change.tolist(), halves, **fields)


def record(callback: str, rows: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
    given = {"settings": {}, "fit": {}, "provenance": {"seed": "0", "versions": {"torch": "2.13.0"}}, "end": None}
    return {"callback": callback, "rows": rows, **given, **more}


def changed(run: Run, callback: str, change: Any) -> Run:
    """The run with something else in a callback's record."""
    fields = copy.deepcopy(run.to_dict())
    (found,) = (r for r in fields["records"].values() if r["callback"] == callback)
    change(found)
    return Run.from_dict(fields)


def make_run(
    seed: int,
    optimizer: str,
    control: str,
    layers: int,
    validations: int,
    finished: bool = True,
    name: str = "model.layers.{}",
) -> Run:
    """A run whose change grows over the validations; without validations, it was interrupted at the start."""
    rng = np.random.default_rng(seed)
    names = [name.format(i) for i in range(layers)]
    wanted = 2e-4 * np.exp(rng.normal(0, 0.05 if optimizer == "AdamW" else 0.8, layers))
    size = 0.02 if control == "standard" else 0.015
    steps = [20 * (i + 1) for i in range(validations)]
    rows = [
        {
            "step": step,
            "epoch": 0,
            "profiles": {m: make_profile(rng, names, m, (i + 1) * size / validations, step).to_dict() for m in MEASURES},
            "metrics": {"val/loss": 3.0 * 0.98**i},
        }
        for i, step in enumerate(steps)
    ]  # fmt: skip
    fit = {"module": "CausalLM", "optimizers": [{"class": optimizer, "lr": 1e-4}], "max_steps": 160}
    fit["initial_weights"] = "0a" * 32
    settings = {"layers": names, "effective_rank": [2.5 + 3 * i for i in range(layers)], "rows": "mean",
                "measures": {m: ALL_MEASURES[m].definition for m in MEASURES}, "probe_hash": "0f" * 32, "probe_rows": 512}  # fmt: skip
    end = {"seconds": 70.1, "probe_seconds": 13.2} if finished else None
    ratios = {
        i: [float(w) * (1 + i / 10) for w in wanted] for i in range(1 if validations else 0, 9 if validations else 0)
    }
    records = {"depth": record("DepthProfile", rows, settings=settings, fit=fit, end=end)}
    if control == "equal-step":
        records["equal_step"] = record("EqualStep", [
            {"step": step, **{f"equal_step/ratio/L{i:02d}": r for i, r in enumerate(row)},
             **{f"equal_step/realised/L{i:02d}": float(np.mean(row)) for i in range(layers)}}
            for step, row in ratios.items()
        ])  # fmt: skip
    else:
        records["update_ratio"] = record("UpdateRatioMonitor", [
            {"step": step, **{f"update_ratio/L{i:02d}": r for i, r in enumerate(row)}} for step, row in ratios.items()
        ])  # fmt: skip
    draws = [
        {"step": i, "profiles": {m: make_profile(rng, names, m, size / 300, 0).to_dict() for m in MEASURES}}
        for i in range(3)
    ]
    if validations:
        records["null"] = record("null_profiles", draws)
    return Run.from_dict(json.loads(json.dumps({"name": f"{optimizer.lower()}-{control}", "records": records})))


def make_runs(
    layers: int = 6, validations: Sequence[int] = (8, 8, 8, 8), name: str = "model.layers.{}", arms: int = 4
) -> list[Run]:
    """Up to two pairs of runs; those with fewer validations than the others are unfinished."""
    grid = [(o, c) for o in ("AdamW", "SGD") for c in ("standard", "equal-step")]
    return [
        make_run(i, o, c, layers, n, n == max(validations) > 0, name)
        for i, ((o, c), n) in enumerate(zip(grid[:arms], validations, strict=False))
    ]
