"""Observers do not affect training: with and without them, it is bit-identical."""

from __future__ import annotations

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from support import TinyLM, fit, logged, seeded

from depthcb import DepthProfile, EqualStep, UpdateRatioMonitor

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than 5 directions.*", "ignore:.*in eval mode at the start.*")


class Streams(pl.Callback):
    """Records all random states and train/eval flags at the end of each validation and of the fit."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def _note(self, module: pl.LightningModule) -> None:
        flags = [m.training for m in module.modules()]
        self.seen.append((torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist(), flags))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self._note(pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._note(pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._note(pl_module)


def outcome(tmp_path: Any, callbacks: list[pl.Callback], **options: Any) -> tuple[Any, ...]:
    module, streams = seeded(TinyLM), Streams()
    module.model.transformer.h[2].eval()  # one block in eval mode while others train: each flag must be restored
    logger = CSVLogger(tmp_path, name="", version="")
    trainer = fit(module, [*callbacks, streams], logger=logger, val_check_interval=2, **options)
    state = trainer.optimizers[0].state_dict()
    rows = [{k: v for k, v in row.items() if not k.startswith(("depth", "update_ratio"))} for row in logged(logger)]
    rows = [row for row in rows if set(row) - {"step", "epoch"}]
    assert rows
    return module.state_dict(), state, streams.seen, rows


@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 3}, {"precision": "bf16-mixed"}, {"num_sanity_val_steps": 2}]
)
@pytest.mark.parametrize("rows", ["mean", "tokens"])
def test_an_observed_run_is_the_unobserved_one(tmp_path: Any, options: dict[str, Any], rows: Any) -> None:
    watch = DepthProfile(rows=rows, measures=("cka", "procrustes"))
    bare = outcome(tmp_path / "bare", [], **options)
    seen = outcome(tmp_path / "seen", [watch, UpdateRatioMonitor()], **options)
    assert watch.profiles
    assert watch.profiles[-1].mean > 0, "nothing was watched: a weak test"
    for a, b in zip(bare, seen, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_no_hook_is_left_behind(failure: type[BaseException]) -> None:
    """After a fit, even a failed one, no hooks are left on the optimizer or model, and a second fit counts steps once."""

    class Fails(TinyLM):
        def training_step(self, *args: Any) -> Any:
            if fails and self.global_step == 2:
                raise failure
            return super().training_step(*args)

    module, callbacks = seeded(Fails), [EqualStep(), UpdateRatioMonitor(), DepthProfile()]
    for fails in (True, False):
        trainers: list[pl.Trainer] = []

        class Note(pl.Callback):
            def on_train_start(self, trainer: Any, pl_module: Any) -> None:
                trainers.append(trainer)  # noqa: B023

        if fails:
            with pytest.raises((failure, SystemExit)):
                fit(module, [*callbacks, Note()])
        else:
            fit(module, [*callbacks, Note()])
        optimizer = trainers[0].optimizers[0]
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks
        assert not any(m._forward_hooks for m in module.modules())
    assert callbacks[0].mean_wanted.counts == [4] * 4, "a fresh fit starts a fresh mean"  # type: ignore[attr-defined]
