"""Direct preference optimisation (DPO)."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric
from transformers import PreTrainedModel

from depthcb.pretrained import reshard
from depthcb_recipes.cache import digest
from depthcb_recipes.data.preference_pairs import PreferencePairs
from depthcb_recipes.objectives.causal_lm import CausalLM, unpadded
from depthcb_recipes.objectives.objective import IGNORED, Batch, Loss

#: The log-probabilities of the reference in a batch: of the preferred completions and of the rejected ones, each (B,).
REFERENCE = ("reference_chosen", "reference_rejected")


class DPO(CausalLM):
    """Preference tuning: -log sigmoid(beta * margin) of each pair (Rafailov et al. 2023, equation 7).

    The margin is how much more the log-probability of the preferred completion has grown since the pretrained model
    than that of the rejected one, in nats, each summed over the completion's tokens. The pretrained model's
    log-probabilities are computed once, at the start of a fit with `PreferencePairs`, and are part of checkpoints:
    there is no second model in memory during training. At the pretrained weights the loss is log 2, with the gradient
    -beta / 2 (grad log p(chosen) - grad log p(rejected)).

    A batch contains ``input_ids`` and ``labels`` (-100 for prompt tokens) of the preferred texts, the same with the
    prefix ``rejected_``, optionally ``attention_mask`` and ``rejected_attention_mask``, and ``reference_chosen`` and
    ``reference_rejected``. Also logs ``val/accuracy``, the fraction of pairs with a positive margin, and
    ``val/margin``, the mean of beta * margin.

    Args:
        backbone: See `CausalLM`.
        beta: Strength of the preference: larger values keep closer to the pretrained model.
        **options: See `Objective`.

    Raises:
        ValueError: See `CausalLM`; also if ``beta`` is not positive, a batch has no reference log-probabilities, or
            those in a checkpoint are of other data.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> tiny = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=32)).eval()
        >>> ids = torch.arange(10).view(2, 5)
        >>> batch = {"input_ids": ids, "labels": ids, "rejected_input_ids": ids + 1, "rejected_labels": ids + 1}
        >>> dpo = DPO(tiny)
        >>> round(dpo.loss(batch | dpo.reference(batch)).value.item(), 4)
        0.6931
    """

    def __init__(self, backbone: str | PreTrainedModel = "smollm2-135m", *, beta: float = 0.1, **options: Any) -> None:
        if not beta > 0:
            raise ValueError(f"beta must be positive, not {beta}")
        super().__init__(backbone, **options)
        self.beta = beta
        self.val_metrics = nn.ModuleDict({"accuracy": MeanMetric(), "margin": MeanMetric()})
        #: For each data set, by the hash of its rows: the reference log-probabilities, (rows, 2).
        self.references: dict[str, Tensor] = {}

    def loss(self, batch: Batch) -> Loss:
        """Returns the mean loss of the pairs; the scores are beta * margin, (B,)."""
        if REFERENCE[0] not in batch:
            raise ValueError(
                "DPO needs reference_chosen and reference_rejected: use depthcb_recipes.data.PreferencePairs, or add "
                "what DPO.reference(batch) returns at the pretrained weights."
            )
        chosen, rejected = self._log_probabilities(batch)
        scores = self.beta * ((chosen - batch[REFERENCE[0]]) - (rejected - batch[REFERENCE[1]]))
        return Loss(-F.logsigmoid(scores).mean(), torch.tensor(len(scores), device=scores.device), scores.detach())

    def update_metrics(self, loss: Loss) -> None:
        assert loss.scores is not None
        self.metrics["accuracy"].update((loss.scores > 0).float())
        self.metrics["margin"].update(loss.scores)

    @torch.no_grad()
    def reference(self, batch: Batch) -> Batch:
        """Returns what `loss` needs of the reference, from the current weights."""
        return dict(zip(REFERENCE, self._log_probabilities(batch), strict=True))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adds the reference to the data, then returns the optimizer, see `Objective`."""
        # Here the weights are on their device, and the next thing is that the schedule has the data loaders built.
        self._add_references(getattr(self.trainer, "datamodule", None))
        return super().configure_optimizers()

    def _add_references(self, data: Any) -> None:
        """Computes the reference log-probabilities of all pairs, unless a checkpoint or an earlier fit has them."""
        if not isinstance(data, PreferencePairs):
            return
        resumed = bool(self.references)
        for side in ("train_data", "val_data"):
            rows: Dataset = getattr(data, side)
            if REFERENCE[0] in rows.column_names:
                rows = rows.remove_columns(list(REFERENCE))
            key = digest([repr(row) for row in zip(rows["input_ids"], rows["rejected_input_ids"], strict=True)])
            if resumed and key not in self.references:
                raise ValueError(
                    "DPO has reference log-probabilities of other pairs: continue with the data of the first fit, or "
                    "start from the pretrained model."
                )
            if key not in self.references:
                rank_zero_info(f"DPO: computing the reference log-probabilities of {len(rows)} pairs.")
                self.references[key] = self._references(rows, data)
            for name, column in zip(REFERENCE, self.references[key].T.tolist(), strict=True):
                rows = rows.add_column(name, column)
            setattr(data, side, rows)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["dpo_references"] = self.references

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "dpo_references" not in checkpoint:  # they cannot be computed from weights that were tuned
            raise ValueError("The checkpoint has no reference log-probabilities: it was not saved by a fit of DPO.")
        self.references = checkpoint["dpo_references"]

    def _references(self, rows: Dataset, data: PreferencePairs) -> Tensor:
        flags, found = [(module, module.training) for module in self.modules()], []
        self.eval()
        with self.trainer.precision_plugin.forward_context():
            own = torch.Generator(device="cpu")  # the loader would draw from the global one
            for batch in DataLoader(rows, data.batch_size, collate_fn=data.collate, generator=own):
                placed = {name: tensor.to(self.device) for name, tensor in batch.items()}
                found.append(torch.stack(list(self.reference(placed).values()), dim=1).cpu())
        for module, flag in flags:
            module.training = flag
        reshard(self)  # FSDP2 keeps gathered weights, which the optimizer would be given instead of the pieces
        return torch.cat(found)

    def _log_probabilities(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns the log-probabilities of the preferred and of the rejected completions, each (B,)."""
        chosen, rejected = (
            self._log_probability(
                batch[f"{prefix}input_ids"], batch[f"{prefix}labels"], batch.get(f"{prefix}attention_mask")
            )
            for prefix in ("", "rejected_")
        )
        return chosen, rejected

    def _log_probability(self, ids: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
        logits = self.run(self.model, ids, mask).logits[:, :-1].float()
        # As in CausalLM: neither padding nor the first token after padding on the left is predicted.
        targets = unpadded(unpadded(labels, mask)[:, 1:], None if mask is None else mask[:, :-1])
        return -F.cross_entropy(logits.mT, targets, ignore_index=IGNORED, reduction="none").sum(dim=1)
