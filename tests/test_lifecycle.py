"""All callbacks in realistic training setups: loops, optimizers, precisions, other callbacks."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins import MixedPrecision
from suite import Suite, assert_same
from support import Edges, Judge, Rows, TinyLM, fit, loaders, seeded, texts
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Adafactor

from depthcb import DepthProfile, EqualStep, LayerStack, UpdateRatioMonitor

Optimizer = Callable[[Any], Any]


LOOPS: dict[str, tuple[dict[str, Any], int, int]] = {
    "partial accumulation window": ({"accumulate_grad_batches": 3, "max_steps": -1, "max_epochs": 2}, 4, 2),
    "half an epoch between validations": ({"val_check_interval": 0.5, "max_steps": -1, "max_epochs": 2}, 8, 4),
    "steps between validations": (
        {"val_check_interval": 3, "check_val_every_n_epoch": None, "max_steps": -1, "max_epochs": 3}, 12, 4,
    ),
    "max_steps in mid-epoch": ({"max_steps": 6, "val_check_interval": 2}, 6, 3),
    "limited batches": (
        {"limit_train_batches": 3, "limit_val_batches": 1, "max_steps": -1, "max_epochs": 2}, 6, 2,
    ),
    "gradient clipping": ({"gradient_clip_val": 0.5}, 4, 1),
    "gradient clipping by value": ({"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}, 4, 1),
    "sanity check": ({"num_sanity_val_steps": 2, "max_steps": -1, "max_epochs": 1}, 4, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", LOOPS)
def test_loops(name: str) -> None:
    options, steps, validations = LOOPS[name]
    suite = Suite.make()
    suite.fit(seeded(TinyLM), **options)
    suite.check(steps, validations)


def test_fast_dev_run() -> None:
    suite = Suite.make()
    suite.fit(seeded(TinyLM), fast_dev_run=True)
    assert len(suite.realised.after) == len(suite.watch.profiles) == 1


def test_a_smaller_last_batch() -> None:
    suite = Suite.make()
    suite.fit(seeded(TinyLM), (loaders(count=29)[0], DataLoader(texts(13, seed=1), batch_size=8)))
    suite.check(4, 1)
    assert suite.watch.profiles[0].rows == 13


class TwoSets(TinyLM):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val/loss", self.loss(batch))


def test_several_validation_loaders() -> None:
    train, val = loaders()
    suite = Suite.make()
    suite.fit(seeded(TwoSets), (train, [val, DataLoader(texts(8, seed=2), batch_size=4)]))
    suite.check(4, 1)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_no_validation_at_all() -> None:
    wanted, realised = Judge(), Judge()
    fit(seeded(TinyLM), [wanted, EqualStep(), realised], (loaders()[0],))
    target = wanted.ratios().mean(axis=1, keepdims=True)
    assert np.abs(realised.ratios() / target - 1).max() < 1e-4


def test_validating_alone_does_nothing() -> None:
    suite, module = Suite.make(), seeded(TinyLM)
    trainer = pl.Trainer(callbacks=suite.callbacks, logger=False, enable_progress_bar=False, accelerator="cpu")
    trainer.validate(module, loaders()[1], verbose=False)
    assert not suite.watch.profiles
    assert suite.watch.reference is None


def test_validating_after_a_fit_adds_no_profile() -> None:
    watch = DepthProfile()
    trainer = fit(seeded(TinyLM), [watch])
    trainer.validate(trainer.lightning_module, loaders()[1], verbose=False)
    assert len(watch.profiles) == 1
    assert list(trainer.callback_metrics) == ["val/loss"]


def test_a_refit_with_the_same_objects() -> None:
    suite, module = Suite.make(), seeded(TinyLM)
    suite.fit(module)
    first = suite.watch.profiles[0].mean
    suite.fit(module)
    assert len(suite.realised.after) == 8
    assert len(suite.watch.profiles) == 2
    assert suite.watch.profiles[1].mean > first, "the second fit measures from where the first began"


def groups(parameters: list[Any]) -> Any:
    half = len(parameters) // 2
    return torch.optim.AdamW([{"params": parameters[:half], "lr": 1e-3}, {"params": parameters[half:], "lr": 4e-3}])


def warmed(parameters: list[Any]) -> Any:
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 2))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def one_cycle(parameters: list[Any]) -> Any:
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=8)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


OPTIMIZERS: dict[str, Optimizer] = {
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    "AdamW plain": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=False),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adafactor": lambda p: Adafactor(p, lr=1e-3, scale_parameter=False, relative_step=False),
    "LBFGS": lambda p: torch.optim.LBFGS(p, max_iter=3),
    "groups of different lr": groups,
    "one cycle": one_cycle,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name: str) -> None:
    suite = Suite.make()
    suite.fit(seeded(lambda: TinyLM(OPTIMIZERS[name])))
    suite.check(4, 1)


def test_a_first_step_of_lr_0_moves_nothing_and_is_not_logged() -> None:
    suite = Suite.make()
    suite.fit(seeded(lambda: TinyLM(warmed)))
    suite.check(4, 1)
    assert (suite.realised.ratios()[0] == 0).all()
    assert len(suite.rows.column("equal_step/ratio/L")) == 3


class MuonAndAdamW(TinyLM):
    """Muon for matrices and AdamW for the rest: each layer belongs to both."""

    automatic_optimization = False

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        optimizers = self.optimizers()
        for optimizer in optimizers:  # type: ignore[union-attr]
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        for optimizer in optimizers:  # type: ignore[union-attr]
            optimizer.step()

    def configure_optimizers(self) -> Any:
        inside = {p for layer in LayerStack.find(self).parameters() for p in layer}
        matrices = [p for p in self.parameters() if p in inside and p.ndim == 2]
        rest = [p for p in self.parameters() if p not in set(matrices)]
        return torch.optim.Muon(matrices, lr=1e-2), torch.optim.AdamW(rest, lr=1e-3)


def test_muon_alone() -> None:
    """Parameters without an optimizer are not trained and are not counted in a layer."""

    def matrices(module: pl.LightningModule) -> list[Any]:
        layers = LayerStack.find(module).parameters()
        return [np.concatenate([p.detach().double().numpy().ravel() for p in g if p.ndim == 2]) for g in layers]

    edges, rows = Edges(matrices), Rows()
    module = seeded(lambda: TinyLM(lambda p: torch.optim.Muon([q for q in p if q.ndim == 2], lr=1e-2)))
    twin = copy.deepcopy(module)
    trainer = fit(module, [edges, EqualStep(), UpdateRatioMonitor(), DepthProfile()], logger=rows)
    ratios = edges.ratios()
    assert ratios == pytest.approx(ratios.mean(axis=1, keepdims=True).repeat(4, axis=1), rel=1e-4)
    assert np.array(rows.column("update_ratio/L")) == pytest.approx(ratios, rel=1e-4)
    assert_same(trainer, fit(twin, [EqualStep()]))


def test_muon_for_matrices_and_adamw_for_the_rest() -> None:
    """Checked between batches, after both optimizers have stepped; the monitors log once for both."""
    edges, rows = Edges(), Rows()
    monitors = UpdateRatioMonitor(name="raw"), UpdateRatioMonitor()
    fit(seeded(MuonAndAdamW), [edges, monitors[0], EqualStep(), monitors[1], DepthProfile()], max_steps=8, logger=rows)
    ratios = edges.ratios()
    assert np.array(rows.column("update_ratio/L")) == pytest.approx(ratios, rel=1e-4)
    assert np.array(rows.column("raw/L")) == pytest.approx(np.array(rows.column("equal_step/ratio/L")), rel=1e-6)
    assert ratios == pytest.approx(ratios.mean(axis=1, keepdims=True).repeat(4, axis=1), rel=1e-4)
    assert ratios.min() > 1e-4


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
def test_precisions(precision: Any) -> None:
    suite = Suite.make()
    suite.fit(seeded(TinyLM), precision=precision)
    suite.check(4, 1)


class Overflowing(TinyLM):
    """Two of seven losses are infinite, which makes a gradient scaler skip their steps."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if batch_idx in (1, 4) else loss


