"""Runs studies of real fits from the command line, and finds their remaining processes."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from depthcb_recipes.studies.grid import read_study
from depthcb_recipes.studies.result import Figures
from depthcb_recipes.studies.store import Store

SMOKE = Path(__file__).parents[1] / "recipes" / "depthcb_recipes" / "studies" / "mini-smoke.yaml"

#: Of a run that never was.
FIGURES = Figures(
    pair="", slope=1.0, profiles={}, null={}, wanted_spread=1.0, realised_spread=1.0, lowest_rank=4.0, loss_before=3.0,
    loss=2.0, seconds=1.0, provenance={}, initial_weights="", data_order="", objective_distance=None, backbone={},
)  # fmt: skip


#: What differs between two executions of a run.
MEASURED = ("seconds", "peak_memory", "provenance")

HOLDER = """
import socket, sys, time
from pathlib import Path
if sys.argv[2]:
    socket.gethostname = lambda: sys.argv[2]
from depthcb_recipes.studies.store import locked
with locked(Path(sys.argv[1]), lease=float(sys.argv[3])):
    print("held", flush=True)
    time.sleep(600)
"""


@contextmanager
def hold(folder: Path, host: str = "", lease: float = 60) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds a run's lock, on another machine if a host name is given."""
    arguments = [sys.executable, "-c", HOLDER, str(folder), host, str(lease)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        try:
            yield holder
        finally:
            holder.kill()


def smoke(folder: Path, *models: str) -> Path:
    """Four runs per model from the bundled mini-smoke study."""
    study = yaml.safe_load(SMOKE.read_text())
    study["grid"] |= {"model": list(models), "objective": ["causal_lm", "contrastive"]}
    del study["by"]["objective"]["sequence_classification"]
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study))
    assert len(read_study(path)) == 4 * len(models)
    return path


def command(task: str, study: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "depthcb", "study", task, str(study), "--out", str(out), *more]


def drive(study: Path, out: Path, *more: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command("run", study, out, *more), stdout=subprocess.DEVNULL)


def figures(study: Path, out: Path) -> dict[str, dict[str, Any]]:
    """The result of each run, without durations, memory and timestamps."""
    found = {}
    for config in read_study(study):
        result = Store(out).result(config)
        assert result is not None, f"{config.name} has no result"
        assert result.figures is not None, result
        fields = result.to_dict()
        found[config.name] = {name: value for name, value in fields.items() if name not in MEASURED}
    return found


def alive(out: Path) -> list[int]:
    """Other processes whose command line contains a study's folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if str(out) in command:
                found.append(int(entry.name))
    return found


def gone(out: Path, within: float) -> bool:
    """Returns whether all processes of a study end within a few seconds."""
    deadline = time.monotonic() + within
    while alive(out) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(out)
