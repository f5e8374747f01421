"""EqualStep in real fits: every step is checked against numpy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from support import Edges, Judge, Rows, TinyLM, fit, loaders, logged, seeded, weights
from torch import Tensor, nn

from depthcb import EqualStep, LayerStack, UpdateRatioMonitor

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=2e-3, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-4),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=1.0, max_iter=3),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    "options", [{}, {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2, "max_steps": 3, "max_epochs": 3}]
)
def test_every_step_is_equal_and_keeps_its_direction(optimizer: str, options: dict[str, Any]) -> None:
    if optimizer == "lbfgs" and options:
        options = {"max_steps": 3}  # Lightning refuses to clip or accumulate around a closure that runs several times
    wanted, realised = Judge(), Judge()
    fit(seeded(lambda: TinyLM(OPTIMIZERS[optimizer])), [wanted, EqualStep(), realised], **options)
    assert len(realised.after) == options.get("max_steps", 4)
    ratios, target = realised.ratios(), wanted.ratios().mean(axis=1, keepdims=True)
    resolved = target[:, 0] > 1e-4  # below that, fp32 weights cannot represent a ratio to 1e-4
    assert resolved.any()
    assert np.abs(ratios / target - 1)[resolved].max() < 1e-4
    spread = wanted.ratios().max(axis=1) / wanted.ratios().min(axis=1)
    assert spread.max() > 1.01, "nothing to equalise: a weak test"
    for before, after in zip(wanted.steps(), realised.steps(), strict=True):
        for a, b in zip(before, after, strict=True):
            assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.9999


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("median", np.median),
        ("min", np.min),
        ("geometric_mean", lambda r: math.exp(np.log(r).mean())),
        (2e-3, lambda r: 2e-3),
        ((1.0, 2.0, 3.0, 2.0), lambda r: r.mean() * np.array([0.5, 1, 1.5, 1])),
        (lambda r, step: r.flip(0) * (1 + step), lambda r: None),
    ],
)
def test_targets(target: Any, expected: Callable[[np.ndarray], Any]) -> None:
    wanted, realised = Judge(), Judge()
    fit(seeded(lambda: TinyLM(OPTIMIZERS["sgd"])), [wanted, EqualStep(target=target), realised])
    for step, (want, real) in enumerate(zip(wanted.ratios(), realised.ratios(), strict=True)):
        figure = want[::-1] * (1 + step) if callable(target) else expected(want)
        assert real == pytest.approx(np.broadcast_to(figure, real.shape), rel=1e-4)


class EqualByItself(torch.optim.Optimizer):
    """Updates every group by 1e-3 of its norm along its gradient, so that all ratios are already equal."""

    def __init__(self, groups: list[list[nn.Parameter]]) -> None:
        super().__init__([{"params": group} for group in groups], {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        with torch.enable_grad():
            closure()
        for group in self.param_groups:
            size = torch.stack([p.norm() for p in group["params"]]).norm()
            slope = torch.stack([p.grad.norm() for p in group["params"]]).norm()
            for p in group["params"]:
                p.sub_(1e-3 * size / slope * p.grad)


def test_a_run_that_is_already_equal_stays_as_it_is() -> None:
    def run(*callbacks: pl.Callback) -> list[np.ndarray]:
        module = seeded(TinyLM)
        module.make_optimizer = lambda _: EqualByItself(LayerStack.find(module).parameters())  # type: ignore[assignment]
        fit(module, list(callbacks))
        return weights(module)

    start = weights(seeded(TinyLM))
    for before, bare, controlled in zip(start, run(), run(EqualStep()), strict=True):
        assert np.linalg.norm(controlled - bare) < 1e-4 * np.linalg.norm(bare - before)


def test_frozen_layers_are_untouched_and_out_of_the_mean() -> None:
    module = seeded(lambda: TinyLM(OPTIMIZERS["sgd"]))
    frozen = LayerStack.find(module).modules[1]
    frozen.requires_grad_(False)
    start = weights(module)
    wanted, realised = Judge(), Judge()
    control = EqualStep()
    rows = Rows()
    fit(module, [wanted, control, realised], logger=rows)
    assert np.array_equal(weights(module)[1], start[1])
    moving = [0, 2, 3]
    target = wanted.ratios()[:, moving].mean(axis=1, keepdims=True)
    assert np.abs(realised.ratios()[:, moving] / target - 1).max() < 1e-4
    assert not rows.column("equal_step/ratio/L01")
    assert control.mean_wanted.values()[1] == control.mean_realised.values()[1] == 0
    assert control.mean_wanted.values() == pytest.approx(
        np.where(np.arange(4) == 1, 0, wanted.ratios().mean(axis=0)), rel=1e-5
    )


def test_parameters_outside_are_left_alone_or_layers_on_request() -> None:
    def outside(module: pl.LightningModule) -> list[Tensor]:
        return [p.detach().clone() for group in LayerStack.find(module).outside().values() for p in group]

    one_step: dict[str, Any] = {"max_steps": 1}
    plain, left = (seeded(lambda: TinyLM(OPTIMIZERS["sgd"])) for _ in range(2))
    fit(plain, [], **one_step)
    fit(left, [EqualStep()], **one_step)
    assert all(torch.equal(a, b) for a, b in zip(outside(plain), outside(left), strict=True))
    control = EqualStep(outside="layer")
    counted = seeded(lambda: TinyLM(OPTIMIZERS["sgd"]))
    fit(counted, [control], **one_step)
    assert control.names[4:] == ("model.transformer.wte", "model.transformer.wpe", "model.transformer.ln_f")
    assert control.mean_realised.values() == pytest.approx([np.mean(control.mean_wanted.values())] * 7, rel=1e-4)


class OneBadGradient(pl.Callback):
    """Puts a NaN into one layer's gradient at one step."""

    def __init__(self, module: nn.Module, at: int) -> None:
        self.weight, self.at = next(module.parameters()), at

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        if trainer.global_step == self.at:
            self.weight.grad[0] = float("nan")  # type: ignore[index]


