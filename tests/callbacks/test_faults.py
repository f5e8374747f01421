"""Stopped and killed processes: no measurement is lost, and a resumed run equals an uninterrupted one."""

from __future__ import annotations

import csv
import json
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from support import TinyLM, fit, loaders, run_script, seeded

from depthcb import DepthProfile, EqualStep, UpdateRatioMonitor


def run(folder: Path, stop: str = "", resume: str = "", shuffled: str = "") -> tuple[int, dict[str, Any]]:
    """Returns the exit status, and the results if the process could still write them."""
    folder.mkdir()
    done = run_script("callbacks/killed_fit.py", folder, stop, resume, shuffled)
    if not stop:
        assert done.returncode == 0, done.stderr[-4000:]
    seen = folder / "seen.json"
    return done.returncode, json.loads(seen.read_text()) if seen.exists() else {}


@pytest.fixture(scope="module")
def through(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An uninterrupted run."""
    return run(tmp_path_factory.mktemp("through") / "run")[1]


def test_killed_and_resumed_is_the_uninterrupted_run(through: dict[str, Any], tmp_path: Path) -> None:
    status, seen = run(tmp_path / "killed", stop="SIGKILL")
    assert (status, seen) == (-signal.SIGKILL, {})
    _, resumed = run(tmp_path / "resumed", resume=str(tmp_path / "killed" / "last.ckpt"))
    assert resumed["weights"] == through["weights"]
    assert resumed["profiles"] == through["profiles"]
    assert len(resumed["profiles"]) == 3
    assert resumed["steps"] == through["steps"] == [12] * 4


@pytest.mark.slow
def test_with_shuffling_and_dropout_it_still_compares_with_the_pretrained_model(tmp_path: Path) -> None:
    run(tmp_path / "killed", stop="SIGKILL", shuffled="yes")
    _, resumed = run(tmp_path / "resumed", resume=str(tmp_path / "killed" / "last.ckpt"), shuffled="yes")
    means = [sum(p["change"]) for p in resumed["profiles"]]
    assert len(means) == 3
    assert means[2] > means[1] > means[0] > 0, "a reference taken at the resume would have made the last one small"


@pytest.mark.parametrize("stop", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow)])
def test_a_signal_leaves_no_hook_and_every_profile(stop: str, through: dict[str, Any], tmp_path: Path) -> None:
    _, seen = run(tmp_path / "run", stop=stop)
    assert seen["hooks"] == 0
    assert seen["profiles"] == through["profiles"][:2]
    with open(tmp_path / "run" / "metrics.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    saved = [float(row["depth/cka/mean"]) for row in rows if row["depth/cka/mean"]]
    assert saved == pytest.approx([sum(p["change"]) / 4 for p in through["profiles"][:2]])


class Fails(TinyLM):
    """Fails in the middle of the third epoch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.current_epoch == 2 and batch_idx == 1:
            raise RuntimeError("on purpose")
        return super().training_step(batch, batch_idx)


def test_an_exception_loses_nothing_that_was_measured(tmp_path: Path) -> None:
    watch, control, monitor = DepthProfile(), EqualStep(), UpdateRatioMonitor()
    logger = CSVLogger(tmp_path, name="", version="")
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(seeded(Fails), [control, monitor, watch], max_steps=-1, max_epochs=3, logger=logger)
    assert len(watch.profiles) == 2
    assert control.mean_realised.counts == monitor.mean.counts == [9] * 4
    with open(tmp_path / "metrics.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [float(r["depth/cka/mean"]) for r in rows if r["depth/cka/mean"]] == pytest.approx(
        [p.mean for p in watch.profiles]
    )
    assert len([r for r in rows if r["equal_step/target"]]) == len([r for r in rows if r["update_ratio/L00"]]) == 9


def test_a_resume_into_another_model_is_refused(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, "last")
    fit(seeded(TinyLM), [EqualStep(), DepthProfile(), keep], enable_checkpointing=True)
    trainer = pl.Trainer(
        max_steps=8, callbacks=[DepthProfile()], logger=False, accelerator="cpu", enable_progress_bar=False
    )
    with pytest.raises(RuntimeError, match="Unexpected key"):  # PyTorch's message
        trainer.fit(seeded(lambda: TinyLM(layers=3)), *loaders(), ckpt_path=tmp_path / "last.ckpt")
