"""Catalogue of backbones, with family, block type, depth and size determined from the network itself."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import yaml
from rich.box import SIMPLE_HEAD
from rich.table import Table
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

import depthcb_recipes
from depthcb import LayerStack
from depthcb.isolation import isolated_rng
from depthcb_recipes.backbones.architectures import ARCHITECTURES, BlockType, Family
from depthcb_recipes.backbones.block_type import block_type
from depthcb_recipes.backbones.loading import PACKAGED, BackboneNotFoundError, is_encoder, load_config
from depthcb_recipes.backbones.zoo import MINI_ZOO, ZOO
from depthcb_recipes.silence import silent_transformers

#: The 15 hub networks of the study [ours].
HUB = tuple(ARCHITECTURES)


@dataclass(frozen=True)
class Backbone:
    """Description of a pretrained network. Fields other than the name and source are None if its config is unavailable.

    Args:
        name: Name accepted by ``load_backbone``.
        source: Where the weights come from.
        family: ``"encoder"``, ``"decoder"``, ``"state-space"`` or ``"recurrent"``.
        block: ``"sequential"``, ``"parallel"`` or ``"single"``, see `block_type`.
        layers: Number of layers of the depth stack.
        parameters: Number of parameters without a head.
    """

    name: str
    source: str
    family: Family | None = None
    block: BlockType | None = None
    layers: int | None = None
    parameters: int | None = None


def backbones() -> Iterator[Backbone]:
    """Yields all packaged backbones, then the mini zoo, then the hub networks of the study.

    Hub networks are described by `ARCHITECTURES`, without a network.
    """
    for entry in PACKAGED.values():
        yield describe(entry.name)
    for name in MINI_ZOO:
        yield describe(name)
    for name in HUB:
        found = ARCHITECTURES[name]
        whole = _without_storage(found.config())
        yield Backbone(name, "hub", found.family, found.block, len(LayerStack.find(whole)), _numbers(whole))


def backbones_table(names: Sequence[str] = ()) -> tuple[Table, list[str]]:
    """Returns a printable table of the named backbones, or of all, and what is wrong with those that were not found."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    for title in ("name", "family", "block", "layers", "size", "from"):
        table.add_column(title, justify="right" if title in ("layers", "size") else "left", no_wrap=True)
    found, problems = [], []
    for name in names:
        try:
            found.append(describe(name))
        except ValueError as error:
            problems.append(str(error))
    for b in found if names else backbones():
        size = f"{b.parameters / 1e6:,.1f} M" if b.parameters else ""
        table.add_row(b.name, b.family, b.block, str(b.layers or ""), size, b.source)
    return table, problems


def objectives_table() -> Table:
    """Returns a printable table of the objectives with their bundled YAML files."""
    table = Table("objective", "what it trains", "depthcb fit --config", box=SIMPLE_HEAD, pad_edge=False)
    for path in sorted(depthcb_recipes.CONFIGS.glob("*.yaml")):
        name = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["class_path"].rpartition(".")[2]
        what = (getattr(depthcb_recipes, name).__doc__ or "").strip().partition("\n")[0]
        table.add_row(name, what, path.stem)
    return table


def family_of(name: str) -> Family:
    """Returns the family of a backbone, from its configuration.

    Raises:
        BackboneNotFoundError: See ``load_backbone``.
    """
    return family(config_of(name))


def describe(name: str) -> Backbone:
    """Describes a backbone from its configuration and a shallow, randomly initialised copy.

    Args:
        name: See ``load_backbone``.

    Returns:
        The description. If the backbone is packaged and its wheel is not installed, only the name and source are given.

    Raises:
        BackboneNotFoundError: See ``load_backbone``; not raised if the backbone is packaged.
    """
    packaged = PACKAGED.get(name)
    source = "wheel" if packaged else "pretrained" if name in ZOO else "hub" if name in HUB else "hub or disk"
    try:
        config = _config(name)
    except BackboneNotFoundError:
        if packaged:
            return Backbone(name, source)
        raise
    whole = _without_storage(config)
    return Backbone(name, source, family(config), _block(config), len(LayerStack.find(whole)), _numbers(whole))


def count_parameters(name: str) -> int:
    """Returns the number of parameters of a backbone without a head, from its configuration.

    Raises:
        BackboneNotFoundError: See ``load_backbone``.
    """
    return _numbers(_without_storage(_config(name)))


def config_of(name: str) -> PretrainedConfig:
    """Returns the configuration of a backbone; that of a network of the study needs no network.

    Raises:
        BackboneNotFoundError: See ``load_backbone``.
    """
    if name in ARCHITECTURES:
        return ARCHITECTURES[name].config()
    return _config(name)


def _config(name: str) -> PretrainedConfig:
    return ZOO[name].config() if name in ZOO else load_config(name)


def _without_storage(config: PretrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModel.from_config(config)  # type: ignore[no-untyped-call]
    return model


def _numbers(model: PreTrainedModel) -> int:
    return sum(p.numel() for p in model.parameters())


def family(config: PretrainedConfig) -> Family:
    """Returns the family of a network [paper's four]."""
    if config.model_type in ("rwkv", "xlstm"):
        return "recurrent"
    if config.model_type in ("mamba", "mamba2", "falcon_mamba"):
        return "state-space"
    return "encoder" if is_encoder(config) else "decoder"


def _block(config: PretrainedConfig) -> BlockType:
    """Returns the block type, from a small copy with two layers and a tiny vocabulary in bfloat16."""
    shallow = copy.deepcopy(config)
    shallow.num_hidden_layers, shallow.vocab_size = 2, 64
    with isolated_rng(0), silent_transformers():
        model = AutoModel.from_config(shallow, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
        return block_type(model)