@pytest.mark.parametrize("log_every", [1, 3, 100])
def test_a_non_finite_update_is_not_applied_and_names_its_layer(log_every: int) -> None:
    """The layer is named at the next log or at the end of the fit; later steps do not spread the NaN."""
    module = seeded(lambda: TinyLM(OPTIMIZERS["adamw"]))
    bad = OneBadGradient(LayerStack.find(module).modules[2], at=1)
    with pytest.raises(ValueError, match=r"not finite in layer model\.transformer\.h\.2;"):
        fit(module, [EqualStep(), bad], log_every_n_steps=log_every)
    assert all(np.isfinite(layer).all() for layer in weights(module))


def test_logs_what_it_did(tmp_path: Any) -> None:
    judge, control, monitor = Judge(), EqualStep(), UpdateRatioMonitor()
    logger = CSVLogger(tmp_path, name="", version="")
    fit(seeded(lambda: TinyLM(OPTIMIZERS["sgd"])), [judge, control, monitor], logger=logger, log_every_n_steps=2)
    rows = [row for row in logged(logger) if "equal_step/target" in row]
    assert [row["step"] for row in rows] == [1, 3]
    assert [row["step"] for row in logged(logger) if "train/loss" in row] == [1, 3]
    for row, want in zip(rows, judge.ratios()[1::2], strict=True):
        for i in range(4):
            assert row[f"equal_step/ratio/L{i:02d}"] == pytest.approx(want[i], rel=1e-5)
            assert row[f"equal_step/scale/L{i:02d}"] == pytest.approx(want.mean() / want[i], rel=1e-5)
            assert row[f"equal_step/realised/L{i:02d}"] == pytest.approx(want.mean(), rel=1e-4)
        assert row["equal_step/target"] == pytest.approx(want.mean(), rel=1e-5)
        assert row["equal_step/spread"] == pytest.approx(want.max() / want.min(), rel=1e-5)
    ratios = [row for row in logged(logger) if "update_ratio/L00" in row]
    assert [row["update_ratio/L03"] for row in ratios] == pytest.approx(
        [r["equal_step/realised/L03"] for r in rows], rel=1e-6
    )
    assert monitor.mean.values() == pytest.approx(control.mean_realised.values(), rel=1e-6)


