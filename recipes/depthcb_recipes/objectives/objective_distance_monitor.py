"""Logs how far an objective is from the one that its backbone was pretrained by."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.distributed.tensor import DTensor

from depthcb.batches import collect_batches
from depthcb.callbacks.depth_profile import first_validation_loader
from depthcb.gradient_distance import ObjectiveDistance, objective_distance
from depthcb.profile import layer_key
from depthcb_recipes.backbones.loading import load_backbone, load_tokenizer, pretraining
from depthcb_recipes.data.packed_text import masking
from depthcb_recipes.objectives.causal_lm import CausalLM
from depthcb_recipes.objectives.contrastive import Contrastive
from depthcb_recipes.objectives.masked_lm import MaskedLM
from depthcb_recipes.objectives.objective import IGNORED, Batch, Objective

#: Share of the tokens that are masked where a masked language model's own loss is taken.
MASKED = 0.15
#: A distance of the pretraining objective to itself that is further from 0 says that there were too few batches [ours].
UNCERTAIN = 0.3


class ObjectiveDistanceMonitor(Callback):
    """Measures once, before the first step, how far the objective is from the backbone's own pretraining objective.

    Both losses are taken on the same validation texts, at the pretrained weights. Watching changes nothing.

    ===================================  ==========================================================================
    logged key, at step 0                meaning
    ===================================  ==========================================================================
    ``depth/objective_distance``         1 - cos of the stack's gradients: 0 the same direction, 1 none in common
    ``depth/objective_distance/L00``     the same of layer 0
    ``depth/objective_distance_self``    the pretraining objective's distance to itself on other texts: what is near
    ===================================  ==========================================================================

    A distance that batch noise hides is not logged; a warning says so, and so it does where the pretraining objective's
    distance to itself, which should be about 0, is not: near its optimum a gradient is mostly noise. A run that is
    resumed does not measure again.

    Args:
        batches: Validation batches in each of the four halves that the estimate takes.

    Raises:
        ValueError: ``batches`` below 1; at train start: too few validation batches, a backbone that was given as a
            model instead of by its name, or one whose pretraining is not known.

    Example:
        >>> ObjectiveDistanceMonitor(batches=4).distance is None
        True
    """

    def __init__(self, batches: int = 2) -> None:
        if batches < 1:
            raise ValueError(f"batches must be at least 1, not {batches}")
        self.batches = batches
        #: What was measured, known from train start on.
        self.distance: ObjectiveDistance | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.distance is not None or trainer.global_step > 0:
            return
        if any(isinstance(p, DTensor) for p in pl_module.parameters()):
            rank_zero_warn(
                "ObjectiveDistanceMonitor: not measured, because parameters are sharded over several processes: fit "
                "the same objective on one device for a few steps to know it."
            )
            return
        if not isinstance(pl_module, Objective) or "backbone" not in pl_module.hparams:
            raise ValueError(
                f"ObjectiveDistanceMonitor needs to know what {type(pl_module).__name__}'s backbone was pretrained by: "
                "take an objective of recipes and give its backbone by name, or call depthcb.objective_distance."
            )
        quarters = self._quarters(trainer)
        backbone = pl_module.hparams["backbone"]
        own = pretraining_objective(backbone).to(pl_module.device)
        as_its_own = [[own_batch(own, pl_module, batch, backbone) for batch in quarter] for quarter in quarters]
        pairs = [list(zip(*both, strict=True)) for both in zip(as_its_own, quarters, strict=True)]
        self.distance = objective_distance(
            (own, lambda module, pair: module.loss(pair[0]).value),
            (pl_module, lambda module, pair: module.loss(pair[1]).value),
            (pairs[0], pairs[1]),
            (pairs[2], pairs[3]),
        )
        itself = self.distance.self_overall
        if self.distance.overall is None or itself is None or abs(itself) > UNCERTAIN:
            rank_zero_warn(
                f"ObjectiveDistanceMonitor: the {self.distance}. The latter should be about 0, so batch noise blurs "
                f"the former: raise batches={self.batches}."
            )
        for logger in trainer.loggers:
            logger.log_metrics(_row(self.distance), step=0)

    def state_dict(self) -> dict[str, Any]:
        return {"distance": None if self.distance is None else asdict(self.distance)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        saved = state_dict["distance"]
        self.distance = None if saved is None else ObjectiveDistance(**saved)

    def _quarters(self, trainer: pl.Trainer) -> list[list[Batch]]:
        loader, needed = first_validation_loader(trainer), 4 * self.batches
        found = [] if loader is None else collect_batches(loader, needed * (loader.batch_size or 1))
        if len(found) < needed:
            raise ValueError(
                f"ObjectiveDistanceMonitor(batches={self.batches}) takes {needed} validation batches, of which there "
                f"are {len(found)}: validate on more rows, or in smaller batches."
            )
        return [found[i : i + self.batches] for i in range(0, needed, self.batches)]


def pretraining_objective(backbone: str) -> Objective:
    """A backbone with the head and the loss that it was pretrained by.

    Args:
        backbone: A name for `load_backbone`.

    Raises:
        ValueError: What it was pretrained by is not known.
    """
    kind = pretraining(backbone)
    if kind == "contrastive":
        return Contrastive(load_backbone(backbone, head=None)[0])
    model, _ = load_backbone(backbone, head=kind)
    return CausalLM(model) if kind == "causal_lm" else MaskedLM(model)


def own_batch(own: Objective, new: Objective, batch: Batch, backbone: str) -> Batch:
    """The texts of another objective's batch as a batch of the pretraining objective; its own stays as it is."""
    if type(own) is type(new):
        return batch
    ids = batch["input_ids"]
    if isinstance(new, MaskedLM):  # what stood under the masks
        ids = torch.where(batch["labels"] == IGNORED, ids, batch["labels"])
    texts = {"input_ids": ids, "attention_mask": batch.get("attention_mask", torch.ones_like(ids))}
    if isinstance(own, MaskedLM):
        collator = masking(load_tokenizer(backbone), MASKED, seed=0)
        texts["input_ids"], texts["labels"] = collator.torch_mask_tokens(ids.clone())
    return texts


def _row(distance: ObjectiveDistance) -> dict[str, float]:
    row: dict[str, Any] = {layer_key(i): d for i, d in enumerate(distance.per_layer)}
    row = {f"depth/objective_distance/{key}": value for key, value in row.items()}
    row |= {"depth/objective_distance": distance.overall, "depth/objective_distance_self": distance.self_overall}
    return {key: value for key, value in row.items() if value is not None}
