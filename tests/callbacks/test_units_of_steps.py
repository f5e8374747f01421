"""Steps by matrix and by group: the control, what is logged, and the monitor's extras, each against numpy in float64."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from dispatched import Dispatched
from support import Rows, TinyLM, fit, seeded
from torch import nn

from depthcb import DepthProfile, EqualStep, LayerStack, OptimizerStepCallback, UpdateRatioMonitor
from depthcb.engine import StepEqualizer, StepRatioMeter
from depthcb.pretrained import PretrainedWeights
from depthcb.step_extras import EXTRAS
from depthcb.units import VECTORS

Numbers = dict[str, np.ndarray]


def unit_of(unit: str, path: str, p: nn.Parameter) -> str:
    """The unit of a parameter of GPT-2's block, by hand."""
    if unit == "matrix":
        return path if p.dim() > 1 else VECTORS
    return {"attn": "attention", "mlp": "mlp", "ln_1": "norm", "ln_2": "norm"}[path.partition(".")[0]]


def by_unit(module: pl.LightningModule, unit: str, of: Callable[[nn.Parameter], torch.Tensor | None]) -> Numbers:
    """One float64 vector per unit, by logged key."""
    found: dict[str, list[np.ndarray]] = {}
    for i, block in enumerate(module.model.transformer.h):
        for path, p in block.named_parameters():
            key = f"L{i:02d}" + ("" if unit == "layer" else f"/{unit_of(unit, path, p)}")
            values = of(p)
            if values is not None:
                found.setdefault(key, []).append(values.detach().double().numpy().ravel())
    return {key: np.concatenate(parts) for key, parts in found.items()}


class Witness(OptimizerStepCallback):
    """Stores the weights of each unit before and after every batch's steps, and the gradients that these used."""

    def __init__(self, unit: str) -> None:
        self.unit = unit
        self.before: list[Numbers] = []
        self.after: list[Numbers] = []
        self.gradients: list[Numbers] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self.before.append(by_unit(pl_module, self.unit, lambda p: p))

    def on_after_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        now = by_unit(pl_module, self.unit, lambda p: p)
        slope = by_unit(pl_module, self.unit, lambda p: p.grad)
        if len(self.after) == len(self.before):  # the second optimizer of the same batch
            self.after[-1], self.gradients[-1] = now, slope
        else:
            self.after.append(now)
            self.gradients.append(slope)

    def ratios(self) -> list[dict[str, float]]:
        return [
            {k: float(np.linalg.norm(now[k] - b) / np.linalg.norm(b)) for k, b in before.items()}
            for before, now in zip(self.before, self.after, strict=True)
        ]


class MuonAndAdamW(TinyLM):
    """Muon for the layers' matrices, AdamW for the rest, each step by hand."""

    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers = self.optimizers()
        self.manual_backward(self.loss(batch))
        for optimizer in optimizers:  # type: ignore[union-attr]
            optimizer.step()
        for optimizer in optimizers:  # type: ignore[union-attr]
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        matrices = [p for p in self.model.transformer.h.parameters() if p.ndim == 2]
        rest = [p for p in self.parameters() if not any(p is m for m in matrices)]
        return torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=1e-3)


