"""Overhead of a study on top of its fits, as ratios within one run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from studies import FIGURES

from depthcb_recipes.studies.grid import RunConfig, read_study
from depthcb_recipes.studies.pool import Pool, run_study
from depthcb_recipes.studies.process import RunProcess
from depthcb_recipes.studies.result import Result, write_result
from depthcb_recipes.studies.store import Store

pytestmark = pytest.mark.slow
STUDY = Path(__file__).parents[1] / "study"


def study(folder: Path, seeds: int) -> tuple[Path, list[RunConfig]]:
    grid: dict[str, Any] = {
        "model": ["a", "b"], "objective": ["causal_lm"], "optimizer": ["sgd"], "control": ["standard"],
        "seed": list(range(seeds)),
    }  # fmt: skip
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({"grid": grid}))
    return path, read_study(path)


def test_a_thousand_runs_cost_little_more_than_their_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs that do nothing, two at once, against the same subprocesses one after another without a pool."""
    monkeypatch.setenv("PYTHONPATH", f"{STUDY}{os.pathsep}{STUDY.parent}")
    _, configs = study(tmp_path, 500)
    start = time.perf_counter()
    progress = run_study(configs, Store(tmp_path / "pool"), Pool(2, runner="study_runner"))
    pool = (time.perf_counter() - start) / len(configs)
    assert progress.done == 1000
    bare, start = Store(tmp_path / "bare"), time.perf_counter()
    for config in configs[:100]:
        assert RunProcess(bare.prepare(config), config, runner="study_runner").wait() == 0
    alone = (time.perf_counter() - start) / 100
    with capsys.disabled():
        print(f"\n1,000 runs that do nothing: {pool:.3f} s each by two jobs; a process alone {alone:.3f} s")
    assert pool < 1.2 * alone


def test_the_status_of_two_thousand_runs_is_read_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Compared to a process that starts Python and reads the same files as JSON."""
    path, configs = study(tmp_path, 1000)
    store, profile = Store(tmp_path / "out"), {"change": [0.123456789012345] * 24, "layer_names": ["model.h.00"] * 24}
    for config in configs:
        measured = {"cka": profile, "cka_normalized": profile}
        null = {"cka": [profile, profile], "cka_normalized": [profile, profile]}
        write_result(store.prepare(config), Result("finished", config, replace(FIGURES, profiles=measured, null=null)))
    read = (
        "import json, sys, pathlib; [json.loads(p.read_text()) for p in pathlib.Path(sys.argv[1]).rglob('result.json')]"
    )
    status = [sys.executable, "-m", "depthcb", "study", "status", str(path), "--out", str(store.root)]
    times: dict[str, list[float]] = {"status": [], "read": []}
    for _ in range(5):
        for name, command in (("status", status), ("read", [sys.executable, "-c", read, str(store.root)])):
            start = time.perf_counter()
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            times[name].append(time.perf_counter() - start)
            assert name == "read" or said == "2000 finished of 2000 runs\n"
    size = os.path.getsize(store.folder(configs[0]) / "result.json")
    with capsys.disabled():
        print(
            f"\nstatus of 2,000 runs of {size} bytes: {min(times['status']):.2f} s, reading alone {min(times['read']):.2f}"
        )
    assert min(times["status"]) < 4 * min(times["read"])
    assert json.loads((store.folder(configs[0]) / "result.json").read_text())["status"] == "finished"
