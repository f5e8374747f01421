"""``depthcb compare A B…``: computes the depth profiles between a model and others, such as a run's checkpoints."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from depthcb import Profile
from depthcb.compare import Comparison
from depthcb.probe import Probe, Rows
from depthcb.run import FOLDER, profile_row, write_header, write_row
from depthcb_recipes.backbones.checkpoints import Weights, empty_network, filled, load_into
from depthcb_recipes.backbones.loading import load_network, load_tokenizer
from depthcb_recipes.backbones.pretraining import pretrain_if_missing
from depthcb_recipes.backbones.series import Checkpoint, series
from depthcb_recipes.backbones.streaming import only_layer_after_layer, streamed
from depthcb_recipes.data.packed_text import PackedText

ROWS, LENGTH, BATCH = 64, 64, 16
NAME = "depth"


@dataclass(frozen=True)
class Opening:
    """How checkpoints are opened.

    Args:
        backbone: The backbone that files without a configuration go into.
        module: The class that they go into instead, see `depthcb_recipes.backbones.checkpoints.load_into`.
        stream: Whether weights are read layer by layer while the network runs.

    Raises:
        ValueError: Both ``module`` and ``backbone`` or ``stream`` are given.
    """

    backbone: str | None = None
    module: str | None = None
    stream: bool = False

    def __post_init__(self) -> None:
        if self.module and (self.backbone or self.stream):
            raise ValueError("--module cannot be used with --backbone or --stream: leave out one of them.")

    def open(self, checkpoint: Checkpoint) -> nn.Module:
        """Returns the network of a checkpoint, without a head.

        Raises:
            ValueError: It is not found, or its weights don't fit.
        """
        file, into = checkpoint.file, self.backbone
        if file is None:
            if not self.stream:
                return load_network(checkpoint.source, head=None, whole=True)
            return streamed(empty_network(checkpoint.source), Weights.of_backbone(checkpoint.source))
        if self.module:
            return load_into(self.module, file)
        if into is None:
            raise ValueError(f"{file} does not tell its network: say with --backbone NAME what its weights go into.")
        return (streamed if self.stream else filled)(empty_network(into), Weights.of(str(file), file))

    def guarded(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Says so where a network cannot be streamed, see `only_layer_after_layer`."""
        return only_layer_after_layer(name) if self.stream else contextlib.nullcontext()


