"""Complex weights crashed in mid-training; weight norm was "equal" in (g, v) but not in the weight; frozen experts counted."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import transformers as hf
from lightning.pytorch.callbacks import BackboneFinetuning
from peft import LoraConfig, get_peft_model
from support import Edges, Rows, fit
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.data import DataLoader, TensorDataset

from depthcb import DepthProfile, EqualStep, UpdateRatioMonitor


class Lit(pl.LightningModule):
    def __init__(self, make: Callable[[], nn.Module], optimizer: Any = torch.optim.SGD) -> None:
        super().__init__()
        self.backbone, self.optimizer = nn.Sequential(*[make() for _ in range(4)]), optimizer
        self.head = nn.Linear(8, 8)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = (self.head(self.backbone(batch[0])) - 1).square().mean()
        return loss

    def configure_optimizers(self) -> Any:
        return self.optimizer([p for p in self.parameters() if p.requires_grad], lr=0.05)


class Spectral(nn.Module):
    """A layer of a Fourier neural operator, with complex and real weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, dtype=torch.cfloat) * torch.rand(1))
        self.skip = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(x) * self.weight, n=8) + self.skip(x)


def data() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(32, 8, generator=torch.Generator().manual_seed(0))), batch_size=8)


def parameters(module: Any) -> list[np.ndarray]:
    return [
        np.concatenate([p.detach().numpy().astype(np.complex128).ravel() for p in layer.parameters()])
        for layer in module.backbone
    ]


def made(module: Any) -> list[np.ndarray]:
    """The weights that the layers multiply with, found by multiplying with the identity."""
    eye = torch.eye(8)
    module.backbone.eval()  # spectral norm updates its estimate in training mode
    with torch.no_grad():
        found = [(layer(eye) - layer(0 * eye)).double().numpy().ravel() for layer in module.backbone]
    module.backbone.train()
    return found


def run(module: pl.LightningModule, edges: Edges, *callbacks: pl.Callback, **options: Any) -> np.ndarray:
    fit(module, [edges, *callbacks], (data(), None), **{"max_steps": -1, "max_epochs": 1} | options)
    return edges.ratios()


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_complex_weights(optimizer: Any) -> None:
    torch.manual_seed(0)
    rows, monitor = Rows(), UpdateRatioMonitor("backbone", name="raw_ratio")
    ratios = run(Lit(Spectral, optimizer), Edges(parameters), monitor, EqualStep("backbone"), logger=rows)
    assert len(ratios) == 4
    assert ratios.max(axis=1) == pytest.approx(ratios.min(axis=1), rel=1e-4)
    raw = np.array(rows.column("raw_ratio/L"))
    assert raw.max() > 1.05 * raw.min(), "a weak test"
    assert ratios == pytest.approx(np.repeat(raw.mean(axis=1, keepdims=True), 4, axis=1), rel=1e-4)


class Doubled(nn.Module):
    """A parametrization of one's own: W = A A."""

    def forward(self, a: Tensor) -> Tensor:
        return a @ a


def own(layer: nn.Linear) -> nn.Module:
    return parametrize.register_parametrization(layer, "weight", Doubled())


KINDS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "own": own,
    "old weight norm": torch.nn.utils.weight_norm,
    "old spectral norm": torch.nn.utils.spectral_norm,
}
old = pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated.*")


@old
@pytest.mark.parametrize("kind", KINDS)
def test_the_monitor_judges_the_weight_that_is_made(kind: str) -> None:
    torch.manual_seed(0)
    rows, edges = Rows(), Edges(made)
    module = Lit(lambda: KINDS[kind](nn.Linear(8, 8, bias=False)))
    for i, layer in enumerate(module.backbone):
        if kind == "weight norm":
            layer.parametrizations.weight.original1.data *= 10.0**i  # type: ignore[union-attr]  # W stays the same
    ratios = run(module, edges, UpdateRatioMonitor("backbone"), logger=rows)
    assert ratios.min() > 0
    assert np.array(rows.column("update_ratio/L")) == pytest.approx(ratios, rel=2e-3)


