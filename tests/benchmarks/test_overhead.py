"""Overhead of the callbacks, as ratios within one run; A and B alternate, so that a busy machine slows both."""

from __future__ import annotations

import copy

import pytest
import torch
from benchmarking import alternate, median_ratio

from depthcb import LayerStack
from depthcb.probe import Probe
from depthcb.reference import Reference
from depthcb.similarity import find_measures
from depthcb.step_ratio import LayerSteps, imposed_ratios, rescale, step_ratios
from depthcb_recipes import PackedText
from depthcb_recipes.backbones.loading import load_backbone
from depthcb_recipes.precision import choose

pytestmark = pytest.mark.slow


def test_the_control_costs_little_beside_a_training_step() -> None:
    """EqualStep relative to forward, backward and AdamW, on SmolLM2 with 8 x 128 tokens in the machine's precision."""
    model, tokenizer = load_backbone("smollm2-135m")
    batch = next(iter(PackedText(tokenizer, train_rows=8).train_dataloader()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    steps = LayerSteps(LayerStack.find(model).parameters())
    mixed = choose(torch.device("cpu")).precision == "bf16-mixed"

    def train() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def control() -> None:
        steps.begin(optimizer, [optimizer])
        done = steps.finish(optimizer)
        now, before = steps.now(done), steps.before(done)
        ratios = step_ratios(now, before)
        rescale(now, before, imposed_ratios("mean", ratios, 0) / ratios.clamp(min=1e-12))

    share = median_ratio(alternate({"control": control, "train": train}, 3), "control", "train")
    print(f"EqualStep adds {share:.1%} to a training step")
    assert share < 0.25


def test_the_interval_costs_little_beside_the_probe() -> None:
    """CKA of 6 layers with 200 halves each, relative to the forward pass, on MiniLM with 64 x 64 tokens."""
    model, tokenizer = load_backbone("minilm", head=None)
    probe = Probe.collect(PackedText(tokenizer).probe_batches(), 64)
    stack, measures = LayerStack.find(model), find_measures(["cka", "cka_normalized"])
    reference = Reference.record(probe, model, stack, measures)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for p in moved.parameters():
            p.add_(0.01 * p.std() * torch.randn(p.shape) if p.numel() > 1 else 0)
    recording = probe.record(moved, LayerStack.find(moved))
    work = {
        "profiles": lambda: reference.profiles(recording, measures, 0, 0),
        "forward": lambda: probe.record(model, stack),
    }
    share = median_ratio(alternate(work, 5), "profiles", "forward")
    print(f"CKA and its intervals add {share:.1%} to the probe's forward")
    assert share < 0.5
