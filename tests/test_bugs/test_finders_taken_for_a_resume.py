"""Lightning's finders save and load a checkpoint before the fit, which looked like a resume without a reference."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from support import Judge, TinyLM, fit, loaders, seeded, texts
from torch.utils.data import DataLoader

from depthcb import DepthProfile, EqualStep, UpdateRatioMonitor


class Tuned(TinyLM):
    """A module and data with the attributes that the finders change: learning rate and batch size."""

    def __init__(self) -> None:
        super().__init__(lambda p: torch.optim.AdamW(p, lr=self.lr))
        self.lr, self.batch_size = 1e-3, 2

    def train_dataloader(self) -> Any:
        return DataLoader(texts(64), batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> Any:
        return loaders()[1]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("finder", ["lr", "batch_size"])
def test_finders_are_unharmed_and_leave_the_reference_alone(finder: str, tmp_path: Any) -> None:
    found = {}
    for with_callbacks in (False, True):
        module = seeded(Tuned)
        watch = DepthProfile()
        tuner: pl.Callback = (
            LearningRateFinder(num_training_steps=20)
            if finder == "lr"
            else BatchSizeFinder(mode="power", steps_per_trial=1, max_trials=2)
        )
        pl.seed_everything(7, verbose=False)
        watchers: list[Any] = [watch, UpdateRatioMonitor()] if with_callbacks else []
        trainer = pl.Trainer(
            max_steps=4, callbacks=[tuner, *watchers], logger=False, enable_progress_bar=False, accelerator="cpu",
            enable_model_summary=False, default_root_dir=tmp_path, num_sanity_val_steps=0, log_every_n_steps=1,
            val_check_interval=2,
        )  # fmt: skip
        trainer.fit(module)
        found[with_callbacks] = module.lr, module.batch_size, *[p.detach().sum().item() for p in module.parameters()]
        if with_callbacks:
            again = DepthProfile()
            fit(seeded(Tuned), [again], (seeded(Tuned).train_dataloader(), loaders()[1]), max_steps=1)  # type: ignore[operator]
            torch.testing.assert_close(watch.reference.sketches, again.reference.sketches)  # type: ignore[union-attr]
    assert found[True] == found[False]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("finder", [LearningRateFinder(num_training_steps=20), BatchSizeFinder(max_trials=2)])
@pytest.mark.parametrize("first", [True, False])
def test_the_control_works_after_a_finder(finder: pl.Callback, first: bool, tmp_path: Any) -> None:
    wanted, control, realised, watch = Judge(), EqualStep(), Judge(), DepthProfile()
    callbacks: list[pl.Callback] = [wanted, control, realised, watch]
    trainer = pl.Trainer(
        max_steps=4, callbacks=[finder, *callbacks] if first else [*callbacks, finder], logger=False,
        enable_progress_bar=False, accelerator="cpu", enable_model_summary=False, default_root_dir=tmp_path,
        num_sanity_val_steps=0, log_every_n_steps=1, val_check_interval=2,
    )  # fmt: skip
    trainer.fit(seeded(Tuned))
    assert control.mean_wanted.counts == [4] * 4
    ratios, target = realised.ratios()[-4:], wanted.ratios()[-4:].mean(axis=1, keepdims=True)
    assert np.abs(ratios / target - 1).max() < 1e-4
    assert len(watch.profiles) == 2
