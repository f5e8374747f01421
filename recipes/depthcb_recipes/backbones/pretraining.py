"""Pretrains the models of the mini zoo on this machine, on the source of the Python standard library."""

from __future__ import annotations

import copy
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from datasets import Dataset
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from depthcb.isolation import isolated_rng
from depthcb_recipes.backbones import zoo
from depthcb_recipes.backbones.loading import AUTOS
from depthcb_recipes.backbones.zoo import BLOCK, MINI_ZOO, SPECIAL, VOCABULARY, ZOO, MiniModel
from depthcb_recipes.cache import writing_cache
from depthcb_recipes.data.corpus import in_hashed_order, python_corpus, split_by_file
from depthcb_recipes.data.packed_text import blocks, masking
from depthcb_recipes.fit_progress import FitProgress, StepClock
from depthcb_recipes.objectives.causal_lm import CausalLM
from depthcb_recipes.objectives.masked_lm import MaskedLM
from depthcb_recipes.objectives.objective import Objective
from depthcb_recipes.precision import Precision, settle
from depthcb_recipes.publish import published, remove_left_over
from depthcb_recipes.silence import silent_libraries, silent_transformers

#: Approximate duration of pretraining one model, in minutes.
MINUTES = 6.0


def pretrain_if_missing(name: str, minutes: float = MINUTES) -> None:
    """Pretrains a model of the mini zoo unless that has been done on this machine; ignores other names.

    Args:
        name: Name of a backbone, see `depthcb_recipes.load_backbone`.
        minutes: See `pretrain`.
    """
    if name in ZOO:
        pretrain(name, ZOO[name], minutes)


def pretrain(name: str, model: MiniModel, minutes: float = MINUTES) -> Path:
    """Pretrains a small model on this machine unless that has been done, and returns its folder.

    The folder contains the output of ``save_pretrained`` and ``pretraining.json`` with the losses. Its name depends on
    the settings, the text and the library versions. It is created atomically, so an interrupted pretraining starts from
    scratch. A second process that needs the same model waits for the first. The global random state is not touched.

    Args:
        name: Prefix of the folder's name.
        model: Model and training settings.
        minutes: Time limit for the training steps. On slow machines, fewer steps are run; ``pretraining.json`` records
            how many.

    Raises:
        CacheError: The model is not in the cache folder, which cannot be written.
    """
    folder = zoo.folder(name, model)
    if zoo.is_pretrained(folder):  # a cache that others filled need not be writable
        return folder
    with writing_cache():
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f".{folder.name}.lock")).acquire()
    with lock:
        if not zoo.is_pretrained(folder):
            takes = f", about {minutes:g} minutes" if name in MINI_ZOO else ""
            print(f"Pretraining {name} once ({model.steps} steps{takes}) and saving it to {folder}", flush=True)
            remove_left_over(folder)
            with (
                published(folder) as fresh,
                torch.device("cpu"),
                isolated_rng(model.seed),
                silent_libraries(),
                silent_transformers(),
            ):
                _train(name, model, fresh, minutes)
    return folder


def shortened(model: MiniModel, step_seconds: float, minutes: float) -> MiniModel:
    """Reduces the number of steps to fit the time limit: all, three quarters or at least half of them.

    Masked language models always get all steps, since they learn from only a seventh of the tokens.

    Args:
        model: Model and training settings.
        step_seconds: Duration of a training step on this machine.
        minutes: Time limit for the steps, which may be exceeded by 15 %.

    Example:
        >>> [shortened(MINI_ZOO["gpt2-mini"], seconds, 6).steps for seconds in (0.6, 0.8, 9.0)]
        [600, 450, 300]
    """
    for share in () if model.head == "masked_lm" else (1.0, 0.75, 0.5):
        fewer = replace(model, steps=round(share * model.steps), warmup_steps=round(share * model.warmup_steps))
        if fewer.steps * step_seconds <= 60 * minutes * 1.15:
            return fewer
    return model if model.head == "masked_lm" else fewer


def _step_seconds(network: PreTrainedModel, model: MiniModel, precision: Precision, batch: dict[str, Tensor]) -> float:
    """Returns the minimum duration of a few training steps on a copy of the network."""
    clock = StepClock()
    trainer = _trainer(6, precision, clock)
    trainer.fit(_objective(copy.deepcopy(network), model), DataLoader([batch] * 6, batch_size=None))  # type: ignore[arg-type]
    return min(clock.seconds[2:])


def _objective(network: PreTrainedModel, model: MiniModel) -> Objective:
    kind = MaskedLM if model.head == "masked_lm" else CausalLM
    return kind(network, lr=model.lr, warmup_steps=model.warmup_steps)


