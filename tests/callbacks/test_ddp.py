"""Two real processes give what one gives on the same batches, and one row instead of two."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from support import run_script


def run(folder: Path, world: int, strategy: str = "auto") -> tuple[list[dict[str, Any]], list[dict[str, str]], str]:
    """What each rank saw, the logged rows, and all output."""
    folder.mkdir()
    done = run_script("ddp_fit.py", folder, world, strategy)
    assert done.returncode == 0, done.stderr
    ranks = [
        json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(1 if strategy == "ddp_spawn" else world)
    ]
    with open(folder / "metrics.csv", encoding="utf-8") as file:
        return ranks, list(csv.DictReader(file)), done.stdout + done.stderr


def test_two_processes_agree_with_each_other_and_with_one(tmp_path: Path) -> None:
    (alone,), rows_alone, _ = run(tmp_path / "one", 1)
    (first, second), rows, output = run(tmp_path / "two", 2, "ddp")
    assert first == second
    assert first["weights"] == first["unwatched"]
    assert first["weights"] == pytest.approx(alone["weights"], abs=1e-6)
    assert first["change"] == pytest.approx(alone["change"], rel=1e-3)
    assert first["realised"] == pytest.approx(alone["realised"], rel=1e-5)
    for key in ("depth/cka/slope", "equal_step/target", "update_ratio/spread"):
        steps = [row["step"] for row in rows if row[key]]
        assert steps == [row["step"] for row in rows_alone if row[key]]
        assert len(steps) == len(set(steps)) > 0
    assert "self.log('depth" not in output, "Lightning warned about the profile's own metrics"


def test_spawned_processes_agree_with_one(tmp_path: Path) -> None:
    """The callbacks of the parent stay as they were; weights come back, and what was measured is in the log."""
    (alone,), rows_alone, _ = run(tmp_path / "one", 1)
    (parent,), rows, _ = run(tmp_path / "two", 2, "ddp_spawn")
    assert parent["weights"] == parent["unwatched"]
    assert parent["weights"] == pytest.approx(alone["weights"], abs=1e-6)
    for key in ("depth/cka/L00", "depth/cka/slope", "equal_step/realised/L00", "update_ratio/L03"):
        values = [[float(row[key]) for row in side if row[key]] for side in (rows, rows_alone)]
        assert values[0] == pytest.approx(values[1], rel=1e-3)
        assert values[0]
