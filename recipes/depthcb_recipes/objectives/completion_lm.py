"""Fine-tuning on completions alone, which is mostly called supervised fine-tuning (SFT)."""

from __future__ import annotations

from depthcb_recipes.objectives.causal_lm import CausalLM
from depthcb_recipes.objectives.objective import Batch, Loss


class CompletionLM(CausalLM):
    """Next-token prediction of the completion that follows a prompt; the prompt itself does not count.

    A batch is one of `CausalLM` whose ``labels`` are -100 over the prompt.

    Raises:
        ValueError: As for `CausalLM`; a batch without labels.
    """

    def loss(self, batch: Batch) -> Loss:
        """Mean cross-entropy of the completions' tokens."""
        if "labels" not in batch:
            raise ValueError(
                "A batch of CompletionLM needs labels that are -100 over the prompt: use "
                "depthcb_recipes.data.Completions, or CausalLM to train on the prompt too."
            )
        return super().loss(batch)