def test_monitor_before_and_after_the_control() -> None:
    before, control, after = UpdateRatioMonitor(name="raw_ratio"), EqualStep(), UpdateRatioMonitor()
    rows = Rows()
    fit(seeded(lambda: TinyLM(OPTIMIZERS["sgd"])), [before, control, after], logger=rows)
    pairs = (("raw_ratio/L", "equal_step/ratio/L"), ("update_ratio/L", "equal_step/realised/L"))
    for seen, said in pairs:
        assert len(rows.column(said)) == 4
        assert np.array(rows.column(seen)) == pytest.approx(np.array(rows.column(said)), rel=1e-6)


class TwoOptimizers(TinyLM):
    """Manual optimization with one optimizer for matrices and one for the rest; every layer belongs to both."""

    automatic_optimization = False

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        first, second = self.optimizers()  # type: ignore[misc]
        self.manual_backward(self.loss(batch))
        first.step()
        second.step()
        first.zero_grad()
        second.zero_grad()

    def configure_optimizers(self) -> Any:
        parameters = list(self.parameters())
        matrices = [p for p in parameters if p.ndim == 2]
        return torch.optim.SGD(matrices, lr=0.1), torch.optim.AdamW([p for p in parameters if p.ndim != 2], lr=1e-3)


def test_a_layer_of_two_optimizers_is_rescaled_after_the_last() -> None:
    edges, rows = Edges(), Rows()
    fit(TwoOptimizers(), [edges, EqualStep()], max_steps=6, logger=rows)  # two optimizers: 3 batches
    wanted = rows.column("equal_step/ratio/L")
    assert len(wanted) == 3
    assert edges.ratios() == pytest.approx(np.repeat(np.mean(wanted, axis=1, keepdims=True), 4, axis=1), rel=1e-4)


class Halves(TwoOptimizers):
    """The lower layers belong to one optimizer, the upper ones to another, which may never step."""

    lazy = False

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.manual_backward(self.loss(batch))
        for optimizer in self.optimizers()[: 1 if self.lazy else 2]:
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        lower, upper = self.model.transformer.h[:2], self.model.transformer.h[2:]
        return torch.optim.SGD(lower.parameters(), lr=0.1), torch.optim.AdamW(upper.parameters(), lr=1e-3)


def test_layers_of_different_optimizers_get_one_ratio() -> None:
    control = EqualStep()
    fit(seeded(Halves), [control], max_steps=6)
    assert max(control.mean_realised.values()) == pytest.approx(min(control.mean_realised.values()), rel=1e-4)
    assert max(control.mean_wanted.values()) > 1.3 * min(control.mean_wanted.values()), "a weak test"


def test_an_optimizer_that_never_steps_is_named() -> None:
    module: Any = seeded(Halves)
    module.lazy = True
    with pytest.warns(UserWarning, match="AdamW owns parameters of the layers and did not step"):
        fit(module, [EqualStep()], max_steps=3)


def test_a_target_below_zero_is_not_applied_and_names_its_layer() -> None:
    module = seeded(TinyLM)
    start = weights(module)
    with pytest.raises(ValueError, match=r"not finite.*layer model\.transformer\.h\.2"):
        fit(module, [EqualStep(target=lambda r, step: r * torch.tensor([1.0, 1, -1, 1]))])
    moved = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(weights(module), start, strict=True)]
    assert [ratio < 1e-7 for ratio in moved] == [False, False, True, False]


