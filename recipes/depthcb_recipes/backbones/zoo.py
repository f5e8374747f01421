"""The mini zoo: a small model of every family and block type.

All models are pretrained on this machine on the source of the Python standard library (see `pretraining`), so that
their pretraining is fully known. They are cached on disk under a hash of everything that determines their weights.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import tokenizers
import torch
import transformers
from transformers import AutoConfig, PretrainedConfig

from depthcb_recipes.cache import cache_folder
from depthcb_recipes.data.corpus import corpus_fingerprint, python_corpus

Head = Literal["causal_lm", "masked_lm"]

VOCABULARY = 8192
BLOCK = 128
SPECIAL = {"eos": "<eos>", "pad": "<pad>", "unk": "<unk>", "mask": "<mask>", "cls": "<cls>", "sep": "<sep>"}
_IDS = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "tie_word_embeddings": True}
# No dropout: training takes less than one epoch, so there is no overfitting.
_GPT = {**_IDS, "n_embd": 192, "n_layer": 8, "n_positions": 512, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
_SIZES = {**_IDS, "hidden_size": 192, "num_hidden_layers": 8}
_ATTENTION = {**_SIZES, "num_attention_heads": 6, "max_position_embeddings": 512}
_BERT = {**_ATTENTION, "intermediate_size": 768, "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
_OPT = {**_ATTENTION, "ffn_dim": 768, "word_embed_proj_dim": 192, "dropout": 0}


@dataclass(frozen=True)
class MiniModel:
    """A small model with its pretraining settings.

    Args:
        model_type: Architecture name in transformers.
        settings: Configuration; other fields have transformers' defaults.
        head: Pretraining objective.
        lr: Peak learning rate of AdamW.
        steps: Number of optimizer steps.
        warmup_steps: Number of warm-up steps.
        batch_size: Blocks of 128 tokens per step.
        mask_probability: Fraction of tokens to predict, for masked language models.
        seed: Seed for the initial weights, the order of the texts and the masks.
    """

    model_type: str
    settings: dict[str, Any]
    head: Head = "causal_lm"
    lr: float = 2e-3
    steps: int = 600
    warmup_steps: int = 60
    batch_size: int = 16
    mask_probability: float = 0.15
    seed: int = 0

    def config(self) -> PretrainedConfig:
        """Returns the transformers configuration."""
        return AutoConfig.for_model(self.model_type, **self.settings)


MINI_ZOO: dict[str, MiniModel] = {
    # A masked LM learns from only a seventh of the tokens, and post-norm blocks collapse at a learning rate of 2e-3.
    "bert-mini": MiniModel("bert", _BERT, "masked_lm", lr=1e-3, steps=1200, warmup_steps=150, batch_size=8),
    "gpt2-mini": MiniModel("gpt2", {**_GPT, "n_head": 6}),
    "opt-mini": MiniModel("opt", _OPT),
    "neox-mini": MiniModel("gpt_neox", {**_ATTENTION, "intermediate_size": 768, "use_parallel_residual": True}),
    "codegen-mini": MiniModel("codegen", {**_GPT, "n_head": 8, "n_ctx": 512, "rotary_dim": 12}),
    "mamba2-mini": MiniModel(
        "mamba2",
        {**_SIZES, "num_heads": 12, "head_dim": 32, "state_size": 32, "n_groups": 1, "expand": 2, "chunk_size": 32},
        steps=500,
    ),
    "rwkv-mini": MiniModel("rwkv", {**_SIZES, "context_length": 512, "rescale_every": 0}, steps=320, warmup_steps=40),
}

_TINY = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
_TINY_GPT = {"n_embd": 32, "n_layer": 4, "n_head": 2}
#: Tiny models pretrained for 2 steps, for quick tests.
TINY_ZOO: dict[str, MiniModel] = {
    name.replace("mini", "tiny"): replace(MINI_ZOO[name], settings=MINI_ZOO[name].settings | small, steps=2)
    for name, small in {
        "bert-mini": _TINY, "gpt2-mini": _TINY_GPT, "neox-mini": _TINY,
        "mamba2-mini": {"hidden_size": 32, "num_hidden_layers": 4, "num_heads": 4, "head_dim": 16},
    }.items()
}  # fmt: skip
ZOO = MINI_ZOO | TINY_ZOO


def folder(name: str, model: MiniModel) -> Path:
    """Returns the folder of a pretrained model, whose name depends on the settings, the text and the library versions.

    Args:
        name: Prefix of the folder's name.
        model: Model and training settings.
    """
    return cache_folder() / "mini-zoo" / f"{name}-{_state(model)}"


#: The files of a model, whose checksums its `REPORT` has.
FILES, REPORT = ("config.json", "model.safetensors", "tokenizer.json"), "pretraining.json"


def is_pretrained(folder: Path) -> bool:
    """Returns whether a folder contains a whole model; warns of a damaged one, which is then pretrained again."""
    if not all((folder / name).is_file() for name in (*FILES, REPORT)):
        return False
    try:
        expected = json.loads((folder / REPORT).read_bytes()).get("sha256", {})  # models of version 0.1 have none
        damaged = [name for name, digest in expected.items() if checksum(folder / name) != digest]
    except (ValueError, AttributeError, OSError):
        damaged = [REPORT]
    if damaged:
        warnings.warn(f"The model in {folder} is damaged ({', '.join(damaged)}): pretrain it again.", stacklevel=2)
    return not damaged


def checksum(path: Path) -> str:
    """Returns the SHA-256 of a file (a model of the mini zoo has 10 to 30 MB)."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def corpus_hash() -> str:
    """Returns the SHA-256 of the pretraining text."""
    joined = "".join(corpus_fingerprint(python_corpus(kind)) for kind in ("code", "prose"))
    return hashlib.sha256(joined.encode()).hexdigest()


def _state(model: MiniModel) -> str:
    made_by = {**asdict(model), "text": corpus_hash(), "special": SPECIAL, "block": BLOCK, **versions()}
    return hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:12]


def versions() -> dict[str, str]:
    """Returns the library and recipe versions that the weights depend on."""
    minor = {m.__name__: ".".join(m.__version__.split(".")[:2]) for m in (torch, transformers, tokenizers)}
    return {**minor, "recipe": "1"}  # increment when the pretraining or an objective changes
