"""Sharded parameters on 2 and 4 real processes: the results equal those of one process, and a resume is exact."""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import run_script

from depthcb.step_extras import EXTRAS


def run(
    folder: Path, name: str, world: int, resume: str = "", checkpoints: str = "plain", log_every: int = 1
) -> list[dict[str, Any]]:
    """Returns the observations of each process."""
    folder.mkdir()
    done = run_script("callbacks/sharded_fit.py", folder, name, resume, checkpoints, log_every)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world)]


@pytest.fixture(scope="module")
def through(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], tuple[Path, list[dict[str, Any]]]]:
    """The folder of a fit and the observations of its ranks; run once."""

    @functools.cache
    def fitted(name: str, world: int) -> tuple[Path, list[dict[str, Any]]]:
        folder = tmp_path_factory.mktemp(name) / "run"
        return folder, run(folder, name, world)

    return fitted


@pytest.mark.parametrize(
    ("name", "world"),
    [
        ("dp2", 2),
        pytest.param("dp2_matrix", 2, marks=pytest.mark.slow),
        pytest.param("tp2", 2, marks=pytest.mark.slow),
        pytest.param("dp2_root", 2, marks=pytest.mark.slow),
        pytest.param("dp2_tp2", 4, marks=pytest.mark.slow),
    ],
)
def test_pieces_give_what_the_whole_gives(name: str, world: int, through: Any) -> None:
    _, (alone,) = through("one_even" if "tp" in name else "one_matrix" if "matrix" in name else "one", 1)
    _, ranks = through(name, world)
    for seen in ranks:
        assert seen["weights"] == seen["unwatched"]
        assert seen["weights"] == pytest.approx(alone["weights"], abs=1e-5)
        assert seen["realised"] == pytest.approx(alone["realised"], rel=1e-5)
        assert seen["change"] == pytest.approx(alone["change"], rel=1e-3)
        assert (seen["weights"], seen["realised"]) == (ranks[0]["weights"], ranks[0]["realised"])
    if name in ("dp2", "dp2_matrix"):
        pieces = [shape for seen in ranks for shape in seen["pieces"]]
        assert {(7, 8), (6, 8), (1,), (0,)} <= set(map(tuple, pieces)), "no uneven or empty shard: a weak test"
    # 8 steps, all logged: each callback takes 1 per step; EqualStep 1 before training and 1 at the end of each epoch.
    assert ranks[0]["collectives"] == 8 * 2 + 1 + 2


@pytest.mark.slow
def test_the_extras_of_pieces_are_those_of_the_whole(through: Any) -> None:
    """By matrix, in every column of every logged step."""
    tables = []
    for name, world in (("one_matrix", 1), ("dp2_matrix", 2)):
        with open(through(name, world)[0] / "metrics.csv", encoding="utf-8") as file:
            rows = [{k: float(v) for k, v in row.items() if k.startswith("update_ratio/") and v} for row in csv.DictReader(file)]  # fmt: skip
        tables.append([row for row in rows if row])
    assert len(tables[0]) == len(tables[1]) == 8
    keys = {key for row in tables[0] for key in row}
    for extra in EXTRAS:
        assert sum(key.startswith(f"update_ratio/{extra}/L0") for key in keys) == 4 * 3
    for alone, pieces in zip(*tables, strict=True):
        assert pieces == pytest.approx(alone, rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_one_collective_a_step_between_logs(tmp_path: Path) -> None:
    ranks = run(tmp_path / "dp2", "dp2", 2, log_every=100)
    assert ranks[0]["collectives"] == 8 + 1  # one before training


def test_every_logged_step_has_its_row(through: Any) -> None:
    """The result of a step is known one step later; its row has the right step number and the same values."""
    rows = []
    for name, world in (("one", 1), ("dp2", 2)):
        with open(through(name, world)[0] / "metrics.csv", encoding="utf-8") as file:
            found = {
                int(row["step"]): [float(v) for k, v in sorted(row.items()) if k.startswith("equal_step/") and v]
                for row in csv.DictReader(file)
                if row["equal_step/target"]
            }
        rows.append(found)
    assert list(rows[0]) == list(range(8))
    for step, values in rows[0].items():
        assert rows[1][step] == pytest.approx(values, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "world", "checkpoints"),
    [
        pytest.param("dp2", 2, "distributed", marks=pytest.mark.slow),
        pytest.param("dp2", 2, "plain", marks=pytest.mark.slow),
        pytest.param("dp2_tp2", 4, "distributed", marks=pytest.mark.slow),
        pytest.param("tp2", 2, "plain", marks=pytest.mark.slow),
        pytest.param("tp2", 2, "distributed", marks=pytest.mark.slow),
        pytest.param("dp2_tp2", 4, "plain", marks=pytest.mark.slow),
    ],
)
def test_a_resume_from_a_checkpoint_in_pieces_goes_on_exactly(
    name: str, world: int, checkpoints: str, tmp_path: Path
) -> None:
    whole = run(tmp_path / "whole", name, world, checkpoints=checkpoints)
    resumed = run(tmp_path / "resumed", name, world, str(tmp_path / "whole" / "first.ckpt"), checkpoints)
    for a, b in zip(whole, resumed, strict=True):
        assert a["weights"] == b["weights"]
        assert a["change"] == b["change"]
        assert a["profiles"] == b["profiles"] == 2
