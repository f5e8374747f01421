"""Runs of a study whose fits need more memory than the process may have; prints how each ends."""

from __future__ import annotations

import mmap
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from depthcb_recipes.studies import runner
from depthcb_recipes.studies.grid import RunConfig

TOO_MUCH = 1 << 42
NEEDS: dict[str, Callable[[], object]] = {
    "torch": lambda: torch.empty(TOO_MUCH, dtype=torch.uint8),
    "numpy": lambda: np.ones(TOO_MUCH, np.uint8),
    "python": lambda: bytearray(TOO_MUCH),
    "system": lambda: mmap.mmap(-1, TOO_MUCH),
}

if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30,) * 2)
    for name, need in NEEDS.items():
        runner.fit = lambda *_, need=need: need()  # type: ignore[assignment]
        result = runner.run(RunConfig(name, "causal_lm", "sgd", "standard", 0), Path("study/runs/run"))
        print(f"{name}: {result.status}: {result.message}")