MAKERS: dict[str, Callable[[], pl.LightningModule]] = {
    "adamw": lambda: TinyLM(lambda p: torch.optim.AdamW(p, lr=2e-3, weight_decay=0.1)),
    "sgd": lambda: TinyLM(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    "muon": MuonAndAdamW,
}


@pytest.mark.parametrize("unit", ["matrix", "group"])
@pytest.mark.parametrize("optimizer", MAKERS)
def test_every_unit_takes_an_equal_step_in_its_own_direction(optimizer: str, unit: Any) -> None:
    """The optimizer's own step is that of a twin without the control, from the same weights: the first one."""
    alone, controlled, rows = Witness(unit), Witness(unit), Rows()
    steps = 8 if optimizer == "muon" else 4  # two optimizers count two steps
    fit(seeded(MAKERS[optimizer]), [alone], max_steps=steps)
    fit(seeded(MAKERS[optimizer]), [EqualStep(unit=unit), controlled], logger=rows, max_steps=steps)
    assert len(controlled.ratios()) == 4
    for ratios in controlled.ratios():
        assert len(ratios) == (5 if unit == "matrix" else 3) * 4
        assert max(ratios.values()) / min(ratios.values()) - 1 < 1e-4
    wanted = alone.ratios()[0]
    assert max(wanted.values()) > 2 * min(wanted.values()), "nothing to equalise: a weak test"
    row = next(row for row in rows.rows if "equal_step/target" in row)
    for key, ratio in wanted.items():
        assert row[f"equal_step/ratio/{key}"] == pytest.approx(ratio, rel=1e-5)
        assert row[f"equal_step/realised/{key}"] == pytest.approx(np.mean([*wanted.values()]), rel=1e-4)
        one, other = (w.after[0][key] - w.before[0][key] for w in (alone, controlled))
        assert one @ other / np.linalg.norm(one) / np.linalg.norm(other) > 0.9999


def test_parameters_outside_are_units_too_on_request() -> None:
    control = EqualStep(unit="matrix", outside="layer")
    fit(seeded(MAKERS["sgd"]), [control], max_steps=2)
    outside = [key for key in control.equalizer.keys if not key.startswith("L0")]
    assert outside == [f"model.transformer.{n}" for n in ("wte/weight", "wpe/weight", "ln_f/vectors")]
    realised = control.mean_realised.values()
    assert max(realised) / min(realised) - 1 < 1e-4


def test_equal_layers_show_how_far_their_matrices_are_apart() -> None:
    """By the control, after it, and by the monitor."""
    witness, rows = Witness("matrix"), Rows()
    fit(seeded(MAKERS["sgd"]), [EqualStep(), witness, UpdateRatioMonitor()], logger=rows)
    apart = []
    for name in ("equal_step", "update_ratio"):
        logged = rows.column(f"{name}/matrix_spread/L")
        assert len(logged) == 4
        for row, ratios in zip(logged, witness.ratios(), strict=True):
            for i, spread in enumerate(row):
                own = [r for key, r in ratios.items() if key.startswith(f"L{i:02d}/") and VECTORS not in key]
                assert spread == pytest.approx(max(own) / min(own), rel=1e-3)
                apart.append(spread)
    assert max(apart) > 1.5, "all alike: a weak test"


def expected(witness: Witness, extra: str, start: Numbers, step: int, key: str) -> float:
    before, now, slope = (side[step][key] for side in (witness.before, witness.after, witness.gradients))
    moved, norm = now - before, np.linalg.norm
    return {
        "grad_norm": lambda: float(norm(slope)),
        "cos_gradient": lambda: float(-(moved @ slope) / norm(moved) / norm(slope)),
        "cos_weight": lambda: float(-(moved @ before) / norm(moved) / norm(before)),
        "unchanged": lambda: float(np.mean(moved == 0)),
        "net_change": lambda: float(norm(now - start[key]) / norm(start[key])),
    }[extra]()


@pytest.mark.parametrize("unit", ["layer", "matrix", "group"])
@pytest.mark.parametrize("optimizer", MAKERS)
def test_extras_agree_with_numpy(optimizer: str, unit: Any) -> None:
    witness, rows, module = Witness(unit), Rows(), seeded(MAKERS[optimizer])
    start = by_unit(module, unit, lambda p: p)
    watch, monitor = DepthProfile(pretrained="cpu", null_draws=1), UpdateRatioMonitor(unit=unit, extras=EXTRAS)
    options: dict[str, Any] = {"max_steps": 8} if optimizer == "muon" else {"gradient_clip_val": 0.1, "max_steps": 4}
    fit(module, [witness, monitor, watch], logger=rows, limit_val_batches=1, **options)
    logged = [row for row in rows.rows if "update_ratio/spread" in row]
    assert len(logged) == 4
    for step, row in enumerate(logged):
        for key in start:
            for extra in EXTRAS:
                true = expected(witness, extra, start, step, key)
                assert row[f"update_ratio/{extra}/{key}"] == pytest.approx(true, rel=1e-6, abs=1e-9)


def test_extras_of_half_precision_weights() -> None:
    """In bf16 most numbers are rounded back to what they were."""
    witness, rows = Witness("layer"), Rows()
    monitor = UpdateRatioMonitor(extras=("unchanged", "cos_weight"))
    fit(seeded(lambda: TinyLM(lambda p: torch.optim.SGD(p, lr=1e-3))), [witness, monitor], logger=rows, precision="bf16-true")  # fmt: skip
    for step, row in enumerate(row for row in rows.rows if "update_ratio/spread" in row):
        for key in witness.before[0]:
            true = expected(witness, "unchanged", {}, step, key)
            assert row[f"update_ratio/unchanged/{key}"] == pytest.approx(true, abs=1e-9)
            assert true > 0.5, "nothing is rounded away: a weak test"
            true = expected(witness, "cos_weight", {}, step, key)
            assert row[f"update_ratio/cos_weight/{key}"] == pytest.approx(true, rel=1e-6)


def test_the_step_of_plain_sgd_is_along_the_gradient_and_that_of_decay_along_the_weights() -> None:
    columns = []
    for options in ({"lr": 0.1}, {"lr": 1e-4, "weight_decay": 1e4}):
        rows, make = Rows(), lambda: TinyLM(lambda p: torch.optim.SGD(p, **options))  # noqa: B023
        fit(seeded(make), [UpdateRatioMonitor(extras=("cos_gradient", "cos_weight"))], logger=rows, max_steps=2)
        columns.append([np.array(rows.column(f"update_ratio/{c}/L")) for c in ("cos_gradient", "cos_weight")])
    assert columns[0][0] == pytest.approx(1, abs=1e-4)
    assert columns[1][1] == pytest.approx(1, abs=1e-4)
    assert np.abs(columns[0][1]).max() < 0.9


class Clearing(torch.optim.Optimizer):
    """An optimizer whose step clears the gradients."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        with torch.enable_grad():
            closure()
        for p in self.param_groups[0]["params"]:
            p.sub_(0.1 * p.grad)
            p.grad = None


def test_cleared_gradients_are_said_and_left_out() -> None:
    rows = Rows()
    monitor = UpdateRatioMonitor(extras=("grad_norm", "cos_gradient", "cos_weight"))
    with pytest.warns(UserWarning, match="the optimizer clears them"):
        fit(seeded(lambda: TinyLM(lambda p: Clearing(p, {}))), [monitor], logger=rows)
    assert not rows.column("update_ratio/grad_norm") + rows.column("update_ratio/cos_gradient")
    assert len(rows.column("update_ratio/cos_weight/L")) == 4


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_of_a_scaled_loss_are_unscaled(fused: bool) -> None:
    """A fused optimizer gets scaled gradients and unscales them itself."""
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x, rows = torch.randn(16, 8), []
    true = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    norms = [float(torch.stack([w.double().norm(), b.double().norm()]).norm()) for w, b in zip(true[::2], true[1::2], strict=True)]  # fmt: skip
    with StepRatioMeter(extras=("grad_norm",)).attach(model, [optimizer], log=lambda row, step: rows.append(row)):
        scaler.scale(model(x).square().sum()).backward()  # type: ignore[no-untyped-call]
        scaler.step(optimizer)
    assert [rows[0][f"update_ratio/grad_norm/L0{i}"] for i in range(3)] == pytest.approx(norms, rel=1e-5)


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (lambda: UpdateRatioMonitor(extras=["gradnorm"]), "extras=.'gradnorm'. is unknown"),  # type: ignore[list-item]
        (lambda: UpdateRatioMonitor(extras="grad_norm"), "use a list of grad_norm"),  # type: ignore[arg-type]
        (lambda: UpdateRatioMonitor(extras=["net_change"]), "pass pretrained='cpu' to the Trainer's DepthProfile"),
        (lambda: EqualStep(unit="tensor"), "unit='tensor' is unknown"),  # type: ignore[arg-type]
        (lambda: EqualStep(unit="group", groups={"x": "*.nothing"}), "matches no parameter"),
        (lambda: EqualStep(unit="matrix", target=[1.0, 2.0]), "2 numbers for 20 controlled layers"),
    ],
)
def test_bad_input_is_refused_before_the_first_step(callback: Callable[[], pl.Callback], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(seeded(TinyLM), [callback()])


def test_net_changes_without_a_trainer() -> None:
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)])
    weights = PretrainedWeights.of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    meter, rows = StepRatioMeter(extras=("net_change",), pretrained=weights), []
    with meter.attach(model, [optimizer], log=lambda row, step: rows.append(row)):
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(2, 8)).square().sum().backward()
            optimizer.step()
    net = weights.net_change(model, LayerStack.find(model))
    assert [rows[-1][f"update_ratio/net_change/L0{i}"] for i in range(3)] == pytest.approx(net, rel=1e-6)


@pytest.mark.parametrize("unit", ["matrix", "group"])
@pytest.mark.parametrize(("every", "passes"), [(1000, 8), (1, 11)])
def test_smaller_units_cost_the_same(unit: Any, every: int, passes: int) -> None:
    """Passes over the parameters or their copy, further memory in blocks of 1 MB, and one copy."""
    model = nn.Sequential(*[nn.Linear(700, 700) for _ in range(4)])
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    control = StepEqualizer(every=every, unit=unit, groups={"all": "*"} if unit == "group" else None)
    control.prepare(model, [optimizer])
    size = sum(p.nbytes for p in model.parameters())
    with Dispatched() as first:
        control.before_step(optimizer)
    assert sum(first.allocated) == size
    for _ in range(2):
        optimizer.step()
        control.after_step(optimizer)
        watched = [*model.parameters(), *control._steps._copies.values()]
        with Dispatched(watched) as before:
            control.before_step(optimizer)
        optimizer.step()
        with Dispatched(watched) as after:
            control.after_step(optimizer)
        assert max(after.allocated) <= 2**20
        assert passes - 0.1 < (before.traffic + after.traffic) / size <= passes
        control.before_step(optimizer)


def documented(kind: type) -> set[str]:
    return set(re.findall(r"^ {4}``([\w/]+)`` ", kind.__doc__ or "", re.M))


def test_every_logged_key_is_documented() -> None:
    matrix, group = "equal_step/matrix_spread/L00", {"update_ratio/L00", "update_ratio/spread"}
    cases: list[tuple[Any, Any, set[str], set[str]]] = [
        (EqualStep(), UpdateRatioMonitor(extras=EXTRAS), documented(EqualStep), documented(UpdateRatioMonitor)),
        (
            EqualStep(unit="matrix"),
            UpdateRatioMonitor(unit="group"),
            documented(EqualStep) - {matrix},
            group | {"update_ratio/matrix_spread/L00"},
        ),
    ]
    for control, monitor, *expected_keys in cases:
        rows = Rows()
        fit(seeded(TinyLM), [control, monitor, DepthProfile(pretrained="cpu", null_draws=1)], logger=rows)
        keys = {re.sub(r"/L\d\d(/.*)?$", r"/L00", key) for row in rows.rows for key in row}
        for name, expected_of in zip(("equal_step", "update_ratio"), expected_keys, strict=True):
            assert {key for key in keys if key.startswith(f"{name}/")} == expected_of