@pytest.mark.parametrize(("name", "calls"), [("SGD", 5), ("AdamW fused", 7)])
def test_a_scaler_that_skips_steps(name: str, calls: int) -> None:
    """A fused optimizer is called even if it skips the step; the step then has size 0 and no row."""

    def fit_scaled(module: pl.LightningModule, callbacks: list[pl.Callback], logger: Any = False) -> pl.Trainer:
        scaler = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0))
        options: dict[str, Any] = {"max_steps": -1, "max_epochs": 1, "logger": logger, "plugins": scaler}
        return fit(module, callbacks, loaders(count=56), **options)

    suite, make = Suite.make(), lambda: Overflowing(OPTIMIZERS[name])
    trainer = fit_scaled(seeded(make), suite.callbacks, suite.rows)
    suite.check(calls, 1)
    assert len(suite.rows.column("update_ratio/L")) == (suite.realised.ratios() > 0).all(axis=1).sum() == 5
    assert_same(trainer, fit_scaled(seeded(make), [EqualStep()]))


def test_bf16_weights_log_what_was_realised() -> None:
    suite = Suite.make()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        suite.fit(seeded(TinyLM), precision="bf16-true")
    said = " ".join(str(w.message) for w in warned)
    assert "a small step is rounded away" in said
    assert "the probe runs in that" in said
    realised = np.array(suite.rows.column("equal_step/realised/L"))
    assert realised == pytest.approx(suite.realised.ratios(), rel=1e-2)
    assert suite.watch.profiles[-1].mean > 0


