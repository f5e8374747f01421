"""A plain PyTorch loop: what is watched and controlled in a ``with`` block, its record, sinks, resume and errors."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from front_ends.same import MEASURES, Outcome, loop, model, optimizer, probe, with_a_plain_loop
from offline import history
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils.tensorboard import SummaryWriter

import depthcb
from depthcb.cli import main
from depthcb.run import read_runs

README = Path(__file__).parents[2] / "README.md"


def hooks() -> int:
    return len(_global_optimizer_pre_hooks) + len(_global_optimizer_post_hooks)


@pytest.mark.filterwarnings("ignore:.*fewer than 5 directions.*")
def test_the_example_of_the_readme(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    (code,) = re.findall(
        r"### In a plain PyTorch loop\n\n```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S
    )
    assert len([line for line in code.splitlines() if line.strip()]) <= 16
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(README), "exec"), {})
    printed = capsys.readouterr().out
    assert printed.count("equal_step/target") == printed.count("update_ratio/spread") == 8
    assert printed.count("depth/cka/slope'") == 2
    assert main(["show", "runs/mine"]) == 0
    assert main(["report", "runs/mine", "--out", "page.html"]) == 0
    (run,) = read_runs("runs")
    assert [p.step for p in run.profiles["cka"]] == [19, 39]
    assert run.control == "equal-step"
    assert run.finished
    assert run.step_ratio.spread == pytest.approx(1, rel=1e-4)


def test_a_watched_loop_is_the_unwatched_one() -> None:
    found = []
    for watched in (False, True):
        net = model()
        net.gpt2.config.resid_pdrop = 0.1
        for module in net.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.1
        net.gpt2.h[2].eval()
        sgd, states = optimizer(net), []
        torch.manual_seed(5)
        watch = depthcb.watch(net, sgd, probe(), measures=MEASURES, every=1)

        class Measure:
            def measure(self, epoch: int) -> None:
                if watched:  # noqa: B023
                    watch.measure(epoch=epoch)  # noqa: B023
                states.append(torch.get_rng_state())  # noqa: B023

        if watched:
            with watch:
                loop(net, sgd, Measure())
            assert watch.profiles[-1].mean > 1e-4, "nothing was watched: a weak test"
        else:
            loop(net, sgd, Measure())
        found.append((net.state_dict(), sgd.state_dict(), states, [m.training for m in net.modules()]))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_a_resumed_run_goes_on(tmp_path: Path) -> None:
    whole = with_a_plain_loop(tmp_path / "whole")
    saved: dict[str, Any] = {}
    net = model()
    for epoch in (0, 1):
        sgd = optimizer(net)
        control = depthcb.equal_step(net, sgd, every=1)
        watch = depthcb.watch(net, sgd, probe(), measures=MEASURES, folder=tmp_path / "parts", every=1, seed=7)
        if saved:
            sgd.load_state_dict(saved["sgd"])
            control.load_state_dict(saved["control"])
            watch.load_state_dict(saved["watch"])
        try:
            with control, watch:
                loop(net, sgd, watch, start=epoch, epochs=epoch + 1)
                saved = {
                    "sgd": copy.deepcopy(sgd.state_dict()),
                    "control": control.state_dict(),
                    "watch": watch.state_dict(),
                }
                torch.save(saved, tmp_path / "checkpoint.pt")
                saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
                if not epoch:
                    raise KeyError("killed")
        except KeyError:
            continue
    parts = Outcome.of(net, watch.recorder.profiles_by_measure, tmp_path / "parts")
    assert torch.equal(parts.weights, whole.weights)
    for name in whole.run.records:
        assert parts.rows(name) == whole.rows(name)
    assert parts.profiles == whole.profiles
    assert parts.run.mixed == parts.run.unpaired == ""
    assert [part["step"] for part in parts.run.records["depth"].parts] == [0, 4]
    assert parts.run.finished


def test_a_control_that_comes_later_makes_a_mixed_run(tmp_path: Path) -> None:
    net = model()
    sgd = optimizer(net)
    with depthcb.watch(net, sgd, probe(), measures=MEASURES, folder=tmp_path, every=1) as watch:
        loop(net, sgd, watch, epochs=1)
        with depthcb.equal_step(net, sgd, every=1):
            loop(net, sgd, epochs=1)
        watch.measure()
    (run,) = read_runs(tmp_path)
    assert run.mixed == "EqualStep 'equal_step' added at step 4"
    assert run.control == "mixed"
    assert run.step_ratio.steps == (4, 5, 6, 7)
    assert [p.step for p in run.profiles["cka"]] == [3, 7]


def test_a_control_that_a_resume_adds_makes_a_mixed_run(tmp_path: Path) -> None:
    net = model()
    sgd = optimizer(net)
    with depthcb.watch(net, sgd, probe(), measures=MEASURES, folder=tmp_path, every=1) as watch:
        loop(net, sgd, watch, epochs=1)
        state = watch.state_dict()
    control = depthcb.equal_step(net, sgd, every=1)
    watch = depthcb.watch(net, sgd, probe(), measures=MEASURES, folder=tmp_path, every=1)
    watch.load_state_dict(state)
    with control, watch:
        loop(net, sgd, watch, epochs=1)
    (run,) = read_runs(tmp_path)
    assert run.mixed == "EqualStep 'equal_step' added at step 4"
    assert [p.step for p in run.profiles["cka"]] == [3, 7]
    assert run.step_ratio.steps == (4, 5, 6, 7)


def train_and_fail(*arguments: Any) -> None:
    loop(*arguments, epochs=1)
    raise KeyError("the user's own")


def test_a_run_that_fails_leaves_no_hooks_and_an_unfinished_record(tmp_path: Path) -> None:
    before, net = hooks(), model()
    sgd = optimizer(net)
    with (
        pytest.raises(KeyError, match="the user's own"),
        depthcb.watch(net, sgd, probe(), measures=MEASURES, folder=tmp_path, every=1) as watch,
        depthcb.equal_step(net, sgd),
    ):
        train_and_fail(net, sgd, watch)
    assert hooks() == before
    (run,) = read_runs(tmp_path)
    assert not run.finished
    assert len(run.profiles["cka"]) == 1
    with pytest.raises(ValueError, match="nothing is attached"):
        watch.measure()
    with (
        pytest.raises(ValueError, match="matches no module"),
        depthcb.equal_step(net, sgd),
        depthcb.watch(net, sgd, probe(), layers="elsewhere"),
    ):
        pass
    assert hooks() == before


def test_rows_reach_every_kind_of_sink(tmp_path: Path) -> None:
    rows: list[Any] = []
    writer = SummaryWriter(str(tmp_path / "board"))
    with wandb.init(dir=tmp_path, mode="offline", settings=wandb.Settings(silent=True, console="off")) as run:
        run.log({"own": 1})
        net = model()
        sgd = optimizer(net)
        sinks = [run, writer, lambda row, step: rows.append((step, dict(row)))]
        with depthcb.watch(net, sgd, probe(), measures=MEASURES, sinks=sinks, every=2) as watch:
            loop(net, sgd, watch)
    writer.close()
    assert [step for step, _ in rows] == [1, 3, 3, 5, 7, 7]
    logged = [row for row in history(tmp_path) if "trainer/global_step" in row]
    assert [row["trainer/global_step"] for row in logged] == [step for step, _ in rows]
    assert logged[2]["depth/cka/slope"] == pytest.approx(watch.profiles[0].slope)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    assert [event.step for event in events.Scalars("depth/cka/slope")] == [3, 7]
    assert events.Scalars("update_ratio/L02")[0].value == pytest.approx(rows[0][1]["update_ratio/L02"])


def test_a_sink_that_fails_does_not_end_the_training() -> None:
    def broken(row: Any, step: int) -> None:
        raise OSError("the server is away")

    net = model()
    sgd = optimizer(net)
    with (
        pytest.warns(UserWarning, match=r"cannot log to the function .*the server is away|it could not log to") as told,
        depthcb.watch(net, sgd, probe(), measures=MEASURES, sinks=[broken], every=1) as watch,
    ):
        loop(net, sgd, watch)
    assert len(watch.profiles) == 2
    assert any("could not log to the function 8 times" in str(w.message) for w in told)
    with pytest.raises(ValueError, match="int is not a sink"), depthcb.watch(net, sgd, probe(), sinks=[3]):
        pass


def test_a_control_that_sees_no_step_says_so() -> None:
    net = model()
    weights = [p.data for p in net.parameters()]
    with pytest.raises(ValueError, match="changed without a step"), depthcb.equal_step(net, optimizer(net)):
        torch._foreach_mul_(weights, 1.01)


def test_profiles_alone_need_no_optimizer() -> None:
    net = model()
    with depthcb.watch(net, probe=probe(), measures=MEASURES) as watch:
        assert watch.measure(step=0)["cka"].change == (0.0,) * 4
        with pytest.raises(ValueError, match="no optimizer: pass step="):
            watch.measure()


class FullyShardedDataParallel(torch.nn.Module):
    """Its namesake cannot be built without processes; classes are told apart by their names."""


@pytest.mark.parametrize("attach", [depthcb.watch, depthcb.equal_step])
def test_fsdp1_is_refused(attach: Any) -> None:
    net = model()
    net.extra = FullyShardedDataParallel()
    with (
        pytest.raises(ValueError, match=r"does not support FullyShardedDataParallel.*use FSDP2.*depthcb compare"),
        attach(net, optimizer(net)),
    ):
        pass
