"""Weight decay and net change under EqualStep, against float64 references."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from support import Judge, TinyLM, fit, logged, seeded
from torch import nn

from depthcb import DepthProfile, EqualStep
from depthcb.engine.equalizer import StepEqualizer

LR, DECAY = 2e-2, 0.5
BATCH = {"input_ids": torch.randint(1, 61, (16, 12), generator=torch.Generator().manual_seed(0))}


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=LR, weight_decay=DECAY)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=LR, weight_decay=DECAY)


class Matrices(nn.Module):
    """Three matrices, the only parameters that Muon takes; the last has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:2]:
            x = torch.tanh(layer(x))
        return (0 * self.layers[2].weight).sum() + x.square().sum()


@pytest.mark.parametrize("name", ["AdamW", "Muon", "Adam, decoupled"])
def test_outside_decay_is_left_alone_and_the_rest_is_equal(name: str) -> None:
    torch.manual_seed(0)
    model = Matrices()
    optimizer = {
        "AdamW": lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=DECAY),
        "Muon": lambda p: torch.optim.Muon(p, lr=LR, weight_decay=DECAY),
        "Adam, decoupled": lambda p: torch.optim.Adam(p, lr=LR, weight_decay=DECAY, decoupled_weight_decay=True),
    }[name](model.parameters())
    control = StepEqualizer(decay="outside")
    with control.attach(model, [optimizer]):
        for step in range(5):
            optimizer.zero_grad()
            model(torch.randn(4, 8, generator=torch.Generator().manual_seed(step))).backward()
            before = [p.detach().double().numpy().copy() for p in model.parameters()]
            optimizer.step()
            after = [p.detach().double().numpy() for p in model.parameters()]
            rests = [a - (1 - LR * DECAY) * b for a, b in zip(after, before, strict=True)]
            ratios = [np.linalg.norm(r) / np.linalg.norm(b) for r, b in zip(rests, before, strict=True)]
            assert ratios[0] == pytest.approx(ratios[1], rel=1e-4)
            assert ratios[2] < 1e-7, "a layer without a gradient only decays, at the optimizer's own rate"


def test_inside_decay_moves_a_layer_without_a_gradient_as_far_as_the_others() -> None:
    norms = {}
    for decay in ("inside", "outside"):
        torch.manual_seed(0)
        model = Matrices()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
        start = model.layers[2].weight.norm().item()
        with warnings.catch_warnings(action="ignore"), StepEqualizer(decay=decay).attach(model, [optimizer]):  # type: ignore[arg-type]
            for step in range(100):
                optimizer.zero_grad()
                model(torch.randn(4, 8, generator=torch.Generator().manual_seed(step))).backward()
                optimizer.step()
        norms[decay] = model.layers[2].weight.norm().item() / start
    assert norms["outside"] == pytest.approx((1 - 1e-3 * 0.01) ** 100, rel=1e-4)
    assert norms["inside"] < 0.97


def test_a_step_that_mostly_decays_is_told_once() -> None:
    torch.manual_seed(0)
    model = Matrices()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    with warnings.catch_warnings(record=True) as found, StepEqualizer().attach(model, [optimizer]):
        warnings.simplefilter("always")
        for step in range(3):
            optimizer.zero_grad()
            model(torch.randn(4, 8, generator=torch.Generator().manual_seed(step))).backward()
            optimizer.step()
    told = [str(w.message) for w in found if "layers.2 (1.00)" in str(w.message)]
    assert len(told) == 1
    assert "mostly shrinks layer" in told[0]
    assert "use decay='outside' with AdamW or Muon" in told[0]


@pytest.mark.parametrize("lr", [2e-3, 1e-6, 1e-8])
def test_ordinary_steps_are_not_warned_about(lr: float, recwarn: pytest.WarningsRecorder) -> None:
    """Also where a step is so small that the norms before and after it are hardly told apart."""
    fit(seeded(lambda: TinyLM(lambda p: torch.optim.AdamW(p, lr=lr))), [EqualStep()])
    assert not [w for w in recwarn if "mostly shrinks" in str(w.message)]


@pytest.mark.parametrize("optimizer", [adam, lambda p: torch.optim.SGD(p, lr=LR, weight_decay=DECAY)])
def test_coupled_decay_cannot_be_left_outside(optimizer: Callable[[Any], torch.optim.Optimizer]) -> None:
    with pytest.raises(ValueError, match=r"decay='outside' is not supported for (Adam|SGD), whose weight decay"):
        fit(seeded(lambda: TinyLM(optimizer)), [EqualStep(decay="outside")])
    with pytest.raises(ValueError, match="decay='half' is unknown: use 'inside' or 'outside'"):
        EqualStep(decay="half")  # type: ignore[arg-type]


def test_in_a_trainer_the_realised_ratio_is_that_of_the_rest(tmp_path: Path) -> None:
    judge, logger = Judge(), CSVLogger(tmp_path)
    fit(seeded(lambda: TinyLM(adamw)), [EqualStep(decay="outside"), judge], logger=logger)
    rows = [row for row in logged(logger) if "equal_step/target" in row]
    assert len(rows) == 4
    for row, before, after in zip(rows, judge.before, judge.after, strict=True):
        for i, (b, a) in enumerate(zip(before, after, strict=True)):
            rest = np.linalg.norm(a - (1 - LR * DECAY) * b) / np.linalg.norm((1 - LR * DECAY) * b)
            assert row[f"equal_step/realised/L{i:02d}"] == pytest.approx(rest, rel=1e-4)
            assert rest == pytest.approx(row["equal_step/target"], rel=1e-3)


def test_the_net_spread_is_logged_beside_kept_weights(tmp_path: Path) -> None:
    module = seeded(lambda: TinyLM(adamw))
    start = [torch.cat([p.detach().flatten() for p in b.parameters()]).double() for b in module.model.transformer.h]
    logger = CSVLogger(tmp_path)
    watch = DepthProfile(BATCH, pretrained="cpu", null_draws=1)
    fit(module, [watch, EqualStep()], logger=logger)
    rows = [row["equal_step/net_spread"] for row in logged(logger) if "equal_step/net_spread" in row]
    end = [torch.cat([p.detach().flatten() for p in b.parameters()]).double() for b in module.model.transformer.h]
    nets = [float((b - a).norm() / a.norm()) for a, b in zip(start, end, strict=True)]
    assert rows[-1] == pytest.approx(max(nets) / min(nets), rel=1e-5)
    fit(seeded(lambda: TinyLM(adamw)), [DepthProfile(BATCH), EqualStep()], logger=CSVLogger(tmp_path / "none"))
    assert "net_spread" not in (tmp_path / "none" / "lightning_logs" / "version_0" / "metrics.csv").read_text()