class Unfreezes(BaseFinetuning):
    """Trains the upper layers, and all layers from the second epoch on."""

    def freeze_before_training(self, pl_module: pl.LightningModule) -> None:
        self.freeze(pl_module.model.transformer.h[:2], train_bn=False)  # type: ignore[union-attr,index]

    def finetune_function(self, pl_module: pl.LightningModule, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.model.transformer.h[:2], optimizer, lr=1e-3)  # type: ignore[union-attr,index]


class OnlyTrainable(TinyLM):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


@pytest.mark.filterwarnings("ignore:.*initial_denom_lr.*")
def test_layers_unfrozen_later_join_the_control() -> None:
    wanted, realised, watch, rows = Judge(), Judge(), DepthProfile(), Rows()
    callbacks = [Unfreezes(), wanted, EqualStep(), UpdateRatioMonitor(), realised, watch]
    fit(seeded(OnlyTrainable), callbacks, max_steps=-1, max_epochs=2, logger=rows)
    ratios = realised.ratios()
    assert (ratios[:4, :2] == 0).all()
    for key in ("update_ratio/L", "equal_step/realised/L"):
        logged = rows.column(key)
        assert [len(values) for values in logged] == [2] * 4 + [4] * 4
        assert np.array(logged[:4]) == pytest.approx(ratios[:4, 2:], rel=1e-5)
        assert np.array(logged[4:]) == pytest.approx(ratios[4:], rel=1e-5)
    assert ratios[:4, 2:] == pytest.approx(wanted.ratios()[:4, 2:].mean(axis=1, keepdims=True).repeat(2, 1), rel=1e-4)
    assert ratios[4:] == pytest.approx(wanted.ratios()[4:].mean(axis=1, keepdims=True).repeat(4, 1), rel=1e-4)
    assert len(watch.profiles) == 2


def test_checkpoints_and_early_stopping_monitor_the_slope(tmp_path: Any) -> None:
    watch = DepthProfile()
    keep = ModelCheckpoint(tmp_path, "{epoch}", monitor="depth/cka/slope", mode="max", save_top_k=1)
    stop = EarlyStopping("depth/cka/slope", patience=0, min_delta=1e9, mode="max")
    fit(seeded(TinyLM), [watch, keep, stop], max_steps=-1, max_epochs=5, enable_checkpointing=True)
    slopes = [p.slope for p in watch.profiles]
    assert len(slopes) == 2, "no slope grows by 1e9: stopped after the second validation"
    assert keep.best_model_score == pytest.approx(max(slopes))


@pytest.mark.parametrize("first", [True, False])
def test_which_weights_are_measured_beside_an_average(first: bool) -> None:
    """DepthProfile measures the averaged weights if placed before the averaging callback, and the raw ones if after."""
    change = []
    for average in ([], [EMAWeightAveraging(decay=0.99)]):
        watch = DepthProfile()
        fit(seeded(TinyLM), [watch, *average] if first else [*average, watch])
        change.append(watch.profiles[-1].mean)
    raw, beside = change
    assert beside < raw / 2 if first else beside == raw


@pytest.mark.filterwarnings("ignore:Swapping scheduler")
@pytest.mark.parametrize("first", [True, False])
def test_stochastic_weight_averaging(first: bool) -> None:
    """Weights are only swapped at the end, so all steps are controlled and all profiles are of the raw weights."""
    wanted, realised, watch = Judge(), Judge(), DepthProfile()
    average = StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1)
    callbacks: list[pl.Callback] = [wanted, EqualStep(), realised, watch]
    fit(seeded(TinyLM), [average, *callbacks] if first else [*callbacks, average], max_steps=-1, max_epochs=3)
    target = wanted.ratios().mean(axis=1, keepdims=True)
    assert realised.ratios() == pytest.approx(target.repeat(4, 1), rel=1e-4)
    assert len(watch.profiles) == 3


COMPANY: dict[str, tuple[Callable[[], pl.LightningModule], Callable[[], list[pl.Callback]]]] = {
    "two optimizers": (MuonAndAdamW, list),
    "unfreezing": (OnlyTrainable, lambda: [Unfreezes()]),
    "moving average": (TinyLM, lambda: [EMAWeightAveraging(decay=0.99)]),
    "stochastic weight averaging": (TinyLM, lambda: [StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1)]),
}


@pytest.mark.filterwarnings("ignore:.*initial_denom_lr.*", "ignore:Swapping scheduler")
@pytest.mark.parametrize("name", COMPANY)
@pytest.mark.parametrize("first", [True, False])
def test_watching_is_silent_in_company(name: str, first: bool) -> None:
    make, company = COMPANY[name]
    watchers: list[pl.Callback] = [DepthProfile(), UpdateRatioMonitor()]
    options: dict[str, Any] = {"max_steps": -1, "max_epochs": 3}
    watched = fit(seeded(make), [*watchers, *company()] if first else [*company(), *watchers], **options)
    assert_same(watched, fit(seeded(make), company(), **options))
    assert len(watchers[0].profiles) == 3  # type: ignore[attr-defined]
