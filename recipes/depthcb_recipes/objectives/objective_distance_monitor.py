"""Logs the distance between an objective and the backbone's pretraining objective."""

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
from depthcb.callbacks.logging import write_record
from depthcb.gradient_distance import GROUPS, ObjectiveDistance, objective_distance
from depthcb.plain import plain
from depthcb.profile import layer_key
from depthcb.run import write_header
from depthcb_recipes.backbones.loading import load_backbone, load_tokenizer, pretraining
from depthcb_recipes.data.packed_text import masking
from depthcb_recipes.objectives.causal_lm import CausalLM
from depthcb_recipes.objectives.contrastive import Contrastive
from depthcb_recipes.objectives.masked_lm import MaskedLM
from depthcb_recipes.objectives.objective import IGNORED, Batch, Objective

#: Fraction of tokens masked for the loss of a masked language model.
MASKED = 0.15
#: Batches are added until the distance's interval is narrower than this [ours].
WIDTH = 0.2


class ObjectiveDistanceMonitor(Callback):
    """Measures the distance between the objective and the backbone's pretraining objective, once before the first step.

    Both losses are computed on the same validation texts at the pretrained weights. Training is not affected.

    ===================================  ==========================================================================
    logged key, at step 0                meaning
    ===================================  ==========================================================================
    ``depth/objective_distance``         1 - cos of the stack's gradients: 0 if parallel, 1 if orthogonal
    ``depth/objective_distance/L00``     the same for layer 0
    ``depth/objective_distance_low``     lower end of its 95 % interval over batches; ``_high`` is the upper end
    ``depth/objective_distance_          with ``procrustes``: Procrustes distance of the gradients, not corrected for
    procrustes_uncorrected``             batch noise (see `depthcb.gradient_distance`); ``.../L00`` is layer 0's
    ===================================  ==========================================================================

    Validation batches are added until the interval is narrower than ``width``, or ``most_batches`` are used; a warning
    then says how wide it is. Gradients near an optimum are mostly noise, so this may take many. Resumed runs do not
    measure again. The run's record has the figures too.

    Args:
        width: The width of the interval to reach.
        most_batches: The largest number of validation batches.
        procrustes: Whether to measure the Procrustes distance too; it takes a singular value decomposition per matrix.

    Raises:
        ValueError: If an argument is out of range. At train start: if there are fewer than 6 validation batches, or the
            backbone was passed as a model instead of a name, or its pretraining objective is unknown.

    Example:
        >>> ObjectiveDistanceMonitor(most_batches=24).distance is None
        True
    """

    #: Name of its record.
    name = "objective_distance"

    def __init__(self, width: float = WIDTH, most_batches: int = 48, procrustes: bool = False) -> None:
        if not width > 0:
            raise ValueError(f"width must be positive, not {width}")
        if most_batches < GROUPS:
            raise ValueError(f"most_batches must be at least {GROUPS}, not {most_batches}")
        self.width, self.most_batches, self.procrustes = width, most_batches, procrustes
        #: The measured distance; None before training starts.
        self.distance: ObjectiveDistance | None = None
        self._recorded = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._recorded = False
        if self.distance is not None or trainer.global_step > 0:
            return
        if any(isinstance(p, DTensor) for p in pl_module.parameters()):
            rank_zero_warn(
                "ObjectiveDistanceMonitor does not support sharded parameters: to measure the distance, fit the same "
                "objective on one device for a few steps."
            )
            return
        if not isinstance(pl_module, Objective) or "backbone" not in pl_module.hparams:
            raise ValueError(
                f"ObjectiveDistanceMonitor needs the pretraining objective of {type(pl_module).__name__}'s backbone: "
                "use an objective of the recipes and give its backbone by name, or call depthcb.objective_distance."
            )
        backbone = pl_module.hparams["backbone"]
        own = pretraining_objective(backbone).to(pl_module.device)
        pairs = [(own_batch(own, pl_module, batch, backbone), batch) for batch in self._batches(trainer)]
        self.distance = objective_distance(
            (own, lambda module, pair: module.loss(pair[0]).value),
            (pl_module, lambda module, pair: module.loss(pair[1]).value),
            pairs,
            width=self.width,
            most_batches=self.most_batches,
            procrustes=self.procrustes,
        )
        if self.distance.width >= self.width:
            rank_zero_warn(
                f"ObjectiveDistanceMonitor: {self.distance}; its interval should be narrower than {self.width:g}, so "
                f"batch noise dominates: validate on more rows, or raise most_batches={self.most_batches}."
            )
        for logger in trainer.loggers:
            logger.log_metrics(_row(self.distance), step=0)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not before: a callback that comes later opens the records of this fit, and makes void what was there.
        if self._recorded or self.distance is None:
            return
        self._recorded = True
        settings = plain(asdict(self.distance))
        write_record(self, trainer, lambda folder: write_header(folder, self.name, type(self).__name__, 0, settings))

    def state_dict(self) -> dict[str, Any]:
        return {"distance": None if self.distance is None else asdict(self.distance)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        saved = state_dict["distance"]
        self.distance = None if saved is None else ObjectiveDistance(**saved)

    def _batches(self, trainer: pl.Trainer) -> list[Batch]:
        loader = first_validation_loader(trainer)
        found = [] if loader is None else collect_batches(loader, self.most_batches * (loader.batch_size or 1))
        if len(found) < GROUPS:
            raise ValueError(
                f"ObjectiveDistanceMonitor needs at least {GROUPS} validation batches, but there are only "
                f"{len(found)}: validate on more rows or use smaller batches."
            )
        return found


def pretraining_objective(backbone: str) -> Objective:
    """Loads a backbone with its pretraining objective and head.

    Args:
        backbone: A name accepted by `load_backbone`.

    Raises:
        ValueError: If the pretraining objective is unknown.
    """
    kind = pretraining(backbone)
    if kind == "contrastive":
        return Contrastive(load_backbone(backbone, head=None)[0])
    model, _ = load_backbone(backbone, head=kind)
    return CausalLM(model) if kind == "causal_lm" else MaskedLM(model)


def own_batch(own: Objective, new: Objective, batch: Batch, backbone: str) -> Batch:
    """Converts a batch of the new objective to one of the pretraining objective, unchanged if both are the same."""
    if type(own) is type(new):
        return batch
    ids = batch["input_ids"]
    if isinstance(new, MaskedLM):  # the original tokens
        ids = torch.where(batch["labels"] == IGNORED, ids, batch["labels"])
    texts = {"input_ids": ids, "attention_mask": batch.get("attention_mask", torch.ones_like(ids))}
    if isinstance(own, MaskedLM):
        collator = masking(load_tokenizer(backbone), MASKED, seed=0)
        texts["input_ids"], texts["labels"] = collator.torch_mask_tokens(ids.clone())
    return texts


def _row(distance: ObjectiveDistance) -> dict[str, float]:
    key, procrustes = "depth/objective_distance", "depth/objective_distance_procrustes_uncorrected"
    low, high = distance.interval or (None, None)
    row: dict[str, float | None] = {key: distance.overall, f"{key}_low": low, f"{key}_high": high}
    row |= {procrustes: distance.procrustes_uncorrected}
    for name, layers in ((key, distance.per_layer), (procrustes, distance.per_layer_procrustes_uncorrected)):
        row |= {f"{name}/{layer_key(i)}": value for i, value in enumerate(layers)}
    return {key: value for key, value in row.items() if value is not None}