def _train(name: str, model: MiniModel, folder: Path, minutes: float) -> None:
    texts = [_texts(side) for side in (0, 1)]
    tokenizer = _tokenizer()
    train = Dataset.from_dict({"input_ids": list(blocks(texts[0], tokenizer, BLOCK))})
    held_out = list(itertools.islice(blocks(texts[1], tokenizer, BLOCK), 128))
    network = AUTOS[model.head].from_config(model.config())
    bias = getattr(network.get_output_embeddings(), "bias", None)
    if bias is not None:  # learning the token frequencies would take hundreds of steps
        bias.data.copy_(_unigram(train["input_ids"][:], VOCABULARY).log())
    held_out_batches = list(_held_out_batches(held_out, model, tokenizer))
    precision = settle("auto", torch.device("cpu"))
    if name in MINI_ZOO:
        example = {key: value[: model.batch_size] for key, value in held_out_batches[0].items()}
        seconds, whole = _step_seconds(network, model, precision, example), model.steps
        model = shortened(model, seconds, minutes)
        takes = f"{model.steps} of {whole} steps, about {model.steps * seconds / 60:.0f} min"
        print(f"A step takes {seconds:.2f} s in {precision.precision} on this machine: {takes}.", flush=True)
    objective = _objective(network, model)
    order = torch.Generator().manual_seed(model.seed)
    batches = DataLoader(train, model.batch_size, shuffle=True, generator=order, collate_fn=_collate(model, tokenizer))
    start = time.perf_counter()
    trainer = _trainer(model.steps, precision, FitProgress(name))
    before = _held_out_loss(trainer, objective, held_out_batches)
    trainer.fit(objective, batches)
    after = _held_out_loss(trainer, objective, held_out_batches)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    report = {
        "model": name,
        **asdict(model),
        "parameters": sum(p.numel() for p in network.parameters()),
        "tokens": model.steps * model.batch_size * BLOCK,
        "held_out_loss_before": before,
        "held_out_loss": after,
        "held_out_unigram_loss": unigram_loss(train["input_ids"][:], held_out),
        "precision": precision.to_dict(),
        "seconds": time.perf_counter() - start,
        "text_sha256": zoo.corpus_hash(),
        "versions": zoo.versions(),
        "sha256": {name: zoo.checksum(folder / name) for name in zoo.FILES},
    }
    (folder / zoo.REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def unigram_loss(train: Sequence[Sequence[int]], held_out: Sequence[Sequence[int]]) -> float:
    """Returns the loss of a unigram model in nats per token, as a baseline for trained models.

    Token frequencies are taken from the training text with add-one smoothing.

    Example:
        >>> round(unigram_loss([[0, 0, 1]], [[0], [1]]), 4)  # shares 3/5 and 2/5
        0.7136
    """
    shares = _unigram(train, max(map(max, held_out)) + 1)
    return float(-shares[torch.tensor(held_out)].log().mean())


def _unigram(rows: Sequence[Sequence[int]], size: int = 0) -> Tensor:
    """Returns the frequency of each token, with add-one smoothing."""
    counts = torch.tensor(rows).flatten().bincount(minlength=size).double() + 1
    return counts / counts.sum()


def _trainer(steps: int, precision: Precision, callback: pl.Callback) -> pl.Trainer:
    return pl.Trainer(
        max_steps=steps, accelerator="cpu", devices=1, precision=precision.precision,  # type: ignore[arg-type]
        gradient_clip_val=1.0, logger=False, callbacks=[callback], enable_checkpointing=False,
        enable_progress_bar=isinstance(callback, FitProgress), enable_model_summary=False,
        limit_val_batches=0, inference_mode=False,
    )  # fmt: skip


def _held_out_loss(trainer: pl.Trainer, objective: Objective, batches: list[dict[str, Tensor]]) -> float:
    objective.eval()
    with torch.no_grad(), trainer.precision_plugin.forward_context():
        losses = [objective.loss(batch) for batch in batches]
    objective.train()
    return float(sum(x.value * x.weight for x in losses) / sum(x.weight for x in losses))


def _collate(model: MiniModel, tokenizer: PreTrainedTokenizerFast) -> Any:
    if model.head == "masked_lm":
        return masking(tokenizer, model.mask_probability, model.seed)
    return DataCollatorForLanguageModeling(tokenizer, mlm=False)


def _held_out_batches(rows: Any, model: MiniModel, tokenizer: PreTrainedTokenizerFast) -> Iterator[dict[str, Tensor]]:
    collate = _collate(replace(model, mask_probability=0.15, seed=1), tokenizer)
    rows = Dataset.from_dict({"input_ids": rows})
    yield from DataLoader(rows, 16, collate_fn=collate, generator=torch.Generator())


@cache
def _tokenizer() -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer on the training text, shared by all models."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_texts(0), trainer)
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    tokens = {f"{name}_token": token for name, token in SPECIAL.items()}
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bpe, bos_token=SPECIAL["eos"], model_max_length=512, **tokens
    )


@cache
def _texts(side: int) -> list[str]:
    """Returns code and prose of one split (0: training, 1: held out) in hash order."""
    parts = [split_by_file(python_corpus(kind))[side]["text"] for kind in ("code", "prose")]
    return in_hashed_order([text for part in parts for text in part], seed=0)
