"""Two real processes give the same results as one on the same batches, and log each row once."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from offline import history
from support import run_script


def run(folder: Path, world: int, strategy: str = "auto") -> tuple[list[dict[str, Any]], list[dict[str, str]], str]:
    """Observations of each rank, logged rows, and all output."""
    folder.mkdir()
    done = run_script("callbacks/ddp_fit.py", folder, world, strategy)
    assert done.returncode == 0, done.stderr
    ranks = [
        json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(1 if strategy == "ddp_spawn" else world)
    ]
    with open(folder / "metrics.csv", encoding="utf-8") as file:
        return ranks, list(csv.DictReader(file)), done.stdout + done.stderr


Alone = tuple[dict[str, Any], list[dict[str, str]]]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """Observations and logged rows of a single process."""
    (alone,), rows, _ = run(tmp_path_factory.mktemp("one") / "run", 1)
    return alone, rows


def test_two_processes_agree_with_each_other_and_with_one(one: Alone, tmp_path: Path) -> None:
    alone, rows_alone = one
    (first, second), rows, output = run(tmp_path / "two", 2, "ddp")
    assert first == second
    assert first["weights"] == first["unwatched"]
    assert first["weights"] == pytest.approx(alone["weights"], abs=1e-6)
    assert first["by_matrix"] == pytest.approx(alone["by_matrix"], abs=1e-6)
    assert first["by_matrix"] != pytest.approx(first["weights"], abs=1e-6)
    assert first["change"] == pytest.approx(alone["change"], rel=1e-3)
    for key in ("realised", "realised_by_matrix"):
        assert first[key] == pytest.approx(alone[key], rel=1e-5)
    assert len(first["realised_by_matrix"]) > len(first["realised"])
    for key in ("depth/cka/slope", "equal_step/target", "update_ratio/spread"):
        steps = [row["step"] for row in rows if row[key]]
        assert steps == [row["step"] for row in rows_alone if row[key]]
        assert len(steps) == len(set(steps)) > 0
    assert "self.log('depth" not in output, "Lightning warned about the profile's own metrics"
    for key in ("depth/cka/slope", "depth/heatmap._type", "equal_step/target", "update_ratio/spread"):
        steps = [row["trainer/global_step"] for row in history(tmp_path / "two") if key in row]
        assert steps == ([3] if key.startswith("depth") else [0, 1, 2, 3]), f"W&B has {key} once"
    for name, lines in (("depth", 3), ("equal_step", 5), ("update_ratio", 5)):
        text = (tmp_path / "two" / "depthcb" / f"{name}.jsonl").read_text()
        assert len(text.splitlines()) == lines, "one process wrote the record"


@pytest.mark.slow
def test_spawned_processes_agree_with_one(one: Alone, tmp_path: Path) -> None:
    """Callbacks of the parent process are unchanged; the weights are returned, and the measurements are in the log."""
    alone, rows_alone = one
    (parent,), rows, _ = run(tmp_path / "two", 2, "ddp_spawn")
    assert parent["weights"] == parent["unwatched"]
    assert parent["weights"] == pytest.approx(alone["weights"], abs=1e-6)
    for key in ("depth/cka/L00", "depth/cka/slope", "equal_step/realised/L00", "update_ratio/L03"):
        values = [[float(row[key]) for row in side if row[key]] for side in (rows, rows_alone)]
        assert values[0] == pytest.approx(values[1], rel=1e-3)
        assert values[0]
