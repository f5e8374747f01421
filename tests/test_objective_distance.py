"""The distance between objectives, compared to closed forms, finite differences and known properties."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy import linalg, stats
from support import TinyLM, seeded, texts
from torch import Tensor, nn

from depthcb import LayerStack, gradient_distance, objective_distance
from depthcb.gradient_distance import _gradient, procrustes_distance


class Scales(nn.Module):
    """Layers that add w_l . x, so that the gradient of a loss a . x is known."""

    def __init__(self, layers: int = 3, width: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, 1, bias=False) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x[:, i]) for i, layer in enumerate(self.layers)]).squeeze(2)


def linear(weight: Tensor) -> Any:
    """A loss whose gradient of layer l is the batch mean of weight_l * x_l."""
    return lambda model, x: (weight[:, None] * model(x)).sum(0).mean()


def batches(seed: int, count: int = 2, noise: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [1 + noise * torch.randn(6, 3, 4, generator=generator) for _ in range(count)]


def reference(u: np.ndarray, v: np.ndarray) -> float:
    """The distance by its definition, for (groups, n) gradients."""
    pairs = [(g, h) for g in range(len(u)) for h in range(len(u)) if g != h]
    across, within_u, within_v = (np.mean([x[g] @ y[h] for g, h in pairs]) for x, y in ((u, v), (u, u), (v, v)))
    return float(1 - across / np.sqrt(within_u * within_v))


def test_the_closed_form() -> None:
    model, data = Scales(), batches(1, 12)
    a, b = torch.tensor([1.0, 2.0, -1.0]), torch.tensor([0.5, -1.0, -3.0])
    found = objective_distance((model, linear(a)), (model, linear(b)), data, width=1e-9, most_batches=13)
    assert found.batches == 12
    means = np.stack([x.double().numpy().mean(axis=0) for x in data])
    means = means[:6] + means[6:]  # batch k is in group k mod 6
    u, v = (w.double().numpy()[:, None] * means for w in (a, b))
    flat_u, flat_v = u.reshape(6, -1), v.reshape(6, -1)
    assert found.overall == pytest.approx(reference(flat_u, flat_v), rel=1e-5)
    assert found.per_layer == pytest.approx([reference(u[:, i], v[:, i]) for i in range(3)], abs=1e-5)
    assert found.per_layer == pytest.approx([0, 2, 0], abs=1e-5), "one layer's gradients are parallel or opposite here"
    without = [reference(np.delete(flat_u, g, 0), np.delete(flat_v, g, 0)) for g in range(6)]
    half = stats.t.ppf(0.975, 5) * np.sqrt(5 / 6 * np.sum((np.array(without) - np.mean(without)) ** 2))
    assert found.interval == pytest.approx((found.overall - half, found.overall + half), rel=1e-4)


def test_the_same_objective_is_exactly_0() -> None:
    module = seeded(TinyLM)
    loss = lambda m, b: m.loss(b)  # noqa: E731
    found = objective_distance((module, loss), (module, loss), [batch(seed) for seed in range(6)])
    assert found.overall == 0
    assert found.interval == (0, 0)
    assert found.per_layer == (0,) * 4
    assert found.batches == 6


def test_batches_are_added_until_the_interval_is_narrow() -> None:
    model, a, b = Scales(), torch.ones(3), torch.tensor([1.0, 1.0, -1.0])
    read: list[int] = []

    def stream() -> Iterator[Tensor]:
        for seed in range(600):
            read.append(seed)
            yield batches(seed, 1, noise=2.0)[0]

    found = objective_distance((model, linear(a)), (model, linear(b)), stream(), width=0.3, most_batches=600)
    assert found.width < 0.3
    assert 6 < found.batches == len(read) < 600
    assert found.overall == pytest.approx(2 / 3, abs=0.2)
    assert str(found).endswith(f"after {found.batches} batches")
    most = objective_distance((model, linear(a)), (model, linear(b)), stream(), width=1e-6, most_batches=20)
    assert most.batches == 18
    assert most.width > 1e-6


@pytest.mark.slow
def test_the_interval_covers_the_truth() -> None:
    model, a, b = Scales(), torch.ones(3), torch.tensor([1.0, 1.0, -1.0])
    hits, runs = 0, 200
    for seed in range(runs):
        found = objective_distance((model, linear(a)), (model, linear(b)), batches(seed, 12), width=1e-9)
        hits += found.interval is not None and found.interval[0] <= 2 / 3 <= found.interval[1]
    assert 0.9 <= hits / runs <= 0.99


def test_gradients_in_bfloat16_give_the_same_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    module = seeded(WithHead)
    pretraining, new = (module, lambda m, b: m.loss(b)), (module, lambda m, b: m.label_loss(b))
    data = [batch(seed) for seed in range(6)]
    exact = objective_distance(pretraining, new, data)
    monkeypatch.setattr(gradient_distance, "MOST_MEMORY", 0)
    rounded = objective_distance(pretraining, new, data)
    assert rounded.overall != exact.overall
    assert rounded.overall == pytest.approx(exact.overall, abs=2e-3)
    assert rounded.per_layer == pytest.approx(exact.per_layer, abs=5e-3)


def batch(seed: int) -> dict[str, Tensor]:
    return {"input_ids": torch.stack([t["input_ids"] for t in texts(32, seed)])}


def test_the_scale_of_a_loss_is_no_distance() -> None:
    model, data = Scales(), batches(1, 6)
    a, b = torch.tensor([1.0, 2.0, -1.0]), torch.tensor([0.5, 1.0, 3.0])
    one, other = (objective_distance((model, linear(a)), (model, linear(k * b)), data).overall for k in (1.0, 1000.0))
    assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.slow
def test_batch_noise_does_not_pass_for_distance() -> None:
    """Two losses that differ by noise alone: the plain cosine distance is biased, this one is 0 on average."""
    model, found, plain = Scales(), [], []
    for seed in range(200):
        pairs = list(zip(batches(2 * seed, 6, noise=2.0), batches(2 * seed + 1, 6, noise=2.0), strict=True))
        one, other = (
            (lambda m, pair: linear(torch.ones(3))(m, pair[0])),
            (lambda m, pair: linear(torch.ones(3))(m, pair[1])),
        )
        result = objective_distance((model, one), (model, other), pairs)
        if result.overall is not None:
            found.append(result.overall)
        x, y = (torch.cat([pair[i] for pair in pairs]).mean(0).flatten() for i in (0, 1))
        plain.append(1 - float(torch.cosine_similarity(x, y, dim=0)))
    assert len(found) > 190
    assert abs(np.median(found)) < np.mean(plain) / 4
    assert np.mean(plain) > 0.05


def test_noise_that_hides_the_gradient_is_unresolved() -> None:
    model, weight = Scales(), torch.ones(3)
    data = [sign * b for b in batches(1, 3) for sign in (1, -1)]
    found = objective_distance((model, linear(weight)), (model, linear(weight)), data)
    assert found.overall is None
    assert found.interval is None
    assert found.per_layer == (None,) * 3
    assert str(found) == "objective distance unresolved after 6 batches"
    assert found.to_dict()["per_layer"] == [None] * 3


def test_a_gradient_by_finite_differences() -> None:
    """One weight of every layer, in float64."""
    module = seeded(TinyLM).double()
    stack, data, loss = LayerStack.find(module), batch(0), lambda m, b: m.loss(b)
    gradient = _gradient("pretraining", (module, loss), stack, data)
    module.eval()
    for layer, found in zip(stack.parameters(), gradient, strict=True):
        at = max(range(len(layer)), key=lambda i: found[i].abs().max())
        index = int(found[at].abs().argmax())
        entry, step, sides = layer[at].data.view(-1), 1e-5, []
        start = entry[index].item()
        for sign in (1, -1):
            entry[index] = start + sign * step
            with torch.no_grad():
                sides.append(float(module.loss(data)))
        entry[index] = start
        assert found[at].view(-1)[index].item() == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-6)


class WithHead(TinyLM):
    """The same network with two losses: next-token prediction, and binary classification with a new head."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 2)

    def label_loss(self, batch: dict[str, Tensor]) -> Tensor:
        hidden = self.model.transformer(batch["input_ids"]).last_hidden_state[:, -1]
        return nn.functional.cross_entropy(self.head(hidden), batch["input_ids"][:, 0] % 2)


