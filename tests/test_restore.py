"""What single layers' changes are worth, beside models put together by hand, and without a trace."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from dispatched import Dispatched
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from support import TinyLM, fit, seeded
from torch import Tensor, nn

from depthcb import DepthProfile, depth_profile, restore_profile
from depthcb.pretrained import PretrainedWeights
from depthcb.rank_correlation import rank_correlation
from depthcb.report import print_bars, write_html
from depthcb.run import read_runs
from depthcb.worth import RestoreProfile


class Block(nn.Module):
    """A residual block with a buffer that its output depends on, and dropout."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(width, width), nn.BatchNorm1d(width), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.drop(torch.tanh(self.norm(self.linear(x))))
        return out


def pair(layers: int = 4) -> tuple[nn.Module, nn.Module]:
    """A model, and the same with other weights and statistics in all of its blocks, and another head."""
    torch.manual_seed(0)
    before = nn.Sequential(*[Block() for _ in range(layers)], nn.Linear(6, 1)).double()
    after = copy.deepcopy(before)
    with torch.no_grad():
        for tensor in [*after.parameters(), *after.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(0.3 * torch.rand_like(tensor))
    return before, after


BATCHES = list(torch.randn(3, 16, 6, generator=torch.Generator().manual_seed(1)).double())


def loss(model: nn.Module, x: Tensor) -> Tensor:
    value: Tensor = (model(x) - x[:, :1].sin()).square().mean()
    return value


def by_hand(base: nn.Module, donor: nn.Module, layers: list[int]) -> np.ndarray:
    """The losses of a copy of one model with the blocks of another."""
    mixed = copy.deepcopy(base).eval()
    for i in layers:
        mixed[i].load_state_dict(donor[i].state_dict())  # type: ignore[index]
    with torch.no_grad():
        return np.array([float(loss(mixed, batch)) for batch in BATCHES])


@pytest.mark.parametrize("kept", [lambda model: model, PretrainedWeights.of])
def test_losses_are_those_of_models_put_together_by_hand(kept: Callable[[nn.Module], Any]) -> None:
    before, after = pair()
    found = restore_profile(kept(before), after, BATCHES, loss, layers=["0", "1", "2", "3"])
    base, order = by_hand(after, before, []), range(4)
    none = copy.deepcopy(after)
    for i in order:
        none[i].load_state_dict(before[i].state_dict())  # type: ignore[index]
    bottom = by_hand(none, after, [])
    wanted = {
        "restored": [by_hand(after, before, [i]) - base for i in order],
        "restored_from_input": [by_hand(after, before, list(range(i + 1))) - base for i in order],
        "restored_from_output": [by_hand(after, before, list(range(i, 4))) - base for i in order],
        "transplanted": [by_hand(none, after, [i]) - bottom for i in order],
    }
    for name, differences in wanted.items():
        for estimate, each in zip(getattr(found, name), differences, strict=True):
            assert estimate.value == pytest.approx(each.mean(), rel=1e-12, abs=1e-15)
            ends = scipy.stats.t.interval(0.95, 2, each.mean(), each.std(ddof=1) / np.sqrt(3))
            assert (estimate.low, estimate.high) == pytest.approx(ends, rel=1e-9)
    assert (found.tuned_loss, found.pretrained_loss) == pytest.approx((base.mean(), bottom.mean()))
    assert RestoreProfile.from_json(found.to_json()) == found


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("call", [0, 8, 30])
def test_nothing_is_left_behind(error: type[BaseException] | None, call: int) -> None:
    before, after = pair()
    before.train()
    after[2].train(False)  # type: ignore[index]
    states = [{k: v.clone() for k, v in model.state_dict().items()} for model in (before, after)]
    flags = [[m.training for m in model.modules()] for model in (before, after)]
    random, calls = torch.get_rng_state(), [0]

    def stopping(model: nn.Module, x: Tensor) -> Tensor:
        calls[0] += 1
        if error is not None and calls[0] == call + 1:
            raise error("stop")
        return loss(model, x) + 0 * torch.rand(())

    if error is None:
        restore_profile(before, after, BATCHES, stopping)
    else:
        with pytest.raises(error, match="stop"):
            restore_profile(before, after, BATCHES, stopping)
    assert torch.equal(random, torch.get_rng_state())
    assert flags == [[m.training for m in model.modules()] for model in (before, after)]
    for state, model in zip(states, (before, after), strict=True):
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("after_copy", [0, 1, 2])
def test_an_exchange_that_is_interrupted_between_its_copies_is_settled(
    after_copy: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = pair()
    states = [{k: v.clone() for k, v in model.state_dict().items()} for model in (before, after)]
    exchange = restore_profile.__globals__["_Exchange"]
    swap, copies = exchange._swap, []

    def interrupted(self: Any, own: Tensor, other: Tensor) -> None:
        copies.append(0)
        if len(copies) == 5:
            if after_copy > 0:
                own.copy_(other)
            if after_copy > 1:
                other.copy_(self.state[1][2])
            raise KeyboardInterrupt
        swap(self, own, other)

    monkeypatch.setattr(exchange, "_swap", interrupted)
    with pytest.raises(KeyboardInterrupt):
        restore_profile(before, after, BATCHES, loss)
    for state, model in zip(states, (before, after), strict=True):
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, state[name]), name


def test_a_loss_draws_the_same_random_numbers_each_time() -> None:
    before, after = pair()
    noisy = restore_profile(before, after, BATCHES, lambda model, x: loss(model, x) + 100 * torch.rand(()).double())
    calm = restore_profile(before, after, BATCHES, loss)
    assert noisy.worth == pytest.approx(calm.worth, abs=1e-12)
    assert noisy.tuned_loss > calm.tuned_loss + 1


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.linear(x)
        return out


def test_a_large_worthless_change_and_a_small_decisive_one_are_told_apart() -> None:
    """The head reads feature 0 alone: layer 1 writes elsewhere, and much; layer 2 writes a little there."""
    torch.manual_seed(0)
    before = nn.Sequential(*[Residual() for _ in range(5)], nn.Linear(8, 1, bias=False))
    with torch.no_grad():
        for layer in before[:5]:
            layer.linear.weight.zero_()
        before[5].weight.copy_(torch.eye(8)[:1])
    after = copy.deepcopy(before)
    with torch.no_grad():
        after[1].linear.weight[4:, 4:] = 3 * torch.randn(4, 4)
        after[2].linear.weight[0, 1] = 0.2
    batches = [torch.randn(64, 8) for _ in range(8)]

    def error(model: nn.Module, x: Tensor) -> Tensor:
        value: Tensor = (model(x)[:, 0] - x[:, 0] - 0.2 * x[:, 1]).square().mean()
        return value

    layers = [str(i) for i in range(5)]
    found = restore_profile(before, after, batches, error, layers=layers)
    probe = torch.cat(batches)[:64]
    change = depth_profile(before, after, probe, layers=layers, measures=("relative_l2",))["relative_l2"].change
    own = [b - a for a, b in zip((0.0, *change), change, strict=False)]
    assert max(range(5), key=lambda i: own[i]) == 1
    assert max(range(5), key=lambda i: found.worth[i]) == 2
    assert found.restored[1].value == pytest.approx(0, abs=1e-12)
    assert found.restored[2].low > 0
    assert found.transplanted[2].high < 0


def test_memory_is_far_below_a_second_model() -> None:
    torch.manual_seed(0)
    before = nn.Sequential(*[nn.Linear(256, 256) for _ in range(12)])
    after = copy.deepcopy(before)
    size = sum(4 * p.numel() for p in after.parameters())
    with Dispatched() as counting:
        restore_profile(before, after, list(torch.randn(2, 8, 256)), lambda model, x: model(x).square().mean())
    assert counting.peak < 0.2 * size


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda a, b: (a, b, BATCHES[:1], loss), "1 batches: an interval needs at least 2"),
        (lambda a, b: (a[1:], b, BATCHES, loss), "The pretrained model has 3 layers, the tuned one 4"),
        (lambda a, b: (a.float(), b, BATCHES, loss), "0.linear.weight of shape .* needs a pretrained counterpart"),
        (lambda a, b: (PretrainedWeights({}), b, BATCHES, loss), "needs a pretrained counterpart and has none"),
        (
            lambda a, b: (a, b, BATCHES, lambda m, x: m(x).sum() * torch.nan),
            "the loss of batch 0 is nan with the tuned",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        restore_profile(*make(*pair()))


def test_its_rank_correlation_with_the_change_is_that_of_the_curves() -> None:
    before, after = pair(6)
    found = restore_profile(before, after, BATCHES, loss)
    profile = depth_profile(before, after, torch.cat(BATCHES))["cka"]
    assert found.rank_correlation(profile) == rank_correlation(profile.change, found.worth)


class Returning(TinyLM):
    """Returns its validation loss."""

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:  # type: ignore[override]
        value = self.loss(batch)
        self.log("val/loss", value)
        return value


def test_at_the_end_of_a_fit(tmp_path: Path) -> None:
    """Training is what it was; the callback, the record, the page and the terminal have what it found."""
    watch = DepthProfile(pretrained="cpu", worth=True, null_draws=1)
    plain, watched = seeded(Returning), seeded(Returning)
    before = copy.deepcopy(watched)
    fit(plain, [], val_check_interval=2)
    trainer = fit(watched, [watch], val_check_interval=2, logger=CSVLogger(tmp_path))
    for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(a, b)
    assert "val/loss" in trainer.callback_metrics
    assert watch.worth is not None
    assert watch.fixed_probe is not None
    wanted = restore_profile(before, watched, watch.fixed_probe.batches, lambda model, batch: model.loss(batch))
    assert watch.worth.worth == pytest.approx(wanted.worth, abs=1e-7)
    (run,) = read_runs(tmp_path)
    assert run.worth == watch.worth
    write_html([run], tmp_path / "page.html")
    assert "is worth to the loss" in (tmp_path / "page.html").read_text()
    file = io.StringIO()
    print_bars(run, Console(file=file, width=200))
    assert "is worth most" in file.getvalue()


def test_a_step_without_a_loss_is_refused_before_training() -> None:
    with pytest.raises(
        ValueError, match=r"TinyLM.validation_step returns NoneType, not a loss: return the loss from it"
    ):
        fit(seeded(TinyLM), [DepthProfile(pretrained="cpu", worth=True)], val_check_interval=2)
    with pytest.raises(ValueError, match=r"worth=True\) needs the pretrained weights"):
        DepthProfile(worth=True)
