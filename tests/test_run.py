"""Run records on disk: exact values, also after kills, resumes and damage."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from support import Rows, TinyLM, fit, loaders, logged, run_script, seeded

from depthcb import DepthProfile, EqualStep, UpdateRatioMonitor
from depthcb.run import Run, read_runs, write_header, write_row


def folder_logger(folder: Path) -> CSVLogger:
    return CSVLogger(folder, name="", version="")


def three() -> list[Any]:
    return [EqualStep(), UpdateRatioMonitor(), DepthProfile()]


def test_a_run_is_what_its_callbacks_saw(tmp_path: Path) -> None:
    control, _, watch = callbacks = three()
    logger = folder_logger(tmp_path)
    fit(seeded(TinyLM), callbacks, logger=logger, val_check_interval=2)
    (run,) = read_runs(tmp_path)
    assert (run.name, run.control, run.finished) == (tmp_path.name, "equal-step", True)
    assert run.profiles == watch.profiles_by_measure
    assert [p.step for p in run.profiles["cka"]] == [1, 3]
    assert run.layers == list(watch.reference.layer_names)
    assert run.effective_rank == list(watch.reference.effective_rank)
    rows = logged(logger)
    for key, ratios in (("realised", run.step_ratio), ("ratio", run.wanted_ratio)):
        expected = [
            [row[f"equal_step/{key}/L{i:02d}"] for i in range(4)] for row in rows if f"equal_step/{key}/L00" in row
        ]
        assert [list(r) for r in ratios.ratios] == expected
        assert ratios.steps == (0, 1, 2, 3)
    assert run.step_ratio.mean == pytest.approx(control.mean_realised.values(), rel=1e-12)
    assert run.wanted_ratio.mean == pytest.approx(control.mean_wanted.values(), rel=1e-12)
    means = np.array(run.wanted_ratio.ratios).mean(axis=0)
    assert run.wanted_ratio.spread == pytest.approx(means.max() / means.min())
    losses = [(row["step"], row["val/loss"]) for row in rows if "val/loss" in row]
    assert run.metrics["val/loss"] == losses
    assert not any(key.startswith("depth/") for key in run.metrics)


def test_settings_and_provenance_are_those_of_the_fit(tmp_path: Path) -> None:
    fit(seeded(TinyLM), three(), logger=folder_logger(tmp_path), gradient_clip_val=0.5)
    (run,) = read_runs(tmp_path)
    depth, control = run.records["depth"], run.records["equal_step"]
    assert depth.settings["rows"] == "mean"
    assert depth.settings["probe_rows"] == 16
    assert len(depth.settings["probe_hash"]) == 64
    assert set(depth.settings["measures"]) == {"cka", "cka_normalized"}
    assert control.settings["target"] == "mean"
    assert depth.fit["module"] == "TinyLM"
    assert depth.fit["gradient_clip_val"] == 0.5
    assert depth.fit["max_steps"] == 4
    (optimizer,) = depth.fit["optimizers"]
    assert (optimizer["class"], optimizer["lr"], optimizer["weight_decay"]) == ("AdamW", 1e-3, 1e-2)
    assert depth.provenance["seed"] == "7"
    assert depth.provenance["versions"]["torch"].startswith("2.")
    here = Path(__file__).parents[1]
    if (here / ".git").exists() and Path.cwd() == here:
        head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        assert depth.provenance["git_commit"].startswith(head)
    assert depth.end["seconds"] > depth.end["probe_seconds"] > 0


def test_json_gives_the_run_back(tmp_path: Path) -> None:
    fit(seeded(TinyLM), three(), logger=folder_logger(tmp_path))
    (run,) = read_runs(tmp_path)
    assert Run.from_dict(json.loads(json.dumps(run.to_dict()))) == run


def test_without_a_logger_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fit(seeded(TinyLM), three())
    fit(seeded(TinyLM), three(), logger=Rows())
    fit(seeded(TinyLM), three(), logger=True, fast_dev_run=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_resumed_run_continues_in_its_folder_and_in_another(tmp_path: Path) -> None:
    """4 steps, then resumed from the checkpoint at step 2: no duplicate or missing rows."""
    keep = ModelCheckpoint(tmp_path / "kept", "{step}", save_top_k=-1, save_on_train_epoch_end=False)
    options: dict[str, Any] = {"val_check_interval": 1, "enable_checkpointing": True}
    fit(seeded(TinyLM), [*three(), keep], logger=folder_logger(tmp_path / "same"), **options)
    (whole,) = read_runs(tmp_path / "same")
    for where in ("same", "other"):
        trainer = pl.Trainer(
            max_steps=6, callbacks=three(), logger=folder_logger(tmp_path / where), accelerator="cpu", val_check_interval=1,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, log_every_n_steps=1,
        )  # fmt: skip
        with pytest.warns(UserWarning, match="not resumable|not empty"):
            trainer.fit(seeded(TinyLM), *loaders(), ckpt_path=tmp_path / "kept" / "step=2.ckpt", weights_only=True)
        (run,) = read_runs(tmp_path / where)
        steps = [p.step for p in run.profiles["cka"]]
        assert steps == sorted(set(steps))
        assert steps[0] == 0
        assert steps[-1] == 5
        assert set(range(6)) == set(steps)
        assert run.profiles["cka"][0] == whole.profiles["cka"][0]
        assert run.step_ratio.steps == ((0, 1, 2, 3, 4, 5) if where == "same" else (2, 3, 4, 5))
        assert run.finished


def test_a_fit_from_the_start_makes_an_earlier_one_void(tmp_path: Path) -> None:
    options: dict[str, Any] = {"logger": folder_logger(tmp_path), "val_check_interval": 1}
    fit(seeded(TinyLM), three(), max_steps=6, **options)
    fit(seeded(TinyLM), three(), max_steps=2, **options)
    (run,) = read_runs(tmp_path)
    assert [p.step for p in run.profiles["cka"]] == [0, 1]
    assert run.step_ratio.steps == (0, 1)


def test_a_killed_run_is_readable_and_unfinished(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert run_script("callbacks/killed_fit.py", tmp_path / "run", "SIGKILL", "", "").returncode == -9
    (run,) = read_runs(tmp_path / "run")
    assert not run.finished
    assert [p.epoch for p in run.profiles["cka"]] == [0, 1]
    assert run.step_ratio.steps == tuple(range(10)), "every step was on disk before the next one began"


def test_half_a_line_is_named_and_the_rest_read(tmp_path: Path) -> None:
    write_header(tmp_path, "depth", "DepthProfile", 0, {"layers": []})
    write_row(tmp_path, "depth", {"step": 1, "metrics": {"val/loss": float("inf")}})
    path = tmp_path / "depthcb" / "depth.jsonl"
    path.write_text(path.read_text() + '{"step": 2, "metr')
    with pytest.warns(UserWarning, match=r"depth\.jsonl, line 3 is damaged"):
        (run,) = read_runs(tmp_path)
    assert run.metrics == {"val/loss": [(1, float("inf"))]}
    write_header(tmp_path, "depth", "DepthProfile", 1, {"layers": []})
    write_row(tmp_path, "depth", {"step": 2, "metrics": {"val/loss": 3.0}})
    with pytest.warns(UserWarning, match="line 3"):
        (run,) = read_runs(tmp_path)
    assert run.metrics == {"val/loss": [(1, float("inf")), (2, 3.0)]}


def test_optimizers_that_step_in_turns_share_a_row(tmp_path: Path) -> None:
    write_header(tmp_path, "equal_step", "EqualStep", 0)
    write_row(tmp_path, "equal_step", {"step": 1, "equal_step/ratio/L00": 0.1})
    write_row(tmp_path, "equal_step", {"step": 1, "equal_step/ratio/L01": 0.3})
    (run,) = read_runs(tmp_path)
    assert run.wanted_ratio.ratios == ((0.1, 0.3),)
    (row,) = run.records["equal_step"].rows
    assert row == {"step": 1, "equal_step/ratio/L00": 0.1, "equal_step/ratio/L01": 0.3}
    assert type(row["step"]) is int


@pytest.mark.parametrize("step", [0, 7, 2**53 + 1, 10**400])
@pytest.mark.parametrize("value", [0.1, 1, float("nan"), None, "text", [0.1], True])
def test_rows_are_read_as_they_were_written(step: int, value: Any, tmp_path: Path) -> None:
    row = {"step": step, "a": 0.25, "b": value}
    write_header(tmp_path, "equal_step", "EqualStep", 0)
    write_row(tmp_path, "equal_step", row)
    (run,) = read_runs(tmp_path)
    for read in (run, Run.from_dict(run.to_dict())):
        (found,) = read.records["equal_step"].rows
        assert repr(dict(found)) == repr(row)


def test_names_tell_runs_apart_and_any_callback_name_is_a_file(tmp_path: Path) -> None:
    for version in (2, 10):
        write_header(tmp_path / "logs" / f"version_{version}", "depth/encoder", "DepthProfile", 0)
    assert [run.name for run in read_runs(tmp_path)] == ["version_2", "version_10"]
    (run,) = read_runs(tmp_path / "logs" / "version_2")
    assert run.name == "logs/version_2"
    assert list(run.records) == ["depth/encoder"]


class Mine(DepthProfile):
    """A user's own."""


