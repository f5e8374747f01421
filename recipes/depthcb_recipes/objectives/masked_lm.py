"""Masked language modelling."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from depthcb_recipes.backbones.loading import is_encoder
from depthcb_recipes.objectives.causal_lm import unpadded
from depthcb_recipes.objectives.objective import Batch, ExpMean, Loss, Objective, cross_entropy


class MaskedLM(Objective):
    """Masked-token prediction.

    A batch contains ``input_ids``, ``labels`` (-100 except for masked tokens) and, optionally, ``attention_mask``, as
    returned by ``depthcb_recipes.data.PackedText(masked=True)``. Also logs ``val/perplexity`` of the masked tokens.

    Args:
        backbone: See `Objective`. A model must have a masked-language-model head.
        **options: See `Objective`.

    Raises:
        ValueError: See `Objective`; also if the model is causal.
    """

    lm_head = "masked_lm"

    def __init__(self, backbone: str | PreTrainedModel = "minilm", **options: Any) -> None:
        super().__init__(backbone, **options)
        self.val_metrics["perplexity"] = ExpMean()

    def check_backbone(self, model: PreTrainedModel) -> None:
        if not is_encoder(model.config):
            raise ValueError(
                f"MaskedLM needs a bidirectional model, but {type(model).__name__} is causal: use CausalLM."
            )

    def loss(self, batch: Batch) -> Loss:
        """Returns the mean cross-entropy of the masked tokens."""
        if "labels" not in batch:
            raise ValueError("MaskedLM needs labels: use depthcb_recipes.data.PackedText(masked=True).")
        mask = batch.get("attention_mask")
        logits = self.run(self.model, batch["input_ids"], mask).logits
        return Loss(*cross_entropy(logits, unpadded(batch["labels"], mask)))

    def update_metrics(self, loss: Loss) -> None:
        self.metrics["perplexity"].update(loss.value, loss.weight)
