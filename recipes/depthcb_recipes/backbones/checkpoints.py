"""Checkpoint files without a configuration: Lightning's ``.ckpt`` and safetensors, and the networks they go into.

A file is only opened when its tensors are needed. Which of its keys belong to a network is decided by one prefix, such
as ``model.transformer.``: the only one under which the file has all weights of the network.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import pickle
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from lightning.pytorch import LightningModule
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from depthcb_recipes.backbones.loading import folder_of, is_pooler, load_config

SUFFIXES = (".ckpt", ".safetensors")
#: How many keys an error names.
_SHOWN = 3


@dataclass(frozen=True)
class Weights:
    """The tensors of a checkpoint, which are read when they are needed.

    Args:
        name: What the checkpoint is called in errors.
        files: The file of each tensor, by key.
        shapes: The shape of each tensor, by key.
    """

    name: str
    files: Mapping[str, Path]
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, name: str, *paths: Path) -> Weights:
        """Finds the tensors of a checkpoint's files.

        Raises:
            ValueError: A file cannot be read, or has no weights.
        """
        files: dict[str, Path] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for path in paths:
            with _opened(path) as tensors:
                files |= dict.fromkeys(tensors, path)
                shapes |= {key: tensors[key].shape for key in tensors}
        return cls(name, files, shapes)

    @classmethod
    def of_backbone(cls, name: str) -> Weights:
        """Finds the tensors of a backbone, as `load_backbone` takes it.

        Raises:
            ValueError: It is not saved as safetensors.
        """
        source = folder_of(name)
        options: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False}
        if whole := cached_file(source, SAFE_WEIGHTS_NAME, **options):
            return cls.of(name, Path(whole))
        index = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, **options)
        if index is None:
            raise ValueError(
                f"{name!r} has no {SAFE_WEIGHTS_NAME}: save it with save_pretrained, or leave out --stream."
            )
        return cls.of(name, *map(Path, _shards(source, index)))

    def read(self, keys: Collection[str]) -> dict[str, Tensor]:
        """Reads tensors into memory of their own; floating-point ones as fp32."""
        found = {}
        for path in {self.files[key] for key in keys}:
            with _opened(path) as tensors:
                for key in (key for key in keys if self.files[key] == path):
                    tensor = tensors[key].tensor()
                    kind = torch.float32 if tensor.is_floating_point() else tensor.dtype
                    found[key] = tensor.to(kind, copy=True)
        return found


class _Saved:
    """A tensor in an open file."""

    def __init__(self, shape: tuple[int, ...], tensor: Any) -> None:
        self.shape, self.tensor = shape, tensor


def _shards(source: str, index: str) -> list[str]:
    found: Callable[..., Any] = get_checkpoint_shard_files
    return list(found(source, index)[0])


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[dict[str, _Saved]]:
    """Opens a file; its memory map is closed with the last tensor that is used of it."""
    if not path.is_file():
        raise ValueError(f"There is no checkpoint {path}: pass a file ({', '.join(SUFFIXES)}), a folder or a hub id.")
    if path.suffix == ".ckpt":
        state = load_ckpt(path)["state_dict"]
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        yield {key: _Saved(tuple(value.shape), lambda value=value: value) for key, value in tensors.items()}
        return
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            yield {key: _Saved(shape, lambda key=key: file.get_tensor(key)) for key, shape in shapes.items()}
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read as safetensors ({error}): save it again.") from error


def load_ckpt(path: Path) -> dict[str, Any]:
    """Loads a Lightning checkpoint with ``weights_only=True``: nothing in the file is executed.

    Raises:
        ValueError: It holds other objects than tensors and plain values, or no ``state_dict``.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        what = re.findall(r"GLOBAL ([\w.]+)", str(error))
        raise ValueError(
            f"{path} cannot be loaded by weights only ({f'it holds a {what[0]}' if what else 'it is damaged'}): save "
            'the weights alone, torch.save({"state_dict": module.state_dict()}, FILE) with a name that ends in .ckpt.'
        ) from error
    if not isinstance(found, dict) or not isinstance(found.get("state_dict"), dict):
        raise ValueError(f"{path} has no state_dict: it is not a Lightning checkpoint.")
    return found


