"""Profiles of two models without a Trainer."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from support import TinyLM, fit, loaders, seeded

from depthcb import depth_profile

BATCH = {"input_ids": torch.randint(1, 61, (16, 12), generator=torch.Generator().manual_seed(0))}


def tuned() -> tuple[torch.nn.Module, torch.nn.Module]:
    module = seeded(lambda: TinyLM(lambda p: torch.optim.AdamW(p, lr=1e-2)))
    pretrained = copy.deepcopy(module.model)
    fit(module, [], loaders())
    return pretrained, module.model


def test_two_models() -> None:
    pretrained, model = tuned()
    profiles = depth_profile(pretrained, model, BATCH)
    assert list(profiles) == ["cka", "cka_normalized"]
    assert min(profiles["cka"].change) > 0
    assert depth_profile(model, model, BATCH)["cka"].change == (0.0,) * 4
    assert profiles["cka"].layer_names[0] == "transformer.h.0"


def test_models_of_different_depth_are_refused() -> None:
    with pytest.raises(ValueError, match="have 4 and 3 layers"):
        depth_profile(TinyLM().model, TinyLM(layers=3).model, BATCH)


def test_a_causal_and_a_bidirectional_model_are_not_compared() -> None:
    config = hf.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=61
    )
    model = hf.BertModel(config)
    decoder = hf.BertModel(hf.BertConfig(**{**config.to_dict(), "is_decoder": True}))
    with pytest.raises(ValueError, match="The reference model is not causal, the current one causal"):
        depth_profile(model, decoder, BATCH)