def test_two_controls_side_by_side() -> None:
    rows = Rows()
    controls = [
        EqualStep(layers="model.transformer.h.[01]", name="lower"),
        EqualStep(layers="model.transformer.h.[23]", name="upper"),
    ]
    fit(seeded(TinyLM), controls, logger=rows)
    for name in ("lower", "upper"):
        assert len(rows.column(f"{name}/realised/L")[0]) == 2


def test_biases_that_start_at_zero_are_refused_when_nothing_else_trains() -> None:
    module = seeded(TinyLM)
    for name, p in module.named_parameters():
        p.requires_grad_(name.endswith("bias") and "ln" not in name)
    with pytest.raises(ValueError, match=r"trainable parameters of layer .* are all 0"):
        fit(module, [EqualStep()])


def test_a_resumed_control_goes_on_counting(tmp_path: Any) -> None:
    """The step passed to a callable target and the means continue from a checkpoint, which loads without pickle."""
    steps: list[int] = []

    def target(ratios: Tensor, step: int) -> Tensor:
        steps.append(step)
        return ratios

    first, second = EqualStep(target=target), EqualStep(target=target)
    monitors = UpdateRatioMonitor(), UpdateRatioMonitor()
    fit(seeded(TinyLM), [first, monitors[0]], max_epochs=1).save_checkpoint(tmp_path / "a.ckpt")
    trainer = pl.Trainer(
        max_epochs=2, callbacks=[second, monitors[1]], logger=False, enable_checkpointing=False, log_every_n_steps=1,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(seeded(TinyLM), *loaders(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert steps == list(range(8))
    assert second.mean_wanted.counts == monitors[1].mean.counts == [8] * 4


def test_a_skipped_step_changes_nothing() -> None:
    """A learning rate of 0 gives updates of size 0: no division by zero and no logged row."""
    module = seeded(lambda: TinyLM(lambda p: torch.optim.SGD(p, lr=0.0)))
    start = weights(module)
    rows = Rows()
    fit(module, [EqualStep(), UpdateRatioMonitor()], logger=rows)
    assert all(np.array_equal(a, b) for a, b in zip(weights(module), start, strict=True))
    assert not rows.column("equal_step/") + rows.column("update_ratio/")


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (lambda: EqualStep(target=[1.0, 2.0]), "2 numbers for 4 controlled layers"),
        (lambda: EqualStep(layers="model.transformer.blocks"), "matches no module of TinyLM; did you mean"),
        (lambda: EqualStep(target=-1.0), "finite and positive"),
        (lambda: EqualStep(outside="ignore"), "outside='ignore' is unknown"),  # type: ignore[arg-type]
    ],
)
def test_bad_input_is_refused_before_the_first_step(callback: Callable[[], pl.Callback], message: str) -> None:
    module = seeded(TinyLM)
    start = weights(module)
    with pytest.raises(ValueError, match=message):
        fit(module, [callback()])
    assert all(np.array_equal(a, b) for a, b in zip(weights(module), start, strict=True))


def test_an_all_zero_layer_is_refused() -> None:
    module = seeded(TinyLM)
    for p in LayerStack.find(module).modules[3].parameters():
        p.data.zero_()
    with pytest.raises(ValueError, match=r"layer model\.transformer\.h\.3 are all 0"):
        fit(module, [EqualStep()])


def test_half_precision_weights_are_warned_about_and_measured() -> None:
    control = EqualStep()
    with pytest.warns(UserWarning, match="torch.bfloat16 weights a small step is rounded away"):
        fit(seeded(TinyLM), [control], precision="bf16-true")
    realised, wanted = np.array(control.mean_realised.values()), np.mean(control.mean_wanted.values())
    assert not np.allclose(realised, wanted, rtol=1e-3), "bf16 rounding was expected to show in the realised ratio"