def test_nothing_is_left_behind_and_frozen_layers_count() -> None:
    module = seeded(WithHead)
    module.model.transformer.h[1].requires_grad_(False)
    module.model.transformer.h[2].eval()
    flags, asked = [m.training for m in module.modules()], [p.requires_grad for p in module.parameters()]
    state, kept = torch.get_rng_state(), torch.ones(16, 48)
    module.model.transformer.h[0].attn.c_attn.weight.grad = kept
    pretraining, new = (module, lambda m, b: m.loss(b)), (module, lambda m, b: m.label_loss(b))
    data = [batch(0)] * 6
    found = objective_distance(pretraining, new, data)
    assert all(d is not None and 0.1 < d < 2 for d in found.per_layer)
    with pytest.raises(ValueError, match="new objective's loss is nan"):
        objective_distance(pretraining, (module, lambda m, b: m.loss(b) * float("nan")), data)
    assert [m.training for m in module.modules()] == flags
    assert [p.requires_grad for p in module.parameters()] == asked
    assert torch.equal(torch.get_rng_state(), state)
    assert module.model.transformer.h[0].attn.c_attn.weight.grad is kept
    assert sum(p.grad is not None for p in module.parameters()) == 1


@pytest.mark.parametrize(
    ("change", "count", "message"),
    [
        (lambda m: m, 5, "fewer than 6 batches: the objective distance needs more or smaller ones"),
        (lambda m: seeded(lambda: TinyLM(layers=3)), 6, "4 and 3 layers"),
        (lambda m: TinyLM(), 6, r"h\.0 has different weights.*before any step"),
    ],
)
def test_what_is_not_one_model_is_refused(change: Any, count: int, message: str) -> None:
    module, loss = seeded(TinyLM), lambda m, b: m.loss(b)
    with pytest.raises(ValueError, match=message):
        objective_distance((module, loss), (change(module), loss), [batch(0)] * count)