def fitted(model: nn.Module, weights: Weights) -> dict[str, str]:
    """Returns the checkpoint's key of each weight of a network; poolers may be missing.

    Args:
        model: The network, or its empty form.
        weights: The checkpoint, of the network or of something that has it as a part.

    Raises:
        ValueError: The checkpoint does not have exactly one full set of the weights, it has others among them, or they
            have other shapes.
    """
    saved, wanted = weights.files, model.state_dict(keep_vars=True)
    shared: dict[int, list[str]] = {}
    for key, value in wanted.items():
        shared.setdefault(id(value), []).append(key)
    alike = {key: shared[id(value)] for key, value in wanted.items()}  # tied weights are saved once
    needed = [key for key in wanted if not is_pooler(key)]
    first = needed[0]
    ends = {key[: -len(first)] for key in saved if key == first or key.endswith(f".{first}")}

    def missing(prefix: str) -> list[str]:
        return [key for key in needed if not any(prefix + other in saved for other in alike[key])]

    prefixes = sorted(prefix for prefix in ends if not missing(prefix))
    kind = type(model).__name__
    if len(prefixes) > 1:
        raise ValueError(
            f"{weights.name} has several sets of weights of a {kind} (keys that start with "
            f"{' and '.join(map(repr, prefixes))}): save one of them alone."
        )
    if not prefixes:
        nearest = min(ends, key=lambda prefix: len(missing(prefix)), default="")
        raise ValueError(
            f"{weights.name} is not a checkpoint of a {kind}: it lacks {_some(missing(nearest))} and has "
            f"{_some([key for key in saved if key.removeprefix(nearest) not in wanted])}; say with --backbone or "
            "--module what it goes into."
        )
    prefix = prefixes[0]
    old = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    inside = [key for key in saved if key.startswith(prefix)]
    extra = [k for k in inside if k[len(prefix) :] not in wanted and not any(re.search(p, k) for p in old)]
    if extra:
        raise ValueError(f"{weights.name} has weights that a {kind} has no place for: {_some(extra)}.")
    found = {key: prefix + other for key in wanted for other in alike[key] if prefix + other in saved}
    for key, name in found.items():
        if tuple(wanted[key].shape) != tuple(weights.shapes[name]):
            raise ValueError(
                f"{weights.name} has {name} of shape {tuple(weights.shapes[name])}, the {kind} of shape "
                f"{tuple(wanted[key].shape)}: it is a checkpoint of another network."
            )
    return found


def empty_network(name: str) -> nn.Module:
    """Returns a backbone without a head whose parameters have no memory yet (on the meta device).

    Args:
        name: See `depthcb_recipes.load_backbone`.
    """
    make: Callable[[Any], nn.Module] = AutoModel.from_config
    with init_empty_weights(include_buffers=False):
        return make(load_config(name))


def filled(model: nn.Module, weights: Weights) -> nn.Module:
    """Returns the network with a checkpoint's weights; poolers that the checkpoint lacks are 0.

    Raises:
        ValueError: See `fitted`.
    """
    keys = fitted(model, weights)
    read = weights.read(set(keys.values()))
    absent = {key: torch.zeros(value.shape) for key, value in model.state_dict().items() if key not in keys}
    model.load_state_dict({key: read[name] for key, name in keys.items()} | absent, assign=True)
    return model


def load_into(module: str, path: Path) -> nn.Module:
    """Loads a checkpoint into a user's class.

    Args:
        module: ``file.py:Class`` or ``package.module:Class``. A LightningModule is built with the hyperparameters in
            its ``.ckpt``; anything else is called without arguments.
        path: The checkpoint.

    Raises:
        ValueError: There is no such class, or the weights don't fit it.
    """
    make = _imported(module)
    if isinstance(make, type) and issubclass(make, LightningModule) and path.suffix == ".ckpt":
        load_ckpt(path)  # for its errors
        try:
            return make.load_from_checkpoint(path, map_location="cpu", weights_only=True)
        except (RuntimeError, TypeError) as error:
            told = " ".join(str(error).split())[:300]
            raise ValueError(
                f"{path} does not go into {module} ({told}): name the class that it was saved by."
            ) from error
    return filled(make(), Weights.of(str(path), path))


def _imported(module: str) -> Any:
    source, _, name = module.rpartition(":")
    try:
        if source.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(source).stem, source)
            assert spec is not None
            assert spec.loader is not None
            found = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(found)
        else:
            found = importlib.import_module(source)
        return getattr(found, name)
    except (ImportError, OSError, AttributeError, ValueError) as error:
        raise ValueError(
            f"--module {module} cannot be imported ({error}): pass file.py:Class or package.module:Class."
        ) from error


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(keys[:_SHOWN]) + more if keys else "nothing else"
