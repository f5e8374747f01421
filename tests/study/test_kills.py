"""Studies of real fits whose processes are killed: the results equal those of an undisturbed study."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from recipes_families import tiny
from studies import SMOKE, alive, drive, figures, gone, smoke

from depthcb_recipes.backbones.loading import load_tokenizer
from depthcb_recipes.studies.grid import read_study
from depthcb_recipes.studies.result import RESULT, read_result
from depthcb_recipes.studies.store import Store

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A study of twelve runs, and its results when undisturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    study = smoke(folder, "bert-tiny", "gpt2-tiny", "neox-tiny")
    assert drive(study, folder / "out").wait() == 0
    return study, figures(study, folder / "out")


@pytest.mark.parametrize(("engine", "kills", "within"), [("pool", 20, 1.0), ("ray", 5, 15.0)])
def test_kills_at_random_moments_change_nothing(
    engine: str, kills: int, within: float, undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Kill -9 of the driver or of a worker; Ray's nodes need a few seconds to notice that their driver is gone."""
    study, expected = undisturbed
    out, chance, finished = tmp_path / "out", random.Random(0), dict[Path, int]()
    driver = drive(study, out, "--engine", engine)
    for kill in range(kills):
        time.sleep(chance.uniform(1, 7 if engine == "pool" else 20))
        assert driver.poll() is None, f"the study was over before its {kill + 1}th kill: kill faster"
        workers = [pid for pid in alive(out) if pid != driver.pid]
        if kill % 2 and workers and engine == "pool":
            os.kill(chance.choice(workers), signal.SIGKILL)
        else:
            driver.kill()
            driver.wait()
            assert gone(out, within), "something outlives its driver"
            driver = drive(study, out, "--engine", engine)
        for path in out.glob(f"runs/*/{RESULT}"):
            assert read_result(path.parent) is not None, "half a result"
            finished.setdefault(path, path.stat().st_ino)
    assert driver.wait() in (0, 1)
    # --retry-failed: a run that was killed three times by chance has been given up
    assert drive(study, out, "--engine", engine, "--retry-failed").wait() == 0
    assert figures(study, out) == expected
    for path, file in finished.items():
        result = read_result(path.parent)
        assert result is not None
        assert path.stat().st_ino == file, "a finished run was made again"


def with_dropout(folder: Path) -> Path:
    """A study of two runs with dropout and stateful dataloaders."""
    tokenizer = load_tokenizer("gpt2-tiny")
    config = {"vocab_size": len(tokenizer), "max_position_embeddings": 128}
    tiny("bert", "ForMaskedLM", dropout=0.2, **config).save_pretrained(folder / "dropout")
    tokenizer.save_pretrained(folder / "dropout")
    study = yaml.safe_load(SMOKE.read_text())
    study["grid"] |= {"model": [str(folder / "dropout")], "objective": ["contrastive"]}
    study["options"] |= {"data.stateful": True, "data.train_rows": 80, "trainer.max_steps": 24}  # 2.4 epochs
    study["options"] |= {"trainer.val_check_interval": 3}
    study["by"] = {"objective": {"contrastive": study["by"]["objective"]["contrastive"]}}
    path = folder / "stateful.yaml"
    path.write_text(yaml.safe_dump(study))
    return path


def test_a_killed_run_whose_data_remember_their_place_goes_on_exactly(tmp_path: Path) -> None:
    study = with_dropout(tmp_path)
    assert drive(study, tmp_path / "undisturbed").wait() == 0
    out, chance = tmp_path / "out", random.Random(0)
    driver = drive(study, out)
    for _ in range(3):
        seen = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/last.ckpt")}
        deadline = time.monotonic() + 120
        while not any(path.stat().st_mtime_ns != seen.get(path) for path in out.glob("runs/*/last.ckpt")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.3))
        assert driver.poll() is None
        driver.kill()
        driver.wait()
        assert gone(out, within=1)
        driver = drive(study, out)
    assert driver.wait() == 0
    headers = [line for path in out.glob("runs/*/depthcb/depth.jsonl") for line in path.read_text().splitlines()]
    resumed = [row["step"] for row in map(json.loads, headers) if "callback" in row]
    assert any(resumed), "no run was resumed, so nothing was tested"
    assert figures(study, out) == figures(study, tmp_path / "undisturbed")
    assert not list(out.glob("runs/*/*.ckpt"))


def test_three_parts_at_once_are_the_study(undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    study, expected = undisturbed
    parts = [drive(study, tmp_path, "--jobs", "1", "--shard", f"{i}/3") for i in (1, 2, 3)]
    assert [part.wait() for part in parts] == [0, 0, 0]
    assert figures(study, tmp_path) == expected
    assert len(list(tmp_path.glob("runs/*"))) == len(read_study(study))
    assert all(Store(tmp_path).result(config) for config in read_study(study))
