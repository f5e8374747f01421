"""Supervised fine-tuning (SFT) on completions only."""

from __future__ import annotations

from depthcb_recipes.objectives.causal_lm import CausalLM
from depthcb_recipes.objectives.objective import Batch, Loss


class CompletionLM(CausalLM):
    """Next-token prediction on completions; prompt tokens are ignored.

    A batch is the same as for `CausalLM`, with ``labels`` of -100 for prompt tokens.

    Raises:
        ValueError: See `CausalLM`; also if a batch has no labels.
    """

    def loss(self, batch: Batch) -> Loss:
        """Returns the mean cross-entropy of the completion tokens."""
        if "labels" not in batch:
            raise ValueError(
                "CompletionLM needs labels that are -100 for prompt tokens: use "
                "depthcb_recipes.data.Completions, or CausalLM to train on the prompt too."
            )
        return super().loss(batch)
