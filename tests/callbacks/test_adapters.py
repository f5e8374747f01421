"""Adapters through peft: the monitor sees the weights that adapters make, the control refuses them."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.distributed as dist
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, PeftConfig, get_peft_model
from support import Rows, TinyLM, fit, seeded
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from depthcb import DepthProfile, EqualStep, LayerStack, UpdateRatioMonitor
from depthcb.adapters import adapted_modules, effective_weights

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*")  # peft on transformers 5.23


class Adapted(TinyLM):
    """TinyLM with adapters on its fused attention weights; B starts at zero."""

    def __init__(self) -> None:
        super().__init__(lambda p: torch.optim.AdamW([q for q in p if q.requires_grad], lr=1e-2))
        config = LoraConfig(r=2, lora_alpha=8, target_modules=["c_attn"], fan_in_fan_out=True)
        self.model = get_peft_model(self.model, config)


def effective(module: pl.LightningModule) -> list[np.ndarray]:
    """W0 + alpha / r (B A)^T of each layer in float64, written out."""
    found = []
    for layer in LayerStack.find(module).modules:
        adapted: Any = layer.attn.c_attn  # type: ignore[union-attr]
        a, b, w = (
            t.detach().double().numpy()
            for t in (adapted.lora_A.default.weight, adapted.lora_B.default.weight, adapted.base_layer.weight)
        )
        found.append(w + 8 / 2 * (b @ a).T)
    return found


class Edges(pl.Callback):
    """Weights at the edges of every batch."""

    def __init__(self) -> None:
        self.weights: list[list[np.ndarray]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: pl.LightningModule, *_: Any) -> None:
        self.weights.append(effective(pl_module))


def test_the_monitor_reports_the_effective_weight() -> None:
    module, rows, edges, watch = seeded(Adapted), Rows(), Edges(), DepthProfile()
    fit(module, [edges, UpdateRatioMonitor(), watch], logger=rows)
    edges.weights.append(effective(module))
    expected = [
        [np.linalg.norm(b - a) / np.linalg.norm(a) for a, b in zip(start, end, strict=True)]
        for start, end in zip(edges.weights, edges.weights[1:], strict=False)
    ]
    assert np.array(rows.column("update_ratio/L")) == pytest.approx(np.array(expected), rel=1e-4)
    assert watch.profiles[-1].mean > 0


def test_the_control_refuses_adapters() -> None:
    with pytest.raises(ValueError, match=r"layer .*h\.0 trains adapters.*UpdateRatioMonitor"):
        fit(seeded(Adapted), [EqualStep()])


def test_adapters_in_pieces_are_refused() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        module = seeded(Adapted)
        layer: Any = LayerStack.find(module).modules[0]
        whole = layer.ln_1.weight.detach()
        layer.ln_1.weight = torch.nn.Parameter(distribute_tensor(whole, init_device_mesh("cpu", (1,)), [Shard(0)]))
        with pytest.raises(ValueError, match="adapters on parameters in pieces"):
            UpdateRatioMonitor().on_fit_start(pl.Trainer(logger=False, accelerator="cpu"), module)
    finally:
        dist.destroy_process_group()


def adapted(config: PeftConfig, dtype: torch.dtype = torch.float32) -> tuple[Any, Tensor]:
    """A linear map whose adapters have been trained, so to speak, and the weight under them."""
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(8, 6)).to(dtype), config)  # type: ignore[arg-type]
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape)
    (module,) = adapted_modules(model)
    return module.eval(), module.get_base_layer().weight.detach().clone()


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["0"]),
        LoraConfig(r=2, target_modules=["0"], use_dora=True),
        LoHaConfig(r=2, target_modules=["0"]),
        LoKrConfig(r=2, target_modules=["0"]),
        OFTConfig(oft_block_size=4, target_modules=["0"]),
        IA3Config(target_modules=["0"], feedforward_modules=[]),
    ],
    ids=["lora", "dora", "loha", "lokr", "oft", "ia3"],
)
@torch.no_grad()
def test_the_effective_weight_is_what_the_module_multiplies_with(config: PeftConfig) -> None:
    module, base = adapted(config)
    # IA3 scales the bias as well: what 0 gives is not the bias alone.
    multiplies = (module(torch.eye(8)) - module(torch.zeros(8, 8))).T
    (found,) = effective_weights(module)
    torch.testing.assert_close(found, multiplies, rtol=1e-4, atol=1e-5)
    assert (found - base).norm() > 0.1 * base.norm()
    assert torch.equal(module.get_base_layer().weight, base), "measuring changed the weight"


@torch.no_grad()
def test_a_small_update_of_half_precision_weights_is_not_rounded_away() -> None:
    module, base = adapted(LoraConfig(r=2, target_modules=["0"]), torch.bfloat16)
    a, b = module.lora_A.default.weight, module.lora_B.default.weight
    b.data *= 1e-4
    (found,) = effective_weights(module)
    change = found.double() - base.double()
    expected = module.scaling["default"] * b.double() @ a.double()
    assert float((change - expected).norm() / expected.norm()) < 0.05


def test_what_cannot_be_measured_is_refused_before_training() -> None:
    module, base = adapted(LoraConfig(r=2, target_modules=["0"]))
    module.get_base_layer().weight = nn.Parameter(base.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"weight under Linear is quantised.*unquantised"):
        effective_weights(module)
