"""Profiles of two models without a Trainer, and nulls with noise of the same size."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers as hf
from support import TinyLM, fit, loaders, seeded

from depthcb import LayerStack, depth_profile
from depthcb.null import null_profiles
from depthcb.probe import Probe
from depthcb.reference import Reference
from depthcb.similarity import find_measures

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


def test_the_null_has_the_sizes_of_the_change_and_random_directions() -> None:
    pretrained, model = tuned()
    stack = LayerStack.find(pretrained)
    before = [p.detach().clone() for p in pretrained.parameters()]
    probe = Probe.collect(BATCH, 16)
    measures = find_measures(["cka", "relative_l2"])
    reference = Reference.record(probe, pretrained, stack, measures)
    seen: list[list[np.ndarray]] = []

    def spy(noisy: torch.nn.Module, batch: dict[str, torch.Tensor]) -> None:
        seen.append(
            [p.detach().double().numpy().copy() for layer in LayerStack.find(noisy).parameters() for p in layer]
        )
        noisy(**batch)

    draws = null_profiles(
        pretrained, model, Probe.collect(BATCH, 16, forward=spy), reference, measures, seeds=(0, 1, 0)
    )
    assert all(torch.equal(a, b) for a, b in zip(before, pretrained.parameters(), strict=True))
    assert draws[0] == draws[2]
    assert draws[0] != draws[1]
    assert min(draws[0]["cka"].change) > 0
    clean = [p.detach().double().numpy() for layer in stack.parameters() for p in layer]
    moved = [p.detach().double().numpy() for layer in LayerStack.find(model).parameters() for p in layer]
    for start, end, first, last in zip(clean, moved, seen[0], seen[-1], strict=True):
        net = np.linalg.norm(end - start)
        assert np.linalg.norm(first - start) == pytest.approx(net, rel=1e-3)
        assert np.array_equal(first, last)
        if start.size > 200:
            cosine = ((first - start) * (end - start)).sum() / net**2
            assert abs(cosine) < 5 / np.sqrt(start.size)


def test_a_causal_and_a_bidirectional_model_are_not_compared() -> None:
    config = hf.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=61
    )
    model = hf.BertModel(config)
    decoder = hf.BertModel(hf.BertConfig(**{**config.to_dict(), "is_decoder": True}))
    with pytest.raises(ValueError, match="The reference model is not causal, the current one causal"):
        depth_profile(model, decoder, BATCH)
