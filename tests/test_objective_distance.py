"""The distance between objectives, compared to closed forms, finite differences and known properties."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support import TinyLM, seeded, texts
from torch import Tensor, nn

from depthcb import LayerStack, objective_distance
from depthcb.gradient_distance import _gradient


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


def test_the_closed_form() -> None:
    model, halves = Scales(), (batches(1), batches(2))
    a, b = torch.tensor([1.0, 2.0, -1.0]), torch.tensor([0.5, -1.0, -3.0])
    found = objective_distance((model, linear(a)), (model, linear(b)), halves)
    means = [torch.cat(half).double().numpy().mean(axis=0) for half in halves]
    u, v = ([w.double().numpy()[:, None] * m for m in means] for w in (a, b))

    def distance(at: Any) -> float:
        across = ((u[0][at] * v[1][at]).sum() + (u[1][at] * v[0][at]).sum()) / 2
        return float(1 - across / np.sqrt((u[0][at] * u[1][at]).sum() * (v[0][at] * v[1][at]).sum()))

    assert found.overall == pytest.approx(distance(slice(None)), rel=1e-6)
    assert found.per_layer == pytest.approx([distance(i) for i in range(3)], abs=1e-6)
    assert found.per_layer == pytest.approx([0, 2, 0], abs=1e-6), "one layer's gradients are parallel or opposite here"


def test_the_same_objective_on_the_same_batches_is_exactly_0() -> None:
    module = seeded(TinyLM)
    loss = lambda m, b: m.loss(b)  # noqa: E731
    halves = ([batch(0)], [batch(1)])
    found = objective_distance((module, loss), (module, loss), halves, ([batch(2)], [batch(3)]))
    assert found.overall == 0
    assert found.per_layer == (0,) * 4
    assert found.self_overall is None or found.self_overall != 0


def batch(seed: int) -> dict[str, Tensor]:
    return {"input_ids": torch.stack([t["input_ids"] for t in texts(32, seed)])}


def test_the_scale_of_a_loss_is_no_distance() -> None:
    model, halves = Scales(), (batches(1), batches(2))
    a, b = torch.tensor([1.0, 2.0, -1.0]), torch.tensor([0.5, 1.0, 3.0])
    one, other = (objective_distance((model, linear(a)), (model, linear(k * b)), halves).overall for k in (1.0, 1000.0))
    assert one == pytest.approx(other, rel=1e-6)


def test_batch_noise_does_not_pass_for_distance() -> None:
    """Two equal objectives on different samples: the plain cosine distance is biased, this one is 0 on average."""
    model, weight = Scales(), torch.ones(3)
    found, plain = [], []
    for seed in range(200):
        halves = batches(4 * seed, 1, noise=2.5), batches(4 * seed + 1, 1, noise=2.5)
        others = batches(4 * seed + 2, 1, noise=2.5), batches(4 * seed + 3, 1, noise=2.5)
        result = objective_distance((model, linear(weight)), (model, linear(weight)), halves, others)
        if result.self_overall is not None:
            found.append(result.self_overall)
        x, y = (torch.cat([torch.cat(h) for h in pair]).mean(0).flatten() for pair in (halves, others))
        plain.append(1 - float(torch.cosine_similarity(x, y, dim=0)))
    error = np.std(found) / np.sqrt(len(found))
    assert len(found) > 150
    assert abs(np.median(found)) < 4 * error
    assert np.mean(plain) > 0.2


def test_noise_that_hides_the_gradient_is_unresolved() -> None:
    model, weight = Scales(), torch.ones(3)
    opposite = [-b for b in batches(1)]
    found = objective_distance((model, linear(weight)), (model, linear(weight)), (batches(1), opposite))
    assert found.overall is None
    assert found.per_layer == (None,) * 3
    assert str(found) == "objective distance unresolved"
    assert found.to_dict()["per_layer"] == [None] * 3


def test_a_gradient_by_finite_differences() -> None:
    """One weight of every layer, in float64."""
    module = seeded(TinyLM).double()
    stack, data, loss = LayerStack.find(module), [batch(0), batch(1)], lambda m, b: m.loss(b)
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
                sides.append(float(sum(module.loss(b) for b in data)) / 2)
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
    found = objective_distance(pretraining, new, ([batch(0)], [batch(0)]))
    assert all(d is not None and 0.1 < d < 2 for d in found.per_layer)
    with pytest.raises(ValueError, match="new objective's loss is nan"):
        objective_distance(pretraining, (module, lambda m, b: m.loss(b) * float("nan")), ([batch(0)], [batch(0)]))
    assert [m.training for m in module.modules()] == flags
    assert [p.requires_grad for p in module.parameters()] == asked
    assert torch.equal(torch.get_rng_state(), state)
    assert module.model.transformer.h[0].attn.c_attn.weight.grad is kept
    assert sum(p.grad is not None for p in module.parameters()) == 1


@pytest.mark.parametrize(
    ("change", "halves", "message"),
    [
        (lambda m: m, ([], [batch(0)]), "at least one batch"),
        (lambda m: seeded(lambda: TinyLM(layers=3)), ([batch(0)], [batch(0)]), "4 and 3 layers"),
        (lambda m: TinyLM(), ([batch(0)], [batch(0)]), r"h\.0 has different weights.*before any step"),
    ],
)
def test_what_is_not_one_model_is_refused(change: Any, halves: Any, message: str) -> None:
    module, loss = seeded(TinyLM), lambda m, b: m.loss(b)
    with pytest.raises(ValueError, match=message):
        objective_distance((module, loss), (change(module), loss), halves)
