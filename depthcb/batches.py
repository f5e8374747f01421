"""Probe inputs: collecting batches, inspecting them, and passing them to a model."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.data import DataLoader, IterableDataset

from depthcb.stack import WRAPPERS
from depthcb.warn import warn

LABELS = ("labels", "label")
#: Name of a (B,) integer tensor that gives the document of each example; it is not an input of the model.
DOCUMENT = "document"


def feed(model: nn.Module, batch: Any) -> Any:
    """Calls a model on a batch: a dict by keyword, a tuple by its first element, a tensor as is.

    Raises:
        ValueError: The model does not accept the batch.
    """
    if isinstance(batch, (tuple, list)):
        return feed(model, batch[0])
    keywords: dict[str, Any] = {}
    if isinstance(batch, Mapping):
        parameters = inspect.signature(_unwrapped(model).forward).parameters
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        inputs = {k: v for k, v in batch.items() if k not in LABELS and not (k == DOCUMENT and is_documents(v))}
        keywords = {k: v for k, v in inputs.items() if open_ended or k in parameters}
    try:
        return model(**keywords) if keywords else model(batch)
    except TypeError as error:
        raise ValueError(
            f"{type(model).__name__} cannot be called on a probe batch of type {type(batch).__name__} ({error}): pass "
            "forward=(model, batch) -> output."
        ) from error


def is_documents(value: Any) -> bool:
    """Returns whether a value is a (B,) tensor of document numbers."""
    return isinstance(value, Tensor) and value.dim() == 1 and not value.is_floating_point()


def documents(batches: Sequence[Any]) -> Tensor | None:
    """Returns the document of each example of the batches, (n,); None if a batch does not name them."""
    found = [batch.get(DOCUMENT) if isinstance(batch, Mapping) else None for batch in batches]
    known = [value for value in found if isinstance(value, Tensor) and is_documents(value)]
    return torch.cat(known).cpu() if len(known) == len(batches) else None


def batch_size(batch: Any) -> int:
    """Returns the number of examples: dimension 0 of the first tensor."""
    return next(len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim())


def collect_batches(source: Any, limit: int, seed: int = 0) -> list[Any]:
    """Returns CPU copies of a batch, a list of batches, or a random sample of a Dataset or DataLoader.

    Args:
        source: The source.
        limit: Number of examples to draw from a dataset; all batches of a list are used.
        seed: Seed of the sample.

    Raises:
        ValueError: The source is none of these.
    """
    return [tree_map_only(Tensor, lambda t: t.detach().cpu().clone(), _plain(b)) for b in _split(source, limit, seed)]


def _split(source: Any, limit: int, seed: int) -> list[Any]:
    if isinstance(source, (Tensor, Mapping, tuple)):
        return [source]
    if isinstance(source, list):
        # default_collate turns (x, y) pairs into the list [x, y]: tensors of different dtypes or shapes are one batch.
        one = all(isinstance(b, Tensor) for b in source) and len({(b.dtype, b.shape[1:]) for b in source}) > 1
        return [source] if one else source
    if not isinstance(source, DataLoader):
        indexed = hasattr(source, "__getitem__") and hasattr(source, "__len__")
        if not (indexed or isinstance(source, IterableDataset)):
            raise ValueError(
                f"probe={type(source).__name__}: pass a batch, a list of batches, a Dataset with a length, or a "
                "DataLoader."
            )
        source = DataLoader(source, batch_size=32)
    return _drawn(source, limit, seed)


def _drawn(loader: DataLoader[Any], limit: int, seed: int) -> list[Any]:
    """Returns batches of a random sample of the loader's dataset, made by its collate function.

    The loader itself is never iterated, and its dataset is read in another process: reading may draw random numbers,
    count, or fill a cache, and training must not notice.
    """
    options: dict[str, Any] = {
        "batch_size": None if loader.batch_sampler is None else loader.batch_size or 32,
        "collate_fn": loader.collate_fn,
        "generator": torch.Generator().manual_seed(seed),
    }
    dataset: Any = loader.dataset
    if isinstance(dataset, IterableDataset):
        warn(
            f"The probe is made of the first {limit} examples of {type(dataset).__name__}, which can only be iterated: "
            "they are no random sample. Pass probe= with a sample of your own to choose better ones."
        )
    else:
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:limit]
        options["sampler"] = order.sort().values.tolist()
    worker = {
        "num_workers": 1,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
    }
    try:
        return _read(DataLoader(dataset, **options, **worker), limit)
    except Exception as error:  # whatever keeps a dataset from another process, or is wrong with it in any
        try:
            copied = copy.deepcopy(dataset)
        except Exception:
            raise error from None
        batches = _read(DataLoader(copied, **options), limit)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        warn(
            f"The probe was read from a copy of {type(dataset).__name__} in this process, because it could not be read "
            f"in another one ({reason}): files and connections that the copies share may have moved."
        )
        return batches


def _read(loader: DataLoader[Any], limit: int) -> list[Any]:
    """Returns the first batches, until they contain ``limit`` examples."""
    batches: list[Any] = []
    for batch in loader:
        batches.append(batch)
        if sum(batch_size(_plain(b)) for b in batches) >= limit:
            break
    return batches


def _plain(batch: Any) -> Any:
    """Converts nested mappings to plain dicts; pytree would ignore tensors in other types, such as BatchEncoding."""
    if isinstance(batch, Mapping):
        return {key: _plain(value) for key, value in batch.items()}
    return type(batch)(map(_plain, batch)) if type(batch) in (tuple, list) else batch


def attention_mask(batch: Any) -> Tensor | None:
    """Returns the ``attention_mask`` of a batch as (B, T) booleans on the CPU, True for non-padding; None without one.

    Raises:
        ValueError: The mask is not a (batch, positions) tensor.
    """
    mask = dict(_named_inputs(batch)).get("attention_mask")
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask of the probe has shape {shape}: padding is read from a (batch, positions) mask."
        )
    return mask.cpu() != 0


def positions_input(batch: Any) -> Tensor | None:
    """Returns ``input_ids``, else the first (B, T, ...) tensor that is neither mask nor label, else None."""
    tensors = [
        (name, value)
        for name, value in _named_inputs(batch)
        if isinstance(value, Tensor) and value.dim() > 1 and "mask" not in name and name not in LABELS
    ]
    return dict(reversed(tensors)).get("input_ids", tensors[0][1] if tensors else None)


def check_batch(batch: Any) -> None:
    """Raises an error if a batch is not valid.

    Raises:
        ValueError: It contains no tensor, or its ``input_ids`` are not (batch, positions).
    """
    if not any(isinstance(leaf, Tensor) and leaf.dim() for leaf in tree_leaves(batch)):
        raise ValueError(f"A probe batch of type {type(batch).__name__} contains no tensor with a batch dimension.")
    ids = dict(_named_inputs(batch)).get("input_ids")
    if ids is not None and (not isinstance(ids, Tensor) or ids.dim() < 2):
        found = f"a tensor of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else f"a {type(ids).__name__}"
        raise ValueError(
            f"input_ids of a probe batch is {found}, not a (batch, positions) tensor: pass collated batches, or a "
            "dataset of tensors of equal length (for Hugging Face datasets: .with_format('torch'))."
        )


def longest_example(batch: Any) -> Any:
    """Returns the batch reduced to one example: the first with the most non-padding positions."""
    size, mask = batch_size(batch), attention_mask(batch)
    best = int(mask.sum(dim=1).argmax()) if mask is not None and len(mask) == size else 0
    return examples_of(batch, best, best + 1)


def examples_of(batch: Any, start: int, stop: int) -> Any:
    """Returns the batch reduced to the examples from ``start`` to ``stop`` - 1."""
    size = batch_size(batch)
    return tree_map_only(Tensor, lambda t: t[start:stop] if t.dim() and len(t) == size else t, batch)


def perturbed(batch: Any, inputs: Tensor, position: int) -> Any:
    """Returns the batch with one position perturbed: another token of the batch, or 1 - x for floating inputs."""
    changed = inputs.clone()
    if inputs.is_floating_point():
        changed[:, position] = 1 - inputs[:, position]
    else:
        old = inputs[:, position]
        others = inputs[inputs != old.flatten()[0]]
        changed[:, position] = others[0] if len(others) else torch.where(old > 0, old - 1, old + 1)
    return tree_map_only(Tensor, lambda t: changed if t is inputs else t, batch)


def _named_inputs(batch: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (name, value) of all entries of a batch's nested dicts; of a tuple only those of its first element."""
    if isinstance(batch, (tuple, list)) and not name:
        yield from _named_inputs(batch[0]) if batch else ()
        return
    yield name, batch
    if isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from _named_inputs(value, str(key))


def _unwrapped(model: nn.Module) -> nn.Module:
    for wrapper in WRAPPERS:
        model = getattr(model, wrapper, model)
    return model
