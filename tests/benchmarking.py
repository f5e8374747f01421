"""Ratios of times within one run: the candidates alternate, so that a busy machine slows all of them."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

#: Where `make bench` collects its figures; empty elsewhere.
FIGURES = os.environ.get("DEPTHCB_FIGURES", "")


def alternate(candidates: Mapping[str, Callable[[], object]], rounds: int = 7) -> dict[str, list[float]]:
    """Returns the seconds that each candidate takes in each round, after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for name, run in candidates.items():
            _wait()
            start = time.perf_counter()
            run()
            _wait()
            if number:
                times[name].append(time.perf_counter() - start)
    return times


def median_ratio(times: Mapping[str, list[float]], a: str, b: str, minus: str = "") -> float:
    """Returns the median over the rounds of a / b, or of (a - minus) / b, of times or bytes."""
    rounds = zip(times[a], times[b], times[minus] if minus else [0.0] * len(times[a]), strict=True)
    return statistics.median((x - m) / y for x, y, m in rounds)


def note(name: str, value: float, limit: float) -> None:
    """Prints a figure beside its limit, and adds both to the file of figures, with the kind of machine."""
    print(f"{name}: {value:.3g} (limit {limit:g})")
    if not FIGURES:
        return
    path = Path(FIGURES)
    found = json.loads(path.read_text()) if path.exists() else {"machine": machine(), "figures": {}}
    found["figures"][name] = {"value": value, "limit": limit}
    path.write_text(json.dumps(found, indent=1) + "\n")


def machine() -> dict[str, object]:
    """Returns the kind of machine, as far as it decides such figures."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "processor": platform.processor() or platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": device,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
