"""What a forward changes besides weights and buffers is put back after the probe."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from typing import Any

import pytest
import torch
import torchmetrics
from torch import Tensor, nn

from depthcb import depth_profile


class Stateful(nn.Module):
    """Counts, caches, collects and updates a metric in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*[nn.Linear(6, 6) for _ in range(3)])
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(2))
        self.metric, self.outputs_metric = torchmetrics.MeanMetric(), torchmetrics.CatMetric()
        self.calls, self.names, self.recent = 0, Counter[str](), deque[int](maxlen=2)
        self.outputs: list[Tensor] = []
        self.cache: dict[str, Any] = {"sizes": [4], "by": defaultdict(list)}
        self.running, self.kinds = torch.zeros(3), {"float"}

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen += 1
        self.replaced = self.replaced + 1
        self.running += x.shape[0]
        self.names["forward"] += 1
        self.kinds.add(str(x.dtype))
        self.recent.append(self.calls)
        self.cache["sizes"].append(len(x))
        self.cache["by"][len(x)].append(x)
        self.cache["last"] = self.last = x
        self.metric.update(x.mean())
        self.outputs_metric.update(x[:1, 0])
        y: Tensor = self.blocks(x)
        self.outputs.append(y)
        return y


def state(model: Stateful) -> dict[str, Any]:
    tensors = {"seen": model.seen, "replaced": model.replaced, "running": model.running}
    plain = {
        "calls": model.calls, "names": dict(model.names), "recent": list(model.recent), "outputs": len(model.outputs),
        "sizes": list(model.cache["sizes"]), "by": {k: len(v) for k, v in model.cache["by"].items()},
        "keys": sorted(model.cache), "kinds": sorted(model.kinds), "last": hasattr(model, "last"),
        "cat": len(model.outputs_metric.value), "mean": model.metric.mean_value.item(), "count": model.metric.weight.item(),
        "updates": model.metric._update_count,
    }  # fmt: skip
    return plain | {name: value.tolist() for name, value in tensors.items()}


@pytest.mark.parametrize("used", [False, True])
def test_attributes_metrics_and_buffers_are_put_back(used: bool) -> None:
    model = Stateful()
    if used:
        model(torch.randn(5, 6))
    before, held = state(model), [model.outputs, model.cache, model.names, model.running, model.seen, model.replaced]
    depth_profile(model, model, torch.randn(16, 6))
    assert state(model) == before
    now = [model.outputs, model.cache, model.names, model.running, model.seen, model.replaced]
    assert all(a is b for a, b in zip(held, now, strict=True)), "others may hold these objects"


def test_a_lazy_module_keeps_the_weights_that_it_got() -> None:
    model = nn.Sequential(nn.LazyLinear(6), nn.Linear(6, 6), nn.Linear(6, 6))
    depth_profile(model, model, torch.randn(16, 4), layers=["0", "1", "2"])
    assert model[0].in_features == 4
    assert type(model[0]) is nn.Linear
