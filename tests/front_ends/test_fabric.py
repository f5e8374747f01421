"""Fabric: two processes (DDP, FSDP2), resume, failures, several optimizers and models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from front_ends.same import MEASURES, Outcome, batches, fabric_loop, model, optimizer, probe, with_fabric
from lightning.fabric import Fabric
from lightning.fabric.loggers import CSVLogger
from lightning.fabric.strategies import DeepSpeedStrategy, FSDPStrategy
from support import run_script
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from depthcb.fabric import DepthProfile, EqualStep, UpdateRatioMonitor
from depthcb.run import Run, read_runs


def hooks() -> int:
    return len(_global_optimizer_pre_hooks) + len(_global_optimizer_post_hooks)


def run(folder: Path, world: int, strategy: str) -> tuple[list[dict[str, Any]], Run]:
    folder.mkdir()
    done = run_script("front_ends/fabric_fit.py", folder, world, strategy)
    assert done.returncode == 0, done.stderr[-4000:]
    (found,) = read_runs(folder)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world)], found


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_agree_with_each_other_and_with_one(strategy: str, tmp_path: Path) -> None:
    alone = with_fabric(tmp_path / "one")
    (first, second), record = run(tmp_path / "two", 2, strategy)
    assert first == second
    assert first["weights"] == first["unwatched"]
    assert first["weights"] == pytest.approx(alone.weights.tolist(), abs=1e-5)
    for change, before in zip(first["change"], alone.profiles["cka"], strict=True):
        assert change == pytest.approx(before.change, rel=1e-3)
    assert record.records.keys() == alone.run.records.keys()
    assert record.records["depth"].fit["processes"] == 2
    assert record.step_ratio.steps == alone.run.step_ratio.steps == tuple(range(8))
    assert record.step_ratio.table == pytest.approx(alone.run.step_ratio.table, rel=1e-5)
    assert record.finished
    assert (record.control, record.mixed) == ("equal-step", "")


def callbacks(**options: Any) -> list[Any]:
    return [EqualStep(every=1, **options), UpdateRatioMonitor(every=1), DepthProfile(probe(), measures=MEASURES)]


def test_a_resumed_run_goes_on(tmp_path: Path) -> None:
    whole, logs = with_fabric(tmp_path / "whole"), tmp_path / "parts"
    for epoch in (0, 1):
        attached = callbacks(folder=logs)
        fabric = Fabric(accelerator="cpu", callbacks=attached)
        fabric.seed_everything(7, verbose=False)
        net, sgd = fabric.setup(inner := model(), optimizer(inner))
        state = {"net": net, "sgd": sgd, **{type(c).__name__: c for c in attached}}
        if epoch:
            fabric.load(tmp_path / "first.ckpt", state)
        fabric_loop(fabric, net, sgd, start=epoch, epochs=epoch + 1, end=bool(epoch))
        if not epoch:
            fabric.save(tmp_path / "first.ckpt", state)
            fabric.call("on_exception")
    parts = Outcome.of(inner, attached[2].recorder.profiles_by_measure, logs)
    assert torch.equal(parts.weights, whole.weights)
    for name in whole.run.records:
        assert parts.rows(name) == whole.rows(name)
    assert parts.profiles == whole.profiles
    assert parts.run.mixed == ""
    assert [part["step"] for part in parts.run.records["depth"].parts] == [0, 4]


def test_a_run_that_fails_is_let_go(tmp_path: Path) -> None:
    """By ``on_exception``, or by the next set-up of the same model, whose control then is the only one."""
    before, net = hooks(), model()
    for told in (True, False):
        fabric = Fabric(accelerator="cpu", callbacks=callbacks())
        wrapped, sgd = fabric.setup(net, optimizer(net))
        fabric_loop(fabric, wrapped, sgd, epochs=1, end=False)
        assert hooks() > before
        if told:
            fabric.call("on_exception")
            assert hooks() == before
    attached = callbacks()
    fabric = Fabric(accelerator="cpu", callbacks=attached, loggers=CSVLogger(tmp_path, name="", version=""))
    wrapped, sgd = fabric.setup(net, optimizer(net))
    fabric_loop(fabric, wrapped, sgd, epochs=1)
    assert hooks() == before
    (run,) = read_runs(tmp_path)
    assert run.step_ratio.spread == pytest.approx(1, rel=1e-4)
    assert run.records["equal_step"].parts[0]["callbacks"].keys() == {"depth", "equal_step", "update_ratio"}


def split(net: Any) -> list[Any]:
    """Two optimizers, which share every layer."""
    found = list(net.parameters())
    return [torch.optim.SGD(part, lr=0.1) for part in (found[::2], found[1::2])]


def test_several_optimizers_are_named_by_the_loop() -> None:
    def steps(fabric: Any, wrapped: Any, optimizers: list[Any]) -> None:
        for batch in batches():
            fabric.backward(wrapped(**batch)["loss"])
            for each in optimizers:
                each.step()
                each.zero_grad()

    for named in (False, True):
        attached = callbacks()
        fabric = Fabric(accelerator="cpu", callbacks=attached)
        wrapped, *optimizers = fabric.setup(inner := model(), *split(inner))
        if not named:
            with pytest.raises(ValueError, match=r"SGD steps the model too: .*fabric.call\('on_after_setup'"):
                steps(fabric, wrapped, optimizers)
            fabric.call("on_exception")
            continue
        fabric.call("on_after_setup", fabric=fabric, module=wrapped, optimizers=optimizers)
        steps(fabric, wrapped, optimizers)
        fabric.call("on_validation_epoch_end")
        fabric.call("on_train_end")
        realised = attached[0].equalizer.mean_realised.values()
        assert max(realised) / min(realised) == pytest.approx(1, rel=1e-4)
        assert [p.step for p in attached[2].recorder.profiles] == [3]


def test_a_model_that_nobody_told_of_is_an_error() -> None:
    attached = callbacks()
    fabric = Fabric(accelerator="cpu", callbacks=attached)
    net = fabric.setup_module(inner := model())
    sgd = fabric.setup_optimizers(optimizer(inner))
    with pytest.raises(ValueError, match="EqualStep does not know the model: before the first step"):
        fabric_loop(fabric, net, sgd)


def test_a_second_model_does_not_replace_the_first() -> None:
    attached = EqualStep(every=1)
    fabric = Fabric(accelerator="cpu", callbacks=[attached])
    wrapped, sgd = fabric.setup(inner := model(), optimizer(inner))
    with pytest.warns(UserWarning, match="stays with the first model"):
        fabric.setup(model())
    fabric_loop(fabric, wrapped, sgd, epochs=1)
    assert attached.equalizer.mean_realised.counts == [4] * 4


def test_without_a_step_it_says_so() -> None:
    fabric = Fabric(accelerator="cpu", callbacks=[EqualStep()])
    fabric.setup(inner := model(), optimizer(inner))
    with pytest.warns(UserWarning, match="no optimizer of the model has made a step"):
        fabric.call("on_train_end")


@pytest.mark.parametrize("strategy", [DeepSpeedStrategy, FSDPStrategy])
@pytest.mark.parametrize("make", [EqualStep, UpdateRatioMonitor, lambda: DepthProfile(probe())])
def test_deepspeed_and_fsdp1_are_refused(make: Any, strategy: Any) -> None:
    """Neither strategy runs on a CPU, so only the check is run, on a real strategy object."""
    fabric = type("Fabric", (), {"strategy": object.__new__(strategy)})()
    with pytest.raises(ValueError, match=r"does not support .*use FSDP2.*depthcb compare"):
        make().on_after_setup(fabric, model())
