"""The block type is detected from the model, not from its name."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from recipes_families import FAMILIES, tiny

from depthcb_recipes.backbones.block_type import block_type
from depthcb_recipes.backbones.loading import load_backbone

PARALLEL = ("neox", "codegen")


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    expected = "parallel" if family in PARALLEL else "single" if family == "mamba2" else "sequential"
    assert block_type(tiny(family)) == expected


@pytest.mark.parametrize("flag", [True, False])
def test_the_flag_of_gpt_neox_both_ways(flag: bool) -> None:
    assert block_type(tiny("neox", use_parallel_residual=flag)) == ("parallel" if flag else "sequential")


def test_other_parallel_families() -> None:
    small = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    assert block_type(hf.PhiModel(hf.PhiConfig(**small, intermediate_size=32))) == "parallel"
    assert (
        block_type(hf.GPTJModel(hf.GPTJConfig(vocab_size=50, n_embd=16, n_layer=2, n_head=2, rotary_dim=4)))
        == "parallel"
    )


def test_real_networks_are_left_as_they_were() -> None:
    model, _ = load_backbone("minilm", head=None)
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    assert block_type(model) == "sequential"
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
