"""Fine-tuning by predicting masked tokens."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from depthcb_recipes.backbones.loading import is_encoder
from depthcb_recipes.objectives.causal_lm import unpadded
from depthcb_recipes.objectives.objective import Batch, ExpMean, Loss, Objective, cross_entropy


class MaskedLM(Objective):
    """Prediction of the tokens that a batch has masked.

    A batch holds ``input_ids``, ``labels`` (-100 where nothing was masked) and, optionally, ``attention_mask``, as
    ``depthcb_recipes.data.PackedText(masked=True)`` gives it. Beside the losses ``val/perplexity`` of the masked
    tokens is logged.

    Args:
        backbone: As for `Objective`; a model needs a masked-language-model head.
        **options: As for `Objective`.

    Raises:
        ValueError: As for `Objective`; a model that sees only the tokens before a masked one.
    """

    lm_head = "masked_lm"

    def __init__(self, backbone: str | PreTrainedModel = "minilm", **options: Any) -> None:
        super().__init__(backbone, **options)
        self.val_metrics["perplexity"] = ExpMean()

    def check_backbone(self, model: PreTrainedModel) -> None:
        if not is_encoder(model.config):
            raise ValueError(
                f"MaskedLM needs a model that sees both sides of a masked token; {type(model).__name__} sees only what "
                "stands before it: take CausalLM."
            )

    def loss(self, batch: Batch) -> Loss:
        """Mean cross-entropy of the masked tokens."""
        if "labels" not in batch:
            raise ValueError("A batch of MaskedLM needs labels: take depthcb_recipes.data.PackedText(masked=True).")
        mask = batch.get("attention_mask")
        logits = self.run(self.model, batch["input_ids"], mask).logits
        return Loss(*cross_entropy(logits, unpadded(batch["labels"], mask)))

    def update_metrics(self, loss: Loss) -> None:
        self.metrics["perplexity"].update(loss.value, loss.weight)
