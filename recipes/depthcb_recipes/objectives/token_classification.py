"""Token classification."""

from __future__ import annotations

from depthcb_recipes.objectives.causal_lm import unpadded
from depthcb_recipes.objectives.classification import Classification
from depthcb_recipes.objectives.objective import Batch, Loss, cross_entropy


class TokenClassification(Classification):
    """Classification of tokens; causal models only see the tokens up to the one they classify.

    A batch contains ``input_ids``, ``labels`` (B, T; -100 is ignored) and, optionally, ``attention_mask``. F1 is per
    token, not per entity. See `Classification` for arguments and errors.

    Example:
        >>> import torch
        >>> from transformers import GPT2Config, GPT2Model
        >>> tiny = GPT2Model(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=32))
        >>> batch = {"input_ids": torch.arange(10).view(2, 5), "labels": torch.tensor([[0, 1, -100, 2, 1]] * 2)}
        >>> TokenClassification(tiny, num_labels=3).loss(batch).weight
        tensor(8)
    """

    def loss(self, batch: Batch) -> Loss:
        """Returns the mean cross-entropy of the token labels."""
        mask = batch.get("attention_mask")
        labels = unpadded(batch["labels"], mask)
        scores = self.scores(self(batch["input_ids"], mask).last_hidden_state)
        return Loss(*cross_entropy(scores, labels), scores.flatten(0, 1), labels.flatten())
