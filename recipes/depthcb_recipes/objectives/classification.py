"""Base class of sequence and token classification."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from transformers import PreTrainedModel

from depthcb_recipes.objectives.objective import IGNORED, Objective


class Classification(Objective):
    """Base class for classification with a new linear head.

    Also logs ``val/accuracy`` and ``val/f1`` (macro average).

    Args:
        backbone: See `Objective`. If the model has a head, it is not used.
        num_labels: Number of labels; None takes it from the Trainer's data module.
        dropout: Dropout probability at the input of the head.
        **options: See `Objective`.

    Raises:
        ValueError: See `Objective`; also if there are fewer than two labels or their number is unknown.
    """

    def __init__(
        self,
        backbone: str | PreTrainedModel = "minilm",
        *,
        num_labels: int | None = None,
        dropout: float = 0.1,
        **options: Any,
    ) -> None:
        if num_labels is not None and num_labels < 2:
            raise ValueError(f"num_labels must be at least 2, not {num_labels}")
        super().__init__(backbone, **options)
        self.dropout = nn.Dropout(dropout)
        if num_labels is not None and hasattr(self, "model"):
            self._add_head(num_labels)

    def configure_model(self) -> None:
        """Loads the backbone and adds the head, once."""
        super().configure_model()
        if not hasattr(self, "head"):
            self._add_head(self.hparams["num_labels"] or self._labels_of_data())

    def scores(self, features: Tensor) -> Tensor:
        """Returns the logits, (..., D) → (..., labels)."""
        scores: Tensor = self.head(self.dropout(features))
        return scores

    def _add_head(self, num_labels: int) -> None:
        self.hparams["num_labels"] = num_labels  # so that a checkpoint can be loaded without the data module
        config = self.model.config
        weight = next(self.model.parameters())
        width = getattr(config, "word_embed_proj_dim", config.hidden_size)  # OPT-350M projects its output
        self.head = nn.Linear(width, num_labels, device=weight.device, dtype=weight.dtype)
        nn.init.normal_(self.head.weight, std=getattr(config, "initializer_range", 0.02))
        nn.init.zeros_(self.head.bias)
        self.val_metrics["accuracy"] = MulticlassAccuracy(num_labels, average="micro", ignore_index=IGNORED)
        self.val_metrics["f1"] = MulticlassF1Score(num_labels, average="macro", ignore_index=IGNORED)

    def _labels_of_data(self) -> int:
        num_labels = getattr(getattr(self._trainer, "datamodule", None), "num_labels", None)
        if num_labels is None:
            raise ValueError(f"{type(self).__name__} can't infer the number of labels: pass num_labels=.")
        return int(num_labels)
