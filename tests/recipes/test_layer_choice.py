"""Objectives train the layers that they are told to, and nothing else moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recipes_families import tiny

from depthcb import LayerStack
from depthcb_recipes.objectives.causal_lm import CausalLM
from depthcb_recipes.objectives.objective import Objective
from depthcb_recipes.objectives.sequence_classification import SequenceClassification

# peft's own call, and what it says of GPT-2's transposed weights.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning", "ignore:fan_in_fan_out")

IDS = torch.arange(24).view(4, 6) + 1


def moved(module: Objective, batch: dict[str, Any]) -> set[str]:
    """The parameters and buffers that ten AdamW steps with weight decay change."""
    module.eval()  # no dropout
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    for _ in range(10):
        optimizer.zero_grad()
        module.loss(batch).value.backward()
        optimizer.step()
    return {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}


def classification(family: str, **options: Any) -> tuple[Objective, dict[str, Any]]:
    module = SequenceClassification(tiny(family), num_labels=3, **options)
    return module, {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": torch.tensor([0, 1, 2, 0])}


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_the_chosen_layer_and_the_new_head_train(family: str) -> None:
    module, batch = classification(family, train_layers=[1])
    layer = LayerStack.find(module).names[1]
    changed = moved(module, batch)
    assert {name for name in changed if not name.startswith(f"{layer}.")} == {"head.weight", "head.bias"}
    assert {name for name in changed if name.startswith(f"{layer}.")} >= {
        f"{layer}.{name}" for name, p in LayerStack.find(module).modules[1].named_parameters() if p.dim() > 1
    }


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_adapters_of_the_chosen_layer_and_the_new_head_train(family: str) -> None:
    module, batch = classification(family, train_layers=[0], lora_rank=2)
    layer = LayerStack.find(module).names[0]
    changed = moved(module, batch)
    rest = {name for name in changed if not (name.startswith(f"{layer}.") and "lora_" in name)}
    assert rest == {"head.weight", "head.bias"}
    assert sum("lora_B" in name for name in changed) == {"bert": 6, "gpt2": 4}[family]
    shapes = {tuple(p.shape) for n, p in module.named_parameters() if "lora_A" in n}
    assert {rank for rank, _ in shapes} == {2}


def test_a_tied_head_is_frozen_with_the_embedding_and_an_own_one_trains() -> None:
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    batch |= {"labels": IDS}
    for family, own in (("gpt2", set()), ("neox", {"model.lm_head.weight"})):
        module = CausalLM(tiny(family, "ForCausalLM"), train_layers=[0])
        layer = LayerStack.find(module).names[0]
        assert {name for name in moved(module, batch) if not name.startswith(f"{layer}.")} == own


def test_adapters_begin_as_the_pretrained_network() -> None:
    module, batch = classification("bert", lora_rank=4)
    plain, _ = classification("bert")
    plain.head.load_state_dict(module.head.state_dict())  # type: ignore[union-attr]
    assert torch.equal(module.eval().loss(batch).value, plain.eval().loss(batch).value)


def test_layers_and_ranks_that_cannot_be_are_refused() -> None:
    for layers in ([2], [-1], []):
        with pytest.raises(ValueError, match="0 to 1"):
            classification("bert", train_layers=layers)
    with pytest.raises(ValueError, match="lora_rank=0"):
        classification("bert", lora_rank=0)
