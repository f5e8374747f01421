"""Causal language modelling."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from depthcb_recipes.backbones.loading import is_encoder
from depthcb_recipes.objectives.objective import IGNORED, Batch, ExpMean, Loss, Objective, cross_entropy


class CausalLM(Objective):
    """Next-token prediction; encoders get a causal mask.

    A batch contains ``input_ids`` and, optionally, ``attention_mask`` and ``labels`` (unshifted; -100 is ignored). The
    labels default to the unmasked input ids. Also logs ``val/perplexity``.

    Args:
        backbone: See `Objective`. A model must have a language-model head.
        **options: See `Objective`.

    Raises:
        ValueError: See `Objective`; also if the model is bidirectional or has no language-model head.

    Example:
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> tiny = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=32))
        >>> CausalLM(tiny)(torch.arange(5)[None]).last_hidden_state.shape
        torch.Size([1, 5, 8])
    """

    lm_head = "causal_lm"

    def __init__(self, backbone: str | PreTrainedModel = "smollm2-135m", **options: Any) -> None:
        super().__init__(backbone, **options)
        self.val_metrics["perplexity"] = ExpMean()

    def check_backbone(self, model: PreTrainedModel) -> None:
        if is_encoder(model.config):
            raise ValueError(
                f"{type(self).__name__} predicts the next token, which {type(model).__name__} already sees: load it "
                "with config.is_decoder = True, or use MaskedLM."
            )
        if model.get_output_embeddings() is None:  # type: ignore[no-untyped-call]
            raise ValueError(f"{type(model).__name__} has no language-model head: load it with load_backbone(name).")

    def loss(self, batch: Batch) -> Loss:
        """Returns the mean cross-entropy of the next tokens."""
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        labels = unpadded(batch.get("labels", ids), mask)
        logits = self.run(self.model, ids, mask).logits
        # With left padding, nothing precedes the first token from which it could be predicted.
        targets = unpadded(labels[:, 1:], None if mask is None else mask[:, :-1])
        return Loss(*cross_entropy(logits[:, :-1], targets))

    def update_metrics(self, loss: Loss) -> None:
        self.metrics["perplexity"].update(loss.value, loss.weight)


def unpadded(labels: Tensor, mask: Tensor | None) -> Tensor:
    """Returns the labels with padding positions ignored."""
    return labels if mask is None else labels.masked_fill(mask == 0, IGNORED)
