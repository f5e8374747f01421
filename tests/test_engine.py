"""The engine in a plain training loop gives the results of the callbacks in a Trainer."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from support import Rows, TinyLM, fit, seeded, texts
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils.data import DataLoader

from depthcb import DepthProfile, EqualStep, UpdateRatioMonitor
from depthcb.engine import ProfileRecorder, StepEqualizer, StepRatioMeter
from depthcb.engine.step_hooks import StepHooks
from depthcb.similarity import Measure

KINDS: list[Any] = [
    StepEqualizer,
    StepRatioMeter,
    lambda: ProfileRecorder(measures=("cosine",), probe=torch.arange(32.0).view(8, 4).cos()),
]


def in_order() -> tuple[DataLoader[Any], DataLoader[Any]]:
    return DataLoader(texts(32), batch_size=8), DataLoader(texts(16, seed=1), batch_size=8)


def loop(module: pl.LightningModule, engines: list[StepHooks], rows: dict[str, list[float]], steps: int = 4) -> Tensor:
    """The same fit as `support.fit` in a plain loop, with the engine's objects attached."""
    optimizer = module.configure_optimizers()
    assert isinstance(optimizer, Optimizer)

    def log(row: Any, step: int) -> None:
        for key, value in row.items():
            rows.setdefault(key, []).append(value)

    for engine in engines:
        engine.attach(module, [optimizer], log)
    pl.seed_everything(7, verbose=False)
    for batch, _ in zip(in_order()[0], range(steps), strict=False):
        loss: Any = module.training_step(batch, 0)
        optimizer.zero_grad()
        (loss["loss"] if isinstance(loss, dict) else loss).backward()
        optimizer.step()
    for engine in engines:
        engine.finish()
        engine.detach()
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.filterwarnings("ignore:.*self.log.*")
def test_a_plain_loop_gives_the_figures_of_a_trainer() -> None:
    watch, rows, module = DepthProfile(), Rows(), seeded(TinyLM)
    fit(module, [EqualStep(), UpdateRatioMonitor(), watch], in_order(), logger=rows, max_steps=4)
    assert watch.fixed_probe is not None
    logged: dict[str, list[float]] = {}
    by_hand = seeded(TinyLM)
    by_hand.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    recorder = ProfileRecorder(watch.fixed_probe, every=4)
    weights = loop(by_hand, [StepEqualizer(), StepRatioMeter(), recorder], logged)
    assert torch.equal(weights, torch.cat([p.detach().flatten() for p in module.parameters()]))
    for key in ("equal_step/realised/L02", "equal_step/target", "update_ratio/L00", "update_ratio/spread"):
        assert len(logged[key]) == 4
        assert [[value] for value in logged[key]] == rows.column(key)
    assert recorder.profiles_by_measure["cka"][-1].change == watch.profiles[-1].change


@pytest.mark.parametrize("make", KINDS)
def test_nothing_stays_attached_whatever_happens(make: Any) -> None:
    model = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(3)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def hooks() -> int:
        return len(_global_optimizer_pre_hooks) + len(_global_optimizer_post_hooks)

    engine = make()
    engine.attach(model, [optimizer])
    assert hooks() == 2
    engine.attach(model, [optimizer])  # again, in the middle of training
    assert hooks() == 2
    with pytest.raises(KeyError, match="the user's own"), engine:
        raise KeyError("the user's own")
    assert hooks() == 0
    with make():  # never attached
        pass


def test_a_state_goes_on() -> None:
    rows: dict[str, list[float]] = {}
    module = seeded(TinyLM)
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    engine = StepEqualizer()
    loop(module, [engine], rows, steps=2)
    again = StepEqualizer()
    again.load_state_dict(engine.state_dict())
    assert again.steps_made == 2
    assert again.mean_wanted.values() == engine.mean_wanted.values()
    with pytest.raises(ValueError, match="state of EqualStep 'equal_step' is damaged"):
        again.load_state_dict({})


def test_a_measure_of_ones_own_gets_what_the_others_get() -> None:
    def shift(before: Tensor, after: Tensor) -> Tensor:
        return (after.double().mean(-2) - before.double().mean(-2)).norm(dim=-1)

    own = Measure("shift", "rows", shift, "shift of the mean", "distance of the mean rows", "How far the mean moved.")
    watch = DepthProfile(measures=("cka", own))
    fit(seeded(TinyLM), [watch])
    profile = watch.profiles_by_measure["shift"][-1]
    assert (profile.title, profile.unit) == ("shift of the mean", "distance of the mean rows")
    assert profile.band is not None
    assert profile.slope_interval is not None
    assert min(profile.change) > 0


def test_a_measure_that_drops_dimensions_is_refused() -> None:
    flat = Measure("flat", "rows", lambda before, after: (after - before).double().norm())
    with pytest.raises(ValueError, match=r"measure 'flat': change returned shape \(\) .* must keep all dimensions"):
        fit(seeded(TinyLM), [DepthProfile(measures=(flat,))])
