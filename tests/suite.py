"""All callbacks together, and what must hold of every fit with them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from support import Judge, Rows, fit

from depthcb import DepthProfile, EqualStep, UpdateRatioMonitor


@dataclass
class Suite:
    """All callbacks, with recorders before and after EqualStep, and their logged rows."""

    wanted: Judge
    control: EqualStep
    realised: Judge
    watch: DepthProfile
    rows: Rows

    @classmethod
    def make(cls) -> Suite:
        return cls(Judge(), EqualStep(), Judge(), DepthProfile(), Rows())

    @property
    def callbacks(self) -> list[pl.Callback]:
        raw, seen = UpdateRatioMonitor(name="raw"), UpdateRatioMonitor()
        return [self.wanted, raw, self.control, seen, self.realised, self.watch]

    def fit(self, module: pl.LightningModule, data: Any = None, **options: Any) -> pl.Trainer:
        """Fits with and without observers: the results are bit-identical, and no hooks are left."""
        hooks, twin = count_hooks(module), copy.deepcopy(module)
        trainer = fit(module, self.callbacks, data, logger=self.rows, **options)
        assert_same(trainer, fit(twin, [EqualStep()], data, **options))
        assert not any(o._optimizer_step_pre_hooks or o._optimizer_step_post_hooks for o in trainer.optimizers)
        assert count_hooks(module) == hooks
        return trainer

    def check(self, steps: int, validations: int) -> None:
        """Checks the number of steps, each equal over layers and logged, and of profiles in the rows of val/loss."""
        assert len(self.realised.after) == steps
        ratios, target = self.realised.ratios(), self.wanted.ratios().mean(axis=1, keepdims=True)
        resolved = target[:, 0] > 1e-4
        assert resolved.any()
        assert np.abs(ratios[resolved] / target[resolved] - 1).max() < 1e-4
        logged = {key: self.rows.column(f"{key}/L") for key in ("raw", "update_ratio", "equal_step/realised")}
        moved = (ratios > 0).all(axis=1)
        for key, judge in (
            ("raw", self.wanted),
            ("update_ratio", self.realised),
            ("equal_step/realised", self.realised),
        ):
            assert np.array(logged[key]) == pytest.approx(judge.ratios()[moved], rel=1e-5)
        assert len(self.watch.profiles) == validations
        stamped = [row["step"] for row in self.rows.rows if any(k.startswith("val/loss") for k in row)]
        assert [p.step for p in self.watch.profiles] == stamped
        assert all(0 < p.mean < 2 for p in self.watch.profiles)


def assert_same(trainer: pl.Trainer, other: pl.Trainer) -> None:
    """Checks that weights, buffers and optimizer states are bit-identical."""
    states = [[t.lightning_module.state_dict(), *[o.state_dict() for o in t.optimizers]] for t in (trainer, other)]
    torch.testing.assert_close(*states, rtol=0, atol=0)


def count_hooks(module: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())
