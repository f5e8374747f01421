"""What `EqualStep` adds to a step: against fused AdamW alone, and against the control that one would write by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from benchmarking import alternate, median_ratio, note
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from depthcb import LayerStack
from depthcb.engine import StepEqualizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: By 7 rounds, the same code read 1.6 to 2.6 steps of AdamW on one machine.
ROUNDS = 31


def gpt2_small() -> nn.Module:
    """12 layers of width 768: 85M parameters in the layers."""
    model: nn.Module = GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0))
    return model


def decoder_135m() -> nn.Module:
    """30 layers of width 576, of SmolLM2's shape: 106M parameters in the layers."""
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


class Trained:
    """The layers of a model with constant gradients, and an optimizer of them."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        torch.manual_seed(0)
        self.model = make().to(DEVICE)
        self.layers = LayerStack.find(self.model).parameters()
        parameters = [p for layer in self.layers for p in layer]
        for p in parameters:
            p.grad = 1e-3 * torch.randn_like(p)
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step(self) -> None:
        self.optimizer.step()

    @torch.no_grad()
    def step_by_hand(self) -> None:
        """Copies, norms as Python numbers and a loop over the parameters."""
        before = [[p.clone() for p in layer] for layer in self.layers]
        self.optimizer.step()
        ratios = []
        for layer, copies in zip(self.layers, before, strict=True):
            step = math.sqrt(sum((p - c).norm().item() ** 2 for p, c in zip(layer, copies, strict=True)))
            ratios.append(step / math.sqrt(sum(c.norm().item() ** 2 for c in copies)))
        for layer, copies, ratio in zip(self.layers, before, ratios, strict=True):
            for p, c in zip(layer, copies, strict=True):
                p.copy_(c + (sum(ratios) / len(ratios) / ratio) * (p - c))


@pytest.mark.parametrize("make", [gpt2_small, decoder_135m])
def test_the_control_costs_few_steps_of_adamw_and_less_than_one_by_hand(make: Any) -> None:
    plain, by_hand, quiet, logging = (Trained(make) for _ in range(4))
    rows: list[Any] = []
    controls = {
        every: StepEqualizer(every=every).attach(trained.model, [trained.optimizer], log=lambda *row: rows.append(row))
        for every, trained in ((10**9, quiet), (1, logging))
    }
    for control in controls.values():
        control.note_weights()
    steps = {"adamw": plain.step, "by hand": by_hand.step_by_hand, "control": quiet.step, "logged": logging.step}
    times = alternate(steps, ROUNDS)
    for control in controls.values():
        control.detach()
    assert len(rows) == ROUNDS + 1
    realised = [value for key, value in rows[-1][0].items() if "/realised/" in key]
    assert max(realised) / min(realised) < 1.0001
    name = make.__name__
    own = median_ratio(times, "control", "adamw", minus="adamw")
    faster = median_ratio(times, "by hand", "adamw", minus="adamw") / own
    logged = median_ratio(times, "logged", "adamw", minus="adamw") / own
    note(f"{name}: control, in steps of fused AdamW", own, 2.0)
    note(f"{name}: control by hand, in controls", faster, 2.0)
    note(f"{name}: a logged step, in unlogged ones", logged, 1.5)
    assert own < 3.0
    assert faster > 1.5
    assert logged < 1.75
