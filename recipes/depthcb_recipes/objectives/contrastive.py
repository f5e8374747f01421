"""Contrastive learning with in-batch negatives."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from transformers import PreTrainedModel

from depthcb.isolation import isolated_rng
from depthcb_recipes.backbones.loading import is_encoder
from depthcb_recipes.objectives.objective import Batch, Loss, Objective, cross_entropy
from depthcb_recipes.objectives.pooling import last_token, mean_token


class Contrastive(Objective):
    """InfoNCE with in-batch negatives on cosine similarities of text embeddings.

    A batch contains ``input_ids``, ``pair_input_ids`` and, optionally, ``attention_mask`` and ``pair_attention_mask``.
    Without pairs, each text is paired with itself under a different dropout mask (SimCSE); in validation, these masks
    are fixed. Each process only uses negatives from its own batch. Embeddings are mean-pooled over non-padding tokens
    for encoders, and taken from the last token otherwise. Networks that have no dropout of their own (Pythia, CodeGen,
    Mamba, RWKV; OPT's cannot be switched on in validation) can get one on their token embeddings for this pairing
    alone [ours]. Also logs ``val/recall_at_1``, the fraction of texts whose partner is their nearest neighbour in the
    batch.

    Args:
        backbone: See `Objective`. If the model has a head, it is not used.
        temperature: Temperature that divides the cosine similarities.
        dropout: Rate of the dropout on the token embeddings for networks without dropout modules of their own; 0 raises
            an error for them where a text is paired with itself.
        **options: See `Objective`.

    Raises:
        ValueError: See `Objective`; also if the temperature is not positive, the rate is not in [0, 1), a batch
            contains only one text, or there are neither pairs nor dropout.

    Example:
        >>> import torch
        >>> from transformers import BertConfig, BertModel
        >>> tiny = BertModel(BertConfig(num_hidden_layers=2, hidden_size=8, num_attention_heads=2, vocab_size=32))
        >>> ids = torch.arange(10).view(2, 5)
        >>> Contrastive(tiny).loss({"input_ids": ids, "pair_input_ids": ids + 1}).scores.shape
        torch.Size([2, 2])
    """

    def __init__(
        self,
        backbone: str | PreTrainedModel = "minilm",
        *,
        temperature: float = 0.05,
        dropout: float = 0.0,
        **options: Any,
    ) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, not {temperature}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and less than 1, not {dropout}")
        super().__init__(backbone, **options)
        self.temperature, self.dropout = temperature, dropout
        self.val_metrics["recall_at_1"] = MeanMetric()

    def loss(self, batch: Batch) -> Loss:
        """Returns the mean cross-entropy of the partner among all second texts of the batch."""
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        if len(ids) < 2:
            raise ValueError("Contrastive got a batch of one text, which has no negatives: use batch_size >= 2.")
        if "pair_input_ids" in batch:
            first = self.embed(ids, mask)
            second = self.embed(batch["pair_input_ids"], batch.get("pair_attention_mask"))
        else:
            with self._dropping():
                first, second = self.embed(ids, mask), self.embed(ids, mask)
        scores = first @ second.T / self.temperature
        targets = torch.arange(len(ids), device=ids.device)
        return Loss(*cross_entropy(scores, targets), scores, targets)

    def embed(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Returns L2-normalised text embeddings, (B, D)."""
        hidden = self(input_ids, attention_mask).last_hidden_state.float()
        pool = mean_token if is_encoder(self.model.config) else last_token
        return F.normalize(pool(hidden, attention_mask), dim=1)

    def update_metrics(self, loss: Loss) -> None:
        assert loss.scores is not None
        assert loss.targets is not None
        self.metrics["recall_at_1"].update((loss.scores.argmax(dim=1) == loss.targets).float())

    @contextmanager
    def _dropping(self) -> Iterator[None]:
        """Enables dropout, with fixed masks outside training so that validations are comparable."""
        dropouts = [m for m in self.model.modules() if isinstance(m, nn.Dropout) and m.p > 0]
        if not dropouts and not self.dropout:
            raise ValueError(
                f"{type(self.model).__name__} has no dropout, so texts can't be paired with themselves: provide pairs, "
                "or set dropout, such as model.dropout=0.1."
            )
        with self._embeddings_dropped() if not dropouts else contextlib.nullcontext():
            if self.training:
                yield
                return
            with isolated_rng(0):
                try:
                    for module in dropouts:
                        module.train()
                    yield
                finally:
                    for module in dropouts:
                        module.eval()

    @contextmanager
    def _embeddings_dropped(self) -> Iterator[None]:
        """Applies dropout to the token embeddings."""
        embeddings = self.model.get_input_embeddings()
        handle = embeddings.register_forward_hook(lambda module, args, output: F.dropout(output, self.dropout))
        try:
            yield
        finally:
            handle.remove()