@old
@pytest.mark.parametrize("kind", KINDS)
def test_the_monitor_is_silent(kind: str) -> None:
    states = []
    for callbacks in ([], [UpdateRatioMonitor("backbone")]):
        torch.manual_seed(0)
        module = Lit(lambda: KINDS[kind](nn.Linear(8, 8)))
        fit(module, callbacks, (data(), None))
        states.append(module.state_dict())
    torch.testing.assert_close(*states, rtol=0, atol=0)


@old
@pytest.mark.parametrize(
    ("kind", "message", "remove"),
    [
        ("weight norm", r"WeightNorm", parametrize.remove_parametrizations),
        ("own", r"Doubled", parametrize.remove_parametrizations),
        ("old weight norm", r"weight_norm", lambda layer, _: torch.nn.utils.remove_weight_norm(layer)),
        ("old spectral norm", r"spectral_norm", lambda layer, _: torch.nn.utils.remove_spectral_norm(layer)),
    ],
)
def test_the_control_refuses_made_weights_and_the_remedy_works(kind: str, message: str, remove: Any) -> None:
    torch.manual_seed(0)
    module = Lit(lambda: KINDS[kind](nn.Linear(8, 8)))
    with pytest.raises(
        ValueError, match=rf"layer backbone\.0 trains .*\({message}\).*remove.*or use UpdateRatioMonitor"
    ):
        fit(module, [EqualStep("backbone")], (data(), None))
    for _ in range(20):  # spectral norm needs some forwards for its estimate
        module.backbone(torch.eye(8))
    for layer in module.backbone:
        remove(layer, "weight")
    edges = Edges(parameters)
    ratios = run(module, edges, EqualStep("backbone"))
    assert ratios.max(axis=1) == pytest.approx(ratios.min(axis=1), rel=1e-4)


def test_made_weights_that_are_unfrozen_later_are_refused_then() -> None:
    torch.manual_seed(0)
    module = Lit(lambda: parametrizations.weight_norm(nn.Linear(8, 8)))
    with pytest.raises(ValueError, match=r"layer backbone\.0 trains parametrizations"):
        run(module, Edges(made), BackboneFinetuning(1), EqualStep("backbone"), max_epochs=2)


class Experts(pl.LightningModule):
    def __init__(self, targets: list[str]) -> None:
        super().__init__()
        config = hf.Qwen3MoeConfig(
            vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=16,
            num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, decoder_sparse_step=1,
        )  # fmt: skip
        self.model: Any = get_peft_model(
            hf.Qwen3MoeForCausalLM(config),
            LoraConfig(r=2, target_modules=[], target_parameters=[f"mlp.experts.{name}" for name in targets]),
        )
        self.targets = targets

    def forward(self, **batch: Tensor) -> Any:
        return self.model(**batch)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self(**batch).loss
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self(**batch).loss)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def experts(module: Any) -> list[np.ndarray]:
    """The adapted weights of each layer, merged by peft on a copy."""
    merged = copy.deepcopy(module.model).merge_and_unload()
    return [
        np.concatenate([getattr(layer.mlp.experts, n).detach().double().numpy().ravel() for n in module.targets])
        for layer in merged.model.layers
    ]


def item(i: int) -> dict[str, Tensor]:
    ids = torch.randint(3, 50, (12,), generator=torch.Generator().manual_seed(i))
    return {"input_ids": ids, "attention_mask": torch.ones(12, dtype=torch.long), "labels": ids}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*")
@pytest.mark.parametrize("targets", [["down_proj"], ["down_proj", "gate_up_proj"]])
def test_only_the_adapted_weights_of_stacked_experts_count(targets: list[str]) -> None:
    """Also after a profile, whose run in float64 used to leave peft's modules without these weights."""
    torch.manual_seed(0)
    rows, edges, module = Rows(), Edges(experts), Experts(targets)
    names = [name for name, _ in module.named_parameters()]
    loader = DataLoader([item(i) for i in range(32)], batch_size=8)
    watch = DepthProfile()
    fit(module, [edges, UpdateRatioMonitor(), watch], (loader, loader), logger=rows)
    assert np.array(rows.column("update_ratio/L")) == pytest.approx(edges.ratios(), rel=1e-4)
    assert [name for name, _ in module.named_parameters()] == names
    assert watch.profiles[-1].mean > 0
