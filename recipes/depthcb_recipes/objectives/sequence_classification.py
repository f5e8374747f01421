"""Sequence classification."""

from __future__ import annotations

from depthcb_recipes.backbones.loading import is_encoder
from depthcb_recipes.objectives.classification import Classification
from depthcb_recipes.objectives.objective import Batch, Loss, cross_entropy
from depthcb_recipes.objectives.pooling import first_token, last_token


class SequenceClassification(Classification):
    """Classification of texts, from the first token for encoders and the last non-padding token otherwise.

    A batch contains ``input_ids``, ``labels`` (B,) and, optionally, ``attention_mask``. If an encoder has a pooling
    layer (as BERT does), it is used. See `Classification` for arguments and errors.

    Example:
        >>> import torch
        >>> from transformers import BertConfig, BertModel
        >>> tiny = BertModel(BertConfig(num_hidden_layers=2, hidden_size=8, num_attention_heads=2, vocab_size=32))
        >>> batch = {"input_ids": torch.arange(10).view(2, 5), "labels": torch.tensor([0, 2])}
        >>> SequenceClassification(tiny, num_labels=3).loss(batch).scores.shape
        torch.Size([2, 3])
    """

    def loss(self, batch: Batch) -> Loss:
        """Returns the mean cross-entropy of the labels."""
        mask, labels = batch.get("attention_mask"), batch["labels"]
        hidden = self(batch["input_ids"], mask).last_hidden_state
        if is_encoder(self.model.config):
            features = first_token(hidden, mask)
            pooler = getattr(self.model.base_model, "pooler", None)
            if pooler is not None:
                features = pooler(features[:, None])
        else:
            features = last_token(hidden, mask)
        scores = self.scores(features)
        return Loss(*cross_entropy(scores, labels), scores, labels)
