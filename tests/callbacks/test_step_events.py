"""One call per actual optimizer step in any training loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from support import TinyLM, fit, loaders, seeded

from depthcb import DepthProfile, EqualStep, OptimizerStepCallback, UpdateRatioMonitor


class Count(OptimizerStepCallback):
    def __init__(self) -> None:
        self.before = self.after = 0

    def on_before_optimizer_closure(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.before += 1

    def on_after_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.after += 1


def count(optimizer: Any = None, **options: Any) -> tuple[int, int]:
    counter = Count()
    fit(seeded(lambda: TinyLM(optimizer)), [counter], loaders(count=56), max_steps=-1, max_epochs=1, **options)
    return counter.before, counter.after


def test_seven_batches() -> None:
    assert count() == (7, 7)


def test_accumulation_with_a_partial_last_window() -> None:
    assert count(accumulate_grad_batches=3) == (3, 3)


def test_lbfgs_calls_its_closure_many_times() -> None:
    assert count(lambda p: torch.optim.LBFGS(p, max_iter=4)) == (7, 7)


class Overflowing(TinyLM):
    """Two of seven losses are infinite, which makes a gradient scaler skip their steps."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if batch_idx in (1, 4) else loss


def test_steps_that_a_scaler_skips_are_not_steps() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    counter, control = Count(), EqualStep()
    module = seeded(lambda: Overflowing(lambda p: torch.optim.SGD(p, lr=0.1)))
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    fit(module, [counter, control], loaders(count=56), max_steps=-1, max_epochs=1, plugins=plugin)
    assert (counter.before, counter.after) == (5, 5)
    assert control.mean_wanted.counts == [5] * 4
    assert all(p.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("make", [EqualStep, UpdateRatioMonitor, Count, DepthProfile])
@pytest.mark.parametrize(("strategy", "message"), [(DeepSpeedStrategy, "DeepSpeed"), (FSDPStrategy, "FSDPStrategy")])
def test_strategies_that_step_out_of_sight_are_refused(make: Any, strategy: Any, message: str) -> None:
    """Neither strategy runs on a CPU, so only the check is run, on a real strategy object."""
    trainer = type("Trainer", (), {"strategy": object.__new__(strategy)})()
    with pytest.raises(ValueError, match=f"does not support .*{message}.*use FSDP2"):
        make().setup(trainer, None, "fit")


def test_a_subclass_of_two_callbacks_needs_no_constructor_call() -> None:
    assert DepthProfile().profiles == []
    assert Count()._handles == []
