"""``depthcb compare A B``: computes the depth profile between two models on a text, without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from depthcb import Profile, depth_profile
from depthcb.probe import Rows
from depthcb_recipes.backbones.loading import load_backbone
from depthcb_recipes.backbones.pretraining import pretrain_if_missing
from depthcb_recipes.data.packed_text import PackedText

ROWS, LENGTH, BATCH = 64, 64, 16


def compare_backbones(
    reference: str, model: str, text: Path | None, rows: Rows, json_path: Path | None, console: Console
) -> dict[str, Profile]:
    """Measures and prints how much each layer of ``model`` differs from ``reference``.

    Args:
        reference: The pretrained model: a name accepted by `load_backbone`.
        model: The fine-tuned model: likewise.
        text: Text file to use as the probe, one example per line; None uses code of the Python standard library.
        rows: What a row is, see `depthcb.probe.Probe`.
        json_path: File to write the profiles to, as a JSON object with one entry per measure.
        console: Console to print the table to.

    Returns:
        The profiles by measure.

    Raises:
        ValueError: If a model is not found, the models differ in depth, or the text has fewer than 4 lines.
    """
    for name in (reference, model):
        pretrain_if_missing(name)
    before, tokenizer = load_backbone(reference, head=None)
    after, _ = load_backbone(model, head=None)
    batches = (
        read_text(text, tokenizer) if text else PackedText(tokenizer).probe_batches(ROWS, BATCH, block_size=LENGTH)
    )
    profiles = depth_profile(before, after, batches, rows=rows)
    if json_path is not None:
        content = {name: profile.to_dict() for name, profile in profiles.items()}
        json_path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    table = Table(title=f"{model} against {reference}")
    table.add_column("layer")
    for name in profiles:
        table.add_column(f"change ({name})", justify="right")
    for layer in zip(next(iter(profiles.values())).layer_names, *(p.change for p in profiles.values()), strict=True):
        table.add_row(layer[0], *(f"{c:.4g}" for c in layer[1:]))
    console.print(table)
    for name, profile in profiles.items():
        console.print(_line(name, profile), highlight=False, soft_wrap=True)
    return profiles


def _line(name: str, p: Profile) -> str:
    if p.relative_slope is None or p.width is None:
        return f"{name}: nothing changed"
    interval = "" if p.slope_interval is None else f" [{p.slope_interval[0]:+.3g}, {p.slope_interval[1]:+.3g}]"
    return f"{name}: slope {p.slope:+.3g}{interval}, relative slope {p.relative_slope:+.3g}, width {p.width:.2f}"


def read_text(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Tensor]]:
    """Returns the non-empty lines of a file as batches.

    Raises:
        ValueError: There is no such file, or it has too few lines.
    """
    if not path.is_file():
        raise ValueError(f"--text {path} is not a file: use a text file with one example per line.")
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()][:ROWS]
    if len(lines) < 4:
        raise ValueError(f"--text {path} has {len(lines)} non-empty lines: at least 4 are needed.")
    groups = [lines[i : i + BATCH] for i in range(0, len(lines), BATCH)]
    options: dict[str, Any] = {"padding": True, "truncation": True, "max_length": LENGTH, "return_tensors": "pt"}
    return [dict(tokenizer(group, **options)) for group in groups]
