"""Loggers, plots and disks that fail cost output, not the training."""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from support import TinyLM, fit, run_script, seeded

from depthcb import DepthProfile, EqualStep, UpdateRatioMonitor
from depthcb.run import read_runs

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than 5 directions.*", "ignore:.*starts with 'val/.*")


class Refuses(CSVLogger):
    """Does not take the rows of the step callbacks."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if any(key.startswith(("equal_step", "update_ratio")) for key in metrics):
            raise ConnectionError("the server is gone")
        super().log_metrics(metrics, step)


class Writer:
    def __getattr__(self, name: str) -> Any:
        if name == "add_image":
            raise OSError("no space left on device")
        return lambda *args, **kwargs: None


class NoImages(TensorBoardLogger):
    @property
    def experiment(self) -> Any:
        return Writer()


def test_a_logger_that_raises(tmp_path: Path) -> None:
    watch, callbacks = DepthProfile(), [EqualStep(), UpdateRatioMonitor()]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        logger = Refuses(tmp_path, name="", version="")
        trainer = fit(seeded(TinyLM), [*callbacks, watch], logger=logger, val_check_interval=2)
    bare = fit(seeded(TinyLM), [EqualStep()], val_check_interval=2)
    assert all(
        torch.equal(a, b)
        for a, b in zip(trainer.lightning_module.parameters(), bare.lightning_module.parameters(), strict=True)
    )
    told = [str(w.message) for w in caught if "cannot log to" in str(w.message)]
    assert len(told) == 2, "once each"
    assert told[0].startswith("EqualStep 'equal_step' cannot log to the Refuses (ConnectionError: the server is gone).")
    assert any("could not log to the Refuses 4 times" in str(w.message) for w in caught)
    (run,) = read_runs(tmp_path)
    assert len(run.records["equal_step"].rows) == 4, "the record has what the logger did not take"


@pytest.mark.filterwarnings("ignore:.*what it leaves is incomplete.*")
def test_plots_that_fail(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="cannot log plots to the NoImages .*no space left"):
        fit(seeded(TinyLM), [DepthProfile()], logger=NoImages(tmp_path), val_check_interval=2)
    (run,) = read_runs(tmp_path)
    assert len(run.profiles["cka"]) == 2
    assert run.records["depth"].end is not None
    assert run.records["depth"].end["lost"] == {"log plots to the NoImages": 2}


@pytest.mark.skipif(sys.platform == "win32", reason="file sizes cannot be limited")
def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """From some row of one record on; what was written before is read, and so is the other record."""
    finished = run_script("full_disk_fit.py", tmp_path, 40_000)
    assert finished.returncode == 0, finished.stderr
    lines = finished.stdout.splitlines()
    assert "steps 12" in lines
    assert sum("cannot write its record in" in line for line in lines) == 1, lines
    assert any(re.search(r"could not write the last \d+ rows of its record in", line) for line in lines)
    (run,) = read_runs(tmp_path)
    assert 0 < len(run.profiles["cka"]) < 6
    assert not run.finished
    assert len(run.records["equal_step"].rows) == 12


@pytest.mark.skipif(sys.platform == "win32", reason="file sizes cannot be limited")
@pytest.mark.parametrize("room", [pytest.param(0, marks=pytest.mark.slow), 40_000])
def test_what_a_full_disk_does_not_take_waits_for_room(room: int, tmp_path: Path) -> None:
    finished = run_script("full_disk_fit.py", tmp_path, room, 10)
    assert finished.returncode == 0, finished.stderr
    assert sum("cannot write its record in" in line for line in finished.stdout.splitlines()) == 1
    assert "incomplete" not in finished.stdout
    (run,) = read_runs(tmp_path)
    assert [p.step for p in run.profiles["cka"]] == [1, 3, 5, 7, 9, 11]
    assert run.finished
    assert run.null is not None
    assert len(run.records["equal_step"].rows) == 12


def test_an_older_record_that_cannot_be_made_void(tmp_path: Path) -> None:
    (tmp_path / "depthcb/update_ratio.jsonl").mkdir(parents=True)  # no permission stops root
    with pytest.raises(ValueError, match=r"update_ratio.jsonl has rows of an earlier fit and cannot be written"):
        fit(seeded(TinyLM), [DepthProfile()], logger=TensorBoardLogger(tmp_path, name="", version=""))


@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
def test_the_record_is_in_the_folder_that_the_logger_means(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    fit(seeded(TinyLM), [DepthProfile()], logger=kind("~/logs"), val_check_interval=2)
    assert (home / "logs" / "lightning_logs" / "version_0" / "depthcb" / "depth.jsonl").exists()
    if kind is TensorBoardLogger:
        fit(seeded(TinyLM), [DepthProfile()], logger=kind("$RUNS/logs", sub_dir="sub"), val_check_interval=2)
        assert (tmp_path / "runs/logs/lightning_logs/version_0/sub/depthcb/depth.jsonl").exists()
    assert not list((tmp_path / "~").glob("**/depthcb"))
    assert not list((tmp_path / "$RUNS").glob("**/depthcb"))