def compare_backbones(
    reference: str,
    models: list[str],
    text: Path | None,
    rows: Rows,
    json_path: Path | None,
    console: Console,
    *,
    out: Path | None = None,
    tokenizer: str | None = None,
    opening: Opening | None = None,
) -> list[dict[str, Profile]]:
    """Measures and prints how much each layer of ``models`` differs from ``reference``.

    Args:
        reference: The pretrained model: a name accepted by `load_backbone`, or a file.
        models: The fine-tuned model or a series of checkpoints: see `series`.
        text: Text file to use as the probe, one example per line; None uses code of the Python standard library.
        rows: What a row is, see `depthcb.probe.Probe`.
        json_path: File to write the profiles to, as a JSON object with one entry per measure: a profile, or a list of
            them for a series.
        console: Console to print the table to.
        out: Folder for a record as a watched run leaves it, which ``depthcb report`` and ``depthcb show`` read.
        tokenizer: Name of the model whose tokenizer to use; None for that of ``reference``, or of the backbone that it
            goes into.
        opening: How checkpoints are opened; files go into ``reference`` by default, if that is a model.

    Returns:
        The profiles by measure, of each checkpoint.

    Raises:
        ValueError: A checkpoint is not found or has another architecture than the reference; there is no tokenizer, or
            it does not belong to the models; the text has fewer than 4 lines; or ``out`` has a record.
    """
    if out is not None and any((out / FOLDER).glob("*.jsonl")):
        raise ValueError(f"--out {out} has a record already: use a new folder.")
    first, checkpoints, opening = Checkpoint(reference, None), series(models), opening or Opening()
    if first.file is None and opening.backbone is None and opening.module is None:
        opening = replace(opening, backbone=reference)
    for name in {reference, *models, opening.backbone or reference, tokenizer or reference}:
        pretrain_if_missing(name)
    words = tokenizer or (opening.backbone if first.file else reference)
    if words is None:
        raise ValueError(f"{reference} has no tokenizer: name a model that has it with --tokenizer NAME.")
    reading = load_tokenizer(words)
    batches = read_text(text, reading) if text else PackedText(reading).probe_batches(ROWS, BATCH, block_size=LENGTH)
    with opening.guarded(reference):
        before = opening.open(first)
        _check_vocabulary(before, batches, reference, words)
        comparison = Comparison.with_reference(before, Probe(tuple(batches), rows=rows))
    kind = type(before)
    del before  # one network at a time
    if out is not None:
        write_header(out, NAME, "DepthProfile", 0, comparison.reference.settings(comparison.measures, rows))
    found = []
    for checkpoint in checkpoints:
        with opening.guarded(checkpoint.source):
            model = opening.open(checkpoint)
            if opening.module is None and type(model) is not kind:
                raise ValueError(
                    f"{checkpoint.source} is a {type(model).__name__}, {reference} a {kind.__name__}: compare networks "
                    "of the same architecture."
                )
            found.append(comparison.profiles(model, checkpoint.step or 0))
            del model
        if out is not None:
            write_row(out, NAME, profile_row(found[-1]))
        if len(checkpoints) > 1:
            console.print(f"step {checkpoint.step}: {checkpoint.source}", highlight=False, soft_wrap=True)
            _print_lines(found[-1], console)
    if out is not None:
        write_row(out, NAME, {"step": checkpoints[-1].step or 0, "end": {}})
    if json_path is not None:
        json_path.write_text(json.dumps(_content(found), indent=1) + "\n", encoding="utf-8")
    _print_table(f"{checkpoints[-1].source} against {reference}", found[-1], console)
    return found


def _content(found: list[dict[str, Profile]]) -> dict[str, Any]:
    listed = {name: [profiles[name].to_dict() for profiles in found] for name in found[0]}
    return listed if len(found) > 1 else {name: profiles[0] for name, profiles in listed.items()}


def _print_table(title: str, profiles: dict[str, Profile], console: Console) -> None:
    table = Table(title=title)
    table.add_column("layer")
    for name in profiles:
        table.add_column(f"change ({name})", justify="right")
    for layer in zip(next(iter(profiles.values())).layer_names, *(p.change for p in profiles.values()), strict=True):
        table.add_row(layer[0], *(f"{c:.4g}" for c in layer[1:]))
    console.print(table)
    _print_lines(profiles, console)


def _print_lines(profiles: dict[str, Profile], console: Console) -> None:
    for name, profile in profiles.items():
        console.print(_line(name, profile), highlight=False, soft_wrap=True)


def _line(name: str, p: Profile) -> str:
    if p.relative_slope is None or p.width is None:
        return f"{name}: nothing changed"
    interval = "" if p.slope_interval is None else f" [{p.slope_interval[0]:+.3g}, {p.slope_interval[1]:+.3g}]"
    return f"{name}: slope {p.slope:+.3g}{interval}, relative slope {p.relative_slope:+.3g}, width {p.width:.2f}"


def _check_vocabulary(model: nn.Module, batches: list[dict[str, Tensor]], name: str, tokenizer: str) -> None:
    embedded = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    largest = max(int(batch["input_ids"].max()) for batch in batches)
    if isinstance(embedded, nn.Embedding) and largest >= embedded.num_embeddings:
        raise ValueError(
            f"The tokenizer of {tokenizer} has token {largest}, {name} only {embedded.num_embeddings}: name the model "
            "that it was trained with by --tokenizer NAME."
        )


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
