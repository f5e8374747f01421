"""The paper's 15 networks with their depth and block type, but narrow, and text to train them on; no network needed."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import transformers as hf
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from depthcb_recipes.backbones.architectures import ARCHITECTURES

PAPER = Path(__file__).parents[1] / "recipes" / "depthcb_recipes" / "studies" / "paper.yaml"
#: The narrow sizes by architecture; heads stay in number where the width allows, and every other field is the original's.
WIDTH = 32
_WIDE = {"hidden_size": WIDTH, "intermediate_size": 64, "max_position_embeddings": 66}
_GPT = {"n_embd": WIDTH, "n_positions": 64, "n_head": 4}
SMALLER: dict[str, dict[str, Any]] = {
    "bert": _WIDE | {"num_attention_heads": 4},
    "roberta": _WIDE | {"num_attention_heads": 4},
    "gpt2": _GPT,
    "opt": {"hidden_size": WIDTH, "ffn_dim": 64, "num_attention_heads": 4, "max_position_embeddings": 64},
    "gpt_neox": _WIDE | {"num_attention_heads": 4},
    "codegen": _GPT | {"n_ctx": 64, "rotary_dim": 4},
    "mamba": {"hidden_size": WIDTH, "intermediate_size": 64, "state_size": 4, "time_step_rank": 2},
    "rwkv": {"hidden_size": WIDTH, "attention_hidden_size": WIDTH, "intermediate_size": 64, "context_length": 64},
}


def paragraphs() -> list[str]:
    """Paragraphs of the language reference that comes with Python, unique and in order."""
    whole = "\n\n".join(topics.values()).split("\n\n")
    joined = (" ".join(part.split()) for part in whole)
    return [part for part in dict.fromkeys(joined) if len(part) > 200]


def write_tokenizer(folder: Path) -> int:
    """Saves a byte-level tokenizer with few tokens, and returns how many."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "mask_token": "<mask>", "cls_token": "<cls>"}
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=list(special.values()), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(paragraphs()[:200], trainer)
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=64, **special)  # type: ignore[no-untyped-call]
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def write_model(name: str, folder: Path) -> Path:
    """Saves a narrow copy of a network, with random weights and the head that the checkpoint has."""
    found = ARCHITECTURES[name]
    narrow = dict(SMALLER[found.model_type])
    if found.model_type == "opt":
        projected = found.settings["word_embed_proj_dim"] < found.settings["hidden_size"]
        narrow["word_embed_proj_dim"] = WIDTH // 2 if projected else WIDTH
    ids = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    config = found.config(**narrow, **ids, vocab_size=write_tokenizer(folder))
    torch.manual_seed(0)
    getattr(hf, found.head)(config).save_pretrained(folder)
    return folder


def write_text(folder: Path) -> Path:
    """Saves data sets of the kinds that paper.yaml names: paragraphs below titles, labelled texts, labelled words."""
    own = paragraphs()
    sides = {"train": own[:160], "validation": own[160:240], "test": own[240:]}
    for side, texts in sides.items():
        articles = [line for i, text in enumerate(texts) for line in ([f"= Part {i} ="] if i % 2 == 0 else []) + [text]]
        labelled = [{"content": text, "label": len(text) % 2} for text in texts]
        words = [text.split()[:20] for text in texts]
        tagged = [{"tokens": w, "ner_tags": ["cap" if x[:1].isupper() else "low" for x in w]} for w in words]
        for kind, rows in (("wiki", [{"text": a} for a in articles]), ("labelled", labelled), ("tagged", tagged)):
            path = folder / kind / f"{side}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def paper_in_small(folder: Path, models: dict[str, Path], text: Path, grid: dict[str, Any]) -> Path:
    """paper.yaml with local folders in place of hub ids, one small grid, and few steps; all else is as it stands.

    Args:
        folder: Where the study's file goes.
        models: Folders of models by hub id.
        text: What `write_text` made.
        grid: Axes of the grid beside the models.
    """
    study = yaml.safe_load(PAPER.read_text())
    study["grid"] = [{"model": list(map(str, models.values())), "optimizer": ["adamw"], **grid}]
    local = {"Salesforce/wikitext": "wiki", "fancyzhx/dbpedia_14": "labelled", "unimelb-nlp/wikiann": "tagged"}
    study["by"]["objective"] = {name: study["by"]["objective"][name] for name in grid["objective"]}
    for options in (study["options"], *study["by"]["objective"].values()):
        for key in [k for k in options if k.endswith(".dataset")]:
            options[key] = str(text / local[options[key]])
        for key in [k for k in options if k.endswith(".config")]:
            del options[key]
    study |= {"threads": 1, "gpus": 0, "null_seeds": 1}
    small = {"trainer.max_steps": 2, "trainer.val_check_interval": 2, "trainer.log_every_n_steps": 1, "model.lr": 1e-3,
             "model.warmup_steps": 0, "trainer.precision": "32-true", "trainer.limit_val_batches": 6,
             "data.batch_size": 4, "data.val_rows": 24, "probe.rows": 24, "probe.max_length": 16}  # fmt: skip
    study["options"] |= small
    study["by"]["family"]["encoder"]["trainer.max_steps"] = 3
    lengths = {"causal_lm": "data.block_size"}
    for name, options in study["by"]["objective"].items():
        options[lengths.get(name, "data.max_length")] = 16
    study["by"]["model"] = {}
    path = folder / "paper.yaml"
    path.write_text(yaml.safe_dump(study))
    return path
