"""Trains some layers of a network: their weights, or LoRA adapters on them."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from depthcb import LayerStack
from depthcb.advice_formats import peft_arguments
from depthcb.layer_contents import layer_contents


def train_only(model: PreTrainedModel, layers: Sequence[int] | None, lora_rank: int | None) -> None:
    """Freezes the network but for some layers, and its head.

    The head is what a language model adds to the network that it contains; tensors that both share are frozen [ours].

    Args:
        model: The network.
        layers: The layers to train, by their number in depth; None for all.
        lora_rank: Rank of LoRA adapters on all linear modules of these layers, with alpha = 2 x rank, in place of the
            weights; None trains the weights.

    Raises:
        ValueError: There is no such layer, or the rank is not positive.
    """
    stack = LayerStack.find(model)
    chosen = list(range(len(stack)) if layers is None else layers)
    wrong = [i for i in chosen if not 0 <= i < len(stack)]
    if wrong or not chosen:
        raise ValueError(f"train_layers={chosen}: name one or more of the layers 0 to {len(stack) - 1}.")
    if lora_rank is not None and lora_rank < 1:
        raise ValueError(f"lora_rank={lora_rank}: it must be at least 1.")
    model.base_model.requires_grad_(False)
    if lora_rank is None:
        for i in chosen:
            stack.modules[i].requires_grad_(True)
        return
    from peft import LoraConfig, inject_adapter_in_model

    head = [p for p in model.parameters() if p.requires_grad]
    where = peft_arguments(stack.names, chosen, layer_contents(stack)["linear"])
    inject_adapter_in_model(LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, **where), model)  # freezes all others
    for parameter in head:
        parameter.requires_grad_(True)
