"""``depthcb restore A B``: what the change of each layer from A to B is worth to the language-model loss on a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from depthcb import depth_profile, restore_profile
from depthcb.worth import RestoreProfile
from depthcb_recipes.backbones.loading import load_backbone, pretraining
from depthcb_recipes.backbones.pretraining import pretrain_if_missing
from depthcb_recipes.compare_backbones import BATCH, LENGTH, ROWS, read_text
from depthcb_recipes.data.packed_text import PackedText

#: Share of an encoder's tokens that are masked, the same ones each time.
MASKED = 0.15
IGNORED = -100


def restore_backbones(
    reference: str, model: str, text: Path | None, json_path: Path | None, console: Console
) -> RestoreProfile:
    """Measures and prints what each layer's change is worth to the loss that ``model`` has its head for.

    Args:
        reference: The pretrained model: a name accepted by `load_backbone`.
        model: The fine-tuned model: likewise.
        text: Text file, one example per line; None uses code of the Python standard library.
        json_path: File to write the figures to.
        console: Console to print the table to.

    Raises:
        ValueError: A model is not found, the models differ, the text is too short, or ``model`` has no head for
            language modelling.
    """
    for name in (reference, model):
        pretrain_if_missing(name)
    head: Any = pretraining(model)
    if head not in ("causal_lm", "masked_lm"):
        raise ValueError(
            f"{model!r} was trained by {head}, and has no head for language modelling: pass your own loss to "
            "depthcb.restore_profile."
        )
    before, _ = load_backbone(reference, head=head)
    after, tokenizer = load_backbone(model, head=head)
    batches = (
        read_text(text, tokenizer) if text else PackedText(tokenizer).probe_batches(ROWS, BATCH, block_size=LENGTH)
    )
    labelled = _labelled(batches, head, tokenizer.mask_token_id)
    found = restore_profile(before, after, labelled, _loss)
    profile = depth_profile(before.base_model, after.base_model, batches, measures=("cka",))["cka"]
    if json_path is not None:
        json_path.write_text(found.to_json() + "\n", encoding="utf-8")
    table = Table("layer", title=f"{model}, layers put back to {reference}: difference of the loss, nats")
    for column in ("change (cka)", "restored", "restored up to it", "restored from it on", "transplanted"):
        table.add_column(column, justify="right")
    parts = (found.restored, found.restored_from_input, found.restored_from_output, found.transplanted)
    for name, change, *estimates in zip(found.layer_names, profile.change, *parts, strict=True):
        table.add_row(name, f"{change:.4g}", *map(str, estimates))
    console.print(table)
    console.print(f"Loss {found.tuned_loss:.4g}, with all layers restored {found.pretrained_loss:.4g}.")
    console.print(f"Change and worth: {found.rank_correlation(profile)}.", highlight=False)
    return found


def _loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    found: Tensor = model(**batch).loss
    return found


def _labelled(batches: list[dict[str, Tensor]], head: str, mask: int | None) -> list[dict[str, Tensor]]:
    """Returns the batches with labels: all real tokens, or 15 % of them, which are replaced by the mask token."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for batch in batches:
        ids, real = batch["input_ids"], batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        if head == "causal_lm":
            found.append(batch | {"labels": torch.where(real, ids, IGNORED)})
            continue
        assert mask is not None
        chosen = real & (torch.rand(ids.shape, generator=generator) < MASKED)
        labels = torch.where(chosen, ids, IGNORED)
        found.append(batch | {"input_ids": torch.where(chosen, mask, ids), "labels": labels})
    return found
