"""Records of an earlier fit in the same folder stood beside those of a later one, and resumed runs were paired."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from support import TinyLM, fit, loaders, seeded

from depthcb import DepthProfile, EqualStep, FreezeByChange, UpdateRatioMonitor
from depthcb.report.groups import context, groups
from depthcb.run import Run, read_runs

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*not resumable", "ignore:.*not empty", "ignore:Be aware", "ignore:.*fewer than 5 directions",
    "ignore:.*Checkpoint directory",
)  # fmt: skip


def logger(folder: Path) -> CSVLogger:
    return CSVLogger(folder, name="", version="")


def first(folder: Path, *callbacks: pl.Callback, steps: int = 4) -> Path:
    trainer = fit(seeded(TinyLM), list(callbacks), logger=logger(folder), val_check_interval=2, max_steps=steps)
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


def resumed(folder: Path, checkpoint: Path, *callbacks: pl.Callback, module: Any = None) -> Run:
    pl.seed_everything(7, verbose=False)
    options: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = pl.Trainer(
        max_steps=8, callbacks=list(callbacks), logger=logger(folder), log_every_n_steps=1, val_check_interval=2,
        enable_checkpointing=False, **options,
    )  # fmt: skip
    trainer.fit(module or seeded(TinyLM), *loaders(), ckpt_path=checkpoint, weights_only=True)
    (run,) = read_runs(folder)
    return run


def test_a_fit_from_the_start_voids_all_records_of_its_folder(tmp_path: Path) -> None:
    first(tmp_path, EqualStep(), DepthProfile(pretrained="cpu", null_draws=1))
    (run,) = read_runs(tmp_path)
    assert run.control == "equal-step"
    assert run.null["cka"]
    first(tmp_path, DepthProfile())
    (run,) = read_runs(tmp_path)
    assert list(run.records) == ["depth"]
    assert (run.control, run.null, run.step_ratio.steps) == ("standard", {}, ())


@pytest.mark.parametrize("where", ["same", "other"])
def test_a_callback_removed_or_added_on_resume_makes_the_run_mixed(where: str, tmp_path: Path) -> None:
    checkpoint = first(tmp_path / "a", EqualStep(), DepthProfile())
    removed = resumed(tmp_path / ("a" if where == "same" else "b"), checkpoint, DepthProfile())
    assert removed.mixed == "EqualStep 'equal_step' removed at step 4"
    checkpoint = first(tmp_path / "c", DepthProfile())
    added = resumed(tmp_path / ("c" if where == "same" else "d"), checkpoint, EqualStep(), DepthProfile())
    assert added.mixed == "EqualStep 'equal_step' added at step 4"
    assert {removed.control, added.control} == {"mixed"}
    first(tmp_path / "twin", UpdateRatioMonitor(), DepthProfile(), steps=8)
    (group,) = groups(runs := [removed, added, *read_runs(tmp_path / "twin")])
    assert group.runs == tuple(runs)
    assert not group.paired
    assert f"{removed.name} is not paired: it is a mixed run ({removed.mixed})" in context(group)


def test_a_mixed_run_stays_mixed_and_unchanged_callbacks_do_not_mix(tmp_path: Path) -> None:
    checkpoint = first(tmp_path / "a", EqualStep(), DepthProfile())
    assert resumed(tmp_path / "b", checkpoint, EqualStep(), DepthProfile()).mixed == ""
    assert resumed(tmp_path / "c", checkpoint, EqualStep("model.transformer.h", 1e-3), DepthProfile()).mixed == (
        "EqualStep 'equal_step' changed at step 4"
    )


def test_rows_after_the_checkpoint_are_void_in_the_record_of_a_removed_callback(tmp_path: Path) -> None:
    checkpoint = first(tmp_path, EqualStep(), DepthProfile())
    resumed(tmp_path, checkpoint, EqualStep(), DepthProfile())
    run = resumed(tmp_path, checkpoint, DepthProfile())
    assert run.step_ratio.steps == (0, 1, 2, 3)
    assert run.mixed == "EqualStep 'equal_step' removed at step 4"


class Tuned(TinyLM):
    """A model with a hyperparameter."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_hyperparameters_changed_on_resume(tmp_path: Path) -> None:
    trainer = fit(seeded(Tuned), [DepthProfile()], logger=logger(tmp_path))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    run = resumed(tmp_path, tmp_path / "last.ckpt", DepthProfile(), module=seeded(lambda: Tuned(0.5)))
    assert run.mixed == "hyperparameters changed at step 4"


class Mine(DepthProfile):
    """A user's own, which Lightning does not take for a DepthProfile."""


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda name: EqualStep(name=name), lambda name: DepthProfile(name=name)),
        (lambda name: Mine(name=name), lambda name: DepthProfile(name=name.upper())),
        (lambda name: DepthProfile(name=name), lambda name: DepthProfile(name=f"{name}/null")),
    ],
)
def test_two_callbacks_of_one_name_are_refused(one: Any, other: Any) -> None:
    with pytest.raises(ValueError, match=r"would write to the same record, '[xX].*': give one of them another name="):
        fit(seeded(TinyLM), [other("x"), one("x")])
    fit(seeded(TinyLM), [other("x"), one("y")], max_steps=1)


@pytest.mark.parametrize("kind", [DepthProfile, EqualStep, UpdateRatioMonitor, FreezeByChange])
def test_two_callbacks_of_one_kind_are_refused_in_our_words(kind: Any) -> None:
    """Where Lightning's own message does not say what to change."""
    with pytest.raises(
        ValueError, match=rf"^{kind.__name__} and {kind.__name__} would .*: give one of them another name="
    ):
        pl.Trainer(callbacks=[kind(), kind()], logger=False)
    pl.Trainer(callbacks=[kind(), kind(name="other")], logger=False)


def test_checkpoints_name_states_in_plain_text(tmp_path: Path) -> None:
    watches = [DepthProfile(name="x"), DepthProfile(name="y")]
    fit(seeded(TinyLM), list(watches), max_steps=1).save_checkpoint(tmp_path / "last.ckpt")
    states = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    assert {"DepthProfile{'name': 'x'}", "DepthProfile{'name': 'y'}"} <= set(states)
    assert type(copy.deepcopy(watches[0].state_key)) is str
    assert watches[0].state_key == watches[0].state_key != watches[1].state_key
    assert watches[0].state_key not in (None, type(watches[0]))


def test_each_profile_has_its_own_null(tmp_path: Path) -> None:
    watches = [DepthProfile(rows=rows, name=rows, pretrained="cpu", null_draws=1) for rows in ("mean", "last")]
    fit(seeded(TinyLM), list(watches), logger=logger(tmp_path))
    by_last, by_mean = read_runs(tmp_path)
    assert by_mean.null["cka"][0].change != by_last.null["cka"][0].change
    assert set(by_mean.records) == {"mean", "mean/null", "mean/matched_null"}
