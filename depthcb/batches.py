"""Probe inputs: collecting batches and inspecting them."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from depthcb.warn import warn

LABELS = ("labels", "label")
#: Name of a (B,) integer tensor that gives the document of each example; it is not an input of the model.
DOCUMENT = "document"


def is_documents(value: Any) -> bool:
    """Returns whether a value is a (B,) tensor of document numbers."""
    return isinstance(value, Tensor) and value.dim() == 1 and not value.is_floating_point()


def documents(batches: Sequence[Any]) -> Tensor | None:
    """Returns the document of each example of the batches, (n,); None if a batch does not name them."""
    found = [batch.get(DOCUMENT) if isinstance(batch, Mapping) else None for batch in batches]
    known = [value for value in found if isinstance(value, Tensor) and is_documents(value)]
    return torch.cat(known).cpu() if len(known) == len(batches) else None


def batch_size(batch: Any) -> int:
    """Returns the number of examples: the most frequent length of the tensors, else that of the first list of strings.

    Raises:
        ValueError: There is neither.
    """
    lengths = [len(leaf) for leaf in leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()]
    if lengths:
        return Counter(lengths).most_common(1)[0][0]
    if isinstance(batch, Mapping):
        batch = next((value for value in batch.values() if isinstance(value, (list, tuple))), ())
    if isinstance(batch, (list, tuple)) and batch:
        return len(batch)
    raise ValueError(f"A probe batch of type {type(batch).__name__} contains no tensor with a batch dimension.")


def moved_to(batch: Any, device: torch.device) -> Any:
    """Returns a batch on a device."""
    batch = apply_to_collection(batch, Tensor, lambda t: t.to(device))
    return batch.to(device) if hasattr(batch, "to") and not isinstance(batch, Tensor) else batch


def leaves(value: Any) -> Iterator[Any]:
    """Yields the tensors, strings and numbers in nested containers, dataclasses and other objects."""
    if isinstance(value, (Tensor, str, bytes, int, float)):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from leaves(item)
    elif hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)):
        for item in vars(value).values():
            yield from leaves(item)


def collect_batches(source: Any, limit: int, seed: int = 0) -> list[Any]:
    """Returns CPU copies of a batch, a list of batches, or a random sample of a Dataset or DataLoader.

    Args:
        source: The source.
        limit: Number of examples to draw from a dataset; all batches of a list are used.
        seed: Seed of the sample.

    Raises:
        ValueError: The source is none of these.
    """
    split = [_plain(batch) for batch in _split(source, limit, seed)]
    return [copy.deepcopy(apply_to_collection(b, Tensor, lambda t: t.detach().cpu().clone())) for b in split]


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
    # Where training reads in its own process, the dataset need not be picklable, nor the script importable: fork.
    fork = loader.num_workers == 0 and sys.platform == "linux"
    worker: dict[str, Any] = {
        "num_workers": 1,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": "fork" if fork else loader.multiprocessing_context,
    }
    try:
        return _read(DataLoader(dataset, **options, **worker), limit)
    except Exception as error:  # whatever keeps a dataset from another process, or is wrong with it in any
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        try:
            copied = copy.deepcopy(dataset)
        except Exception as no_copy:
            raise ValueError(
                f"The probe cannot be read from {type(dataset).__name__}, neither in another process ({reason}) nor "
                f"from a copy ({no_copy}): pass probe= with a batch or a list of batches."
            ) from error
        batches = _read(DataLoader(copied, **options), limit)
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
        if sum(map(batch_size, batches)) >= limit:
            break
    return batches


def _plain(batch: Any) -> Any:
    """Converts nested mappings to plain dicts; pytree would ignore tensors in other types, such as BatchEncoding."""
    if isinstance(batch, Mapping):
        return {key: _plain(value) for key, value in batch.items()}
    return type(batch)(map(_plain, batch)) if type(batch) in (tuple, list) else batch


def check_batch(batch: Any) -> None:
    """Raises an error if a batch is not valid.

    Raises:
        ValueError: It contains no examples, or its ``input_ids`` are not (batch, positions).
    """
    batch_size(batch)
    inputs = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
    if ids is not None and (not isinstance(ids, Tensor) or ids.dim() < 2):
        found = f"a tensor of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else f"a {type(ids).__name__}"
        raise ValueError(
            f"input_ids of a probe batch is {found}, not a (batch, positions) tensor: collate a list of rows with "
            "torch.utils.data.default_collate(rows), or pass a dataset of tensors of equal length (for Hugging Face "
            "datasets: .with_format('torch'))."
        )


def examples_of(batch: Any, start: int, stop: int) -> Any:
    """Returns the batch reduced to the examples from ``start`` to ``stop`` - 1."""
    size = batch_size(batch)
    return apply_to_collection(batch, Tensor, lambda t: t[start:stop] if t.dim() and len(t) == size else t)
