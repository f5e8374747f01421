"""Overhead of the callbacks, as ratios within one run; A and B alternate, so that a busy machine slows both."""

from __future__ import annotations

import copy

import pytest
import torch
from benchmarking import alternate, median_ratio, note
from transformers import GPT2Config, GPT2LMHeadModel

from depthcb import LayerStack
from depthcb.engine import StepEqualizer
from depthcb.probe import Probe
from depthcb.reference import Reference
from depthcb.similarity import find_measures
from depthcb_recipes import PackedText
from depthcb_recipes.backbones.loading import load_backbone
from depthcb_recipes.precision import choose

pytestmark = pytest.mark.slow
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_control_costs_little_beside_a_training_step(precision: str) -> None:
    """EqualStep relative to forward, backward and AdamW, on GPT-2 small with 4 x 256 tokens."""
    if precision == "bf16-mixed" and choose(torch.device(DEVICE)).precision != precision:
        pytest.skip("this machine has no fast bfloat16")
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0)).to(DEVICE)
    tokens = torch.randint(50257, (4, 256), device=DEVICE)
    plain, controlled = model, copy.deepcopy(model)
    for p in controlled.parameters():
        p.grad = 1e-3 * torch.randn_like(p)
    adamw, followed = (torch.optim.AdamW(m.parameters(), lr=1e-5, fused=True) for m in (plain, controlled))
    control = StepEqualizer(every=10**9).attach(controlled, [followed])
    control.note_weights()

    def train() -> None:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = plain(tokens, labels=tokens, use_cache=False).loss
        adamw.zero_grad()
        loss.backward()
        adamw.step()

    work = {"train": train, "adamw": adamw.step, "controlled": followed.step}
    share = median_ratio(alternate(work, 5), "controlled", "train", minus="adamw")
    assert control.steps_made == 6
    control.detach()
    note(f"the control, in training steps of 1,024 tokens in {precision}", share, 0.01)
    assert share < 0.1


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