@pytest.mark.parametrize(("rows", "columns"), [(5, 3), (3, 7), (4, 4)])
def test_procrustes_is_scipys_best_rotation(rows: int, columns: int) -> None:
    random = np.random.default_rng(rows)
    u, v = ([random.normal(size=(rows, columns)), random.normal(size=(2, columns))] for _ in range(2))
    rotations = [linalg.orthogonal_procrustes(b, a)[0] for a, b in zip(u, v, strict=True)]
    turned = np.concatenate([(b @ r).ravel() for b, r in zip(v, rotations, strict=True)])
    whole = np.concatenate([a.ravel() for a in u])
    expected = 1 - whole @ turned / (np.linalg.norm(whole) * np.linalg.norm(turned))
    parts = [[torch.tensor(m) for m in side] + [torch.full((columns,), 9.0)] for side in (u, v)]  # vectors are left out
    assert procrustes_distance(*parts) == pytest.approx(expected, abs=1e-12)
    turn = torch.linalg.qr(torch.randn(columns, columns, dtype=torch.float64, generator=torch.Generator()))[0]
    assert procrustes_distance(parts[0], [x @ turn if x.ndim > 1 else x for x in parts[0]]) == pytest.approx(
        0, abs=1e-12
    )
    assert procrustes_distance(parts[0], [torch.zeros_like(x) for x in parts[0]]) is None


def test_procrustes_is_that_of_the_mean_gradients_matrix_by_matrix() -> None:
    model = seeded(lambda: nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)]))
    losses = (lambda m, x: m(x).square().mean(), lambda m, x: m(x).exp().mean())
    data = [torch.randn(8, 4, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    found = objective_distance((model, losses[0]), (model, losses[1]), data, procrustes=True)
    u, v = ([sum(gradients(loss, model, x, i) for x in data) for i in range(3)] for loss in losses)
    scales = [linalg.orthogonal_procrustes(a, b)[1] for a, b in zip(u, v, strict=True)]
    squares = [[float((g**2).sum()) for g in side] for side in (u, v)]
    expected = [1 - s / np.sqrt(a * b) for s, a, b in zip(scales, *squares, strict=True)]
    assert found.per_layer_procrustes_uncorrected == pytest.approx(expected, abs=1e-5)
    overall = 1 - sum(scales) / np.sqrt(sum(squares[0]) * sum(squares[1]))
    assert found.procrustes_uncorrected == pytest.approx(overall, abs=1e-5)
    assert found.overall is not None
    assert found.procrustes_uncorrected < found.overall, "rotations only bring gradients closer"
    plain = objective_distance((model, losses[0]), (model, losses[1]), data)
    assert plain.procrustes_uncorrected is None
    assert plain.per_layer == found.per_layer


def gradients(loss: Any, model: nn.Module, x: Tensor, layer: int) -> np.ndarray:
    found = torch.autograd.grad(loss(model, x), model[layer].weight)[0]  # type: ignore[index]
    return found.double().numpy()


def test_procrustes_is_not_corrected_for_noise_and_says_so() -> None:
    """Pure noise on both sides: the cosine's mean is 0, but some rotation always aligns part of the noise."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.randn(12, 8, generator=generator) for _ in range(2))
    assert procrustes_distance([u], [v]) < 0.7  # type: ignore[operator]
    assert "procrustes_uncorrected" in gradient_distance.ObjectiveDistance.__dataclass_fields__
