"""Adapters from peft: the monitor measures the effective weights, and EqualStep rejects adapters."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from support import Edges, Rows, TinyLM, fit, seeded
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from depthcb import DepthProfile, EqualStep, LayerStack, UpdateRatioMonitor

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*")  # peft on transformers 5.23


class Adapted(TinyLM):
    """TinyLM with adapters on its fused attention weights; B is initialised to zero."""

    def __init__(self) -> None:
        super().__init__(lambda p: torch.optim.AdamW([q for q in p if q.requires_grad], lr=1e-2))
        config = LoraConfig(r=2, lora_alpha=8, target_modules=["c_attn"], fan_in_fan_out=True)
        self.model = get_peft_model(self.model, config)


def effective(module: pl.LightningModule) -> list[np.ndarray]:
    """W0 + alpha / r (B A)^T of each layer in float64."""
    found = []
    for layer in LayerStack.find(module).modules:
        adapted: Any = layer.attn.c_attn  # type: ignore[union-attr]
        a, b, w = (
            t.detach().double().numpy()
            for t in (adapted.lora_A.default.weight, adapted.lora_B.default.weight, adapted.base_layer.weight)
        )
        found.append(w + 8 / 2 * (b @ a).T)
    return found


def test_the_monitor_reports_the_effective_weight() -> None:
    rows, edges, watch = Rows(), Edges(effective), DepthProfile()
    fit(seeded(Adapted), [edges, UpdateRatioMonitor(), watch], logger=rows)
    assert np.array(rows.column("update_ratio/L")) == pytest.approx(edges.ratios(), rel=1e-4)
    assert watch.profiles[-1].mean > 0


def test_adapters_have_a_ratio_by_group_but_not_by_matrix_and_no_extras() -> None:
    rows, edges = Rows(), Edges(effective)
    fit(seeded(Adapted), [edges, UpdateRatioMonitor(unit="group")], logger=rows)
    assert {key for row in rows.rows for key in row if "/L" in key} == {
        f"update_ratio/L0{i}/attention" for i in range(4)
    }
    assert np.array(rows.column("update_ratio/L")) == pytest.approx(edges.ratios(), rel=1e-4)
    for monitor, message in (
        (UpdateRatioMonitor(unit="matrix"), r"h\.0/attn\.c_attn\.base_layer\.weight and .*use a larger unit="),
        (UpdateRatioMonitor(extras=["grad_norm"]), "extras are not supported for adapters"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(seeded(Adapted), [monitor])


def test_adapted_weights_count_while_another_adapter_trains() -> None:
    """The second adapter leaves one of the two adapted weights as it is, which still counts in the layer's norm."""

    class Two(TinyLM):
        def __init__(self) -> None:
            super().__init__(lambda p: torch.optim.AdamW([q for q in p if q.requires_grad], lr=1e-2))
            first = LoraConfig(r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
            self.model = get_peft_model(self.model, first)
            self.model.add_adapter("b", LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
            self.model.set_adapter("b")

    def merged(module: pl.LightningModule) -> list[np.ndarray]:
        model: Any = copy.deepcopy(module.model).merge_and_unload()  # type: ignore[operator, union-attr]
        pairs = [(layer.attn.c_attn.weight, layer.mlp.c_fc.weight) for layer in model.transformer.h]
        return [np.concatenate([w.detach().double().numpy().ravel() for w in pair]) for pair in pairs]

    rows, edges = Rows(), Edges(merged)
    fit(seeded(Two), [edges, UpdateRatioMonitor()], logger=rows)
    assert np.array(rows.column("update_ratio/L")) == pytest.approx(edges.ratios(), rel=1e-4)


class Dropping(Adapted):
    """The same with dropout before the adapters."""

    def __init__(self) -> None:
        super().__init__()
        for layer in LayerStack.find(self).modules:
            layer.attn.c_attn.lora_dropout["default"] = torch.nn.Dropout(0.1)  # type: ignore[union-attr, index]


def test_watching_adapters_is_silent() -> None:
    watch = DepthProfile()
    watched, bare = fit(seeded(Dropping), [watch, UpdateRatioMonitor()]), fit(seeded(Dropping), [])
    states = [[t.lightning_module.state_dict(), t.optimizers[0].state_dict()] for t in (watched, bare)]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert watch.profiles[-1].mean > 0


def test_the_control_refuses_adapters() -> None:
    with pytest.raises(ValueError, match=r"layer .*h\.0 trains adapters.*UpdateRatioMonitor"):
        fit(seeded(Adapted), [EqualStep()])


def test_sharded_adapters_are_refused() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        module = seeded(Adapted)
        layer: Any = LayerStack.find(module).modules[0]
        whole = layer.ln_1.weight.detach()
        layer.ln_1.weight = torch.nn.Parameter(distribute_tensor(whole, init_device_mesh("cpu", (1,)), [Shard(0)]))
        with pytest.raises(ValueError, match="adapters on sharded parameters"):
            UpdateRatioMonitor().on_fit_start(pl.Trainer(logger=False, accelerator="cpu"), module)
    finally:
        dist.destroy_process_group()