def test_two_profiles_in_one_run_are_read_as_two(tmp_path: Path) -> None:
    first, second = Mine(), DepthProfile(rows="last", name="last")
    fit(seeded(TinyLM), [EqualStep(), first, second], logger=folder_logger(tmp_path))
    runs = read_runs(tmp_path)
    assert [run.name for run in runs] == [f"{tmp_path.name}:depth", f"{tmp_path.name}:last"]
    assert [run.profiles for run in runs] == [first.profiles_by_measure, second.profiles_by_measure]
    assert [run.control for run in runs] == ["equal-step"] * 2


def test_wrong_folders_are_one_clear_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere is not a folder: pass the folder of a run"):
        read_runs(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"contains no depthcb run \(no depthcb/\*\.jsonl at any depth\)"):
        read_runs(tmp_path)
    (tmp_path / "depthcb").mkdir()
    (tmp_path / "depthcb" / "a.jsonl").write_text('{"step": 1}\n')
    with pytest.warns(UserWarning, match=r"a\.jsonl is left out: line 1 is a row without a preceding header"):
        (run,) = read_runs(tmp_path)
    assert run.records == {}


def test_a_folder_that_cannot_be_written_stops_before_training(tmp_path: Path) -> None:
    (tmp_path / "depthcb").write_text("a file where the folder should be")
    module = seeded(TinyLM)
    with (
        pytest.warns(UserWarning, match="not empty"),
        pytest.raises(ValueError, match=r"DepthProfile cannot write its record to .*File exists.*logger=False"),
    ):
        fit(module, [DepthProfile()], logger=folder_logger(tmp_path))
    assert module.trainer.global_step == 0
