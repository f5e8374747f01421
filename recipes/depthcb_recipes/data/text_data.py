"""Base data module: loads rows, splits, tokenises (with a cache on disk) and batches them."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import torch
from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError
from lightning.pytorch import LightningDataModule
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from depthcb_recipes.backbones.loading import load_tokenizer
from depthcb_recipes.cache import cache_folder, cached, digest
from depthcb_recipes.data.corpus import in_hashed_order, split_by_file
from depthcb_recipes.objectives.objective import IGNORED

_CODING = 3  # increment when the tokenisation of the same rows changes
_READERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}

Side = Literal[0, 1]  # training, validation


class TextData(LightningDataModule):
    """Base class for text data modules; subclasses define what a row is.

    The Python corpus is split by file. Other datasets use their own splits; if there is no validation split, a random
    tenth of the training rows is held out. Training rows that also occur in the validation split are dropped. Each
    dataloader has its own generator, so two fits see the same batches and the global random state is not touched.

    Args:
        backbone: Name of the backbone whose tokenizer to use, or a tokenizer.
        dataset: ``"python"`` for the Python corpus; a CSV, JSON, JSONL or parquet file; or a folder or hub id that
            ``datasets`` can load.
        config: Configuration name of a hub dataset, such as ``"sst2"`` for ``"glue"``; ``dataset="glue/sst2"`` is
            equivalent.
        train_split: Name of the training split.
        val_split: Name of the validation split.
        train_rows: Maximum number of training rows; None for all.
        val_rows: Maximum number of validation rows.
        max_length: Maximum number of tokens per row.
        batch_size: Rows per batch.
        seed: Seed for the split, the selection and order of rows, and the masks.
        stateful: Whether checkpoints store the position in the training data, so that a fit resumed mid-epoch continues
            with the next batch instead of the first. Requires torchdata.

    Raises:
        ValueError: If a size is below 1, or ``stateful`` is set without torchdata installed. When the data are read: if
            the dataset, a column or a label does not exist, or a split is empty.
    """

    columns: tuple[str, ...] = ()
    #: The matching columns of the Python corpus.
    python_columns: tuple[str, ...] = ()

    def __init__(
        self,
        backbone: str | PreTrainedTokenizerBase,
        dataset: str = "python",
        *,
        config: str | None = None,
        train_split: str = "train",
        val_split: str = "validation",
        train_rows: int | None = None,
        val_rows: int = 256,
        max_length: int = 128,
        batch_size: int = 16,
        seed: int = 0,
        stateful: bool = False,
    ) -> None:
        super().__init__()
        if stateful and find_spec("torchdata") is None:
            raise ValueError("stateful=True needs torchdata: run `pip install torchdata`.")
        for name, value in (("train_rows", train_rows), ("val_rows", val_rows), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if max_length < 4:
            raise ValueError(f"max_length must be at least 4, not {max_length}")
        self.backbone, self.dataset, self.config = backbone, dataset, config
        self.train_split, self.val_split = train_split, val_split
        self.train_rows, self.val_rows = train_rows, val_rows
        self.max_length, self.batch_size, self.seed = max_length, batch_size, seed
        self.stateful = stateful

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The backbone's tokenizer."""
        return load_tokenizer(self.backbone) if isinstance(self.backbone, str) else self.backbone

    def python_rows(self) -> Dataset:
        """Returns the Python corpus, with the columns ``python_columns`` and ``file``."""
        raise NotImplementedError

    def encode(self, rows: Dataset) -> Iterable[dict[str, Any]]:
        """Yields tokenised, unpadded rows lazily."""
        raise NotImplementedError

    def encode_validation(self, rows: Dataset) -> Iterable[dict[str, Any]]:
        """Yields the tokenised rows of the validation split; by default as those of the training split."""
        return self.encode(rows)

    def settle(self, side: Dataset) -> Dataset:
        """Selects the rows to use from one split, which is in hash order."""
        return side

    def truncated(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """Yields the token ids of each text, including special tokens, truncated to ``max_length``."""
        return token_ids(self.tokenizer, texts, truncation=True, max_length=self.max_length)

    def collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Collates rows into a batch; columns are padded to the longest row (attention mask: 0, labels: -100)."""
        batch = {}
        for name in rows[0]:
            values = [row[name] for row in rows]
            if isinstance(values[0], int | float):
                batch[name] = torch.tensor(values)
                continue
            width = max(map(len, values))
            fill = IGNORED if name.endswith("labels") else self._pad_token
            batch[name] = self._padded(values, width, fill)
            if name.endswith("input_ids"):
                ones = [[1] * len(value) for value in values]
                batch[name.replace("input_ids", "attention_mask")] = self._padded(ones, width, 0)
        return batch

    @property
    def _pad_token(self) -> int:
        if self.tokenizer.pad_token_id is None:
            raise ValueError(
                f"The tokenizer {self.tokenizer.name_or_path!r} has no pad token: set tokenizer.pad_token."
            )
        return int(self.tokenizer.pad_token_id)

    def prepare_data(self) -> None:
        """Fills the caches, so that only one process per machine reads and tokenises."""
        self.val_data, self.train_data  # noqa: B018

    @cached_property
    def train_data(self) -> Dataset:
        """The tokenised training rows."""
        return self._encoded(0)

    @cached_property
    def val_data(self) -> Dataset:
        """The tokenised validation rows."""
        return self._encoded(1)

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Returns a shuffled dataloader; every new dataloader repeats the same order."""
        return self._loader(self.train_data, shuffle=True)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Returns a dataloader with a fixed order."""
        return self._loader(self.val_data, shuffle=False)

    def probe_batches(self, rows: int = 64, batch_size: int = 16) -> list[dict[str, Tensor]]:
        """Returns fixed inputs for a depth probe: the first validation rows.

        Raises:
            ValueError: If there are too few validation rows.
        """
        if len(self.val_data) < rows:
            raise ValueError(f"Only {len(self.val_data)} validation rows, but {rows} are needed")
        parts = [self.val_data[i : min(i + batch_size, rows)]["input_ids"] for i in range(0, rows, batch_size)]
        batches = [self.collate([{"input_ids": ids} for ids in part]) for part in parts]
        return [{k: v for k, v in batch.items() if k != "labels"} for batch in batches]

    def _loader(self, data: Dataset, shuffle: bool) -> DataLoader[dict[str, Tensor]]:
        # Without its own generator, even an unshuffled loader draws a number from the global one, so that a validation
        # would change the dropout of later training steps.
        generator = torch.Generator(device="cpu").manual_seed(self.seed)
        if self.stateful and shuffle:  # validation is never resumed midway
            from torchdata.stateful_dataloader import StatefulDataLoader
            from torchdata.stateful_dataloader.sampler import RandomSampler

            # The sampler needs a separate generator: the loader also draws from its own, which is not repeated on
            # resume, so that the order of later epochs would differ.
            order = RandomSampler(data, generator=torch.Generator(device="cpu").manual_seed(self.seed))
            loader: DataLoader[dict[str, Tensor]] = StatefulDataLoader(
                data, self.batch_size, sampler=order, generator=generator, collate_fn=self.collate, num_workers=0
            )
            return loader
        return DataLoader(
            data, self.batch_size, shuffle=shuffle, generator=generator, collate_fn=self.collate, num_workers=0
        )

    def _padded(self, values: Sequence[list[int]], width: int, fill: int) -> Tensor:
        left = self.tokenizer.padding_side == "left"
        gaps = [[fill] * (width - len(value)) for value in values]
        return torch.tensor([g + v if left else v + g for g, v in zip(gaps, values, strict=True)])

    def _encoded(self, side: Side) -> Dataset:
        rows, most = self.sides[side], self.val_rows if side else self.train_rows
        settings = (_CODING, type(self).__name__, side, self.seed, most, self.row_length, self.columns)
        made_by = (*settings, _tokenizer_state(self.tokenizer))
        path = cache_folder() / "tokenised" / f"{digest([repr(made_by), *_keys(rows)])}.parquet"

        def tokenised() -> pa.Table:
            encode = self.encode_validation if side else self.encode
            encoded = list(itertools.islice(encode(rows), most))
            if not encoded:
                raise ValueError(
                    f"The {'validation' if side else 'training'} split of {self.dataset!r} yields no rows at a length "
                    f"of {self.row_length} tokens: provide more text or use another length."
                )
            return pa.Table.from_pylist(encoded)

        return Dataset(cached(path, tokenised))

    @property
    def row_length(self) -> int:
        """Maximum number of tokens per row."""
        return self.max_length

    @cached_property
    def sides(self) -> tuple[Dataset, Dataset]:
        """All training and validation rows, in hash order and disjoint."""
        found = self._python_sides() if self.dataset == "python" else self._loaded()
        train, val = (self.settle(self._ordered(side.select_columns(list(self.columns)))) for side in found)
        held_out = set(_keys(val))
        fresh = [i for i, key in enumerate(_keys(train)) if key not in held_out]
        if len(fresh) < len(train) and self.dataset != "python":
            rank_zero_warn(
                f"{len(train) - len(fresh)} of {len(train)} training rows of {self.dataset!r} are also in validation: "
                "they are dropped from training."
            )
        return train.select(fresh), val

    def _python_sides(self) -> tuple[Dataset, Dataset]:
        names = dict(zip(self.python_columns, self.columns, strict=False))
        return split_by_file(self.python_rows().rename_columns(names), seed=self.seed)

    def _loaded(self) -> tuple[Dataset, Dataset]:
        splits = load_splits(self.dataset, self.config)
        if self.train_split not in splits:
            raise ValueError(f"{self.dataset!r} has no split {self.train_split!r}: it has {', '.join(splits)}.")
        train = splits[self.train_split]
        for column in self.columns:
            if column not in train.column_names:
                raise ValueError(
                    f"{self.dataset!r} has no column {column!r}: it has {', '.join(train.column_names)}; set "
                    f"the right name in the arguments of {type(self).__name__}."
                )
        val = splits.get(self.val_split)
        if val is None:
            rank_zero_info(
                f"{self.dataset!r} has no split {self.val_split!r}: a tenth of {self.train_split!r} is held out."
            )
            order = in_hashed_order(map(str, range(len(train))), self.seed)
            chosen = sorted(map(int, order[: -(-len(train) // 10)]))
            held = set(chosen)
            val, train = train.select(chosen), train.select([i for i in range(len(train)) if i not in held])
        for name, side in ((self.train_split, train), (self.val_split, val)):
            if not len(side):
                raise ValueError(f"The split {name!r} of {self.dataset!r} is empty.")
        return train, val

    def _ordered(self, side: Dataset) -> Dataset:
        """Sorts rows by hash; the order depends only on the rows' content and the seed."""
        keys = _keys(side)
        rank = {key: i for i, key in enumerate(in_hashed_order(dict.fromkeys(keys), self.seed))}
        return side.select(sorted(range(len(keys)), key=lambda i: rank[keys[i]]))


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], **options: Any) -> Iterator[list[int]]:
    """Yields the token ids of each text, tokenised lazily in groups.

    Special tokens spelled out in a text are encoded as plain text.
    """
    remaining = iter(texts)
    while group := list(itertools.islice(remaining, 256)):
        yield from tokenizer(group, split_special_tokens=True, **options)["input_ids"]


def plain_ids(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Iterator[list[int]]:
    """Yields the token ids of each text without special tokens."""
    # verbose=False: documents may be longer than the model's context, but the rows cut from them are not
    return token_ids(tokenizer, texts, add_special_tokens=False, verbose=False)


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the id of the end-of-text token, or of the separator token for BERT-like tokenizers.

    Raises:
        ValueError: If the tokenizer has neither.
    """
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if end is None:
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path!r} has neither an end-of-text nor a separator token: set "
            "tokenizer.eos_token."
        )
    return int(end)


def _keys(rows: Dataset) -> list[str]:
    """Returns one key per row; equal rows have equal keys."""
    return list(map(repr, zip(*rows[:].values(), strict=True)))


def load_splits(dataset: str, config: str | None) -> DatasetDict:
    """Loads all splits of a local file, a folder or a hub dataset."""
    path = Path(dataset)
    if path.is_file():
        if path.suffix not in _READERS:
            raise ValueError(f"{dataset!r} is not one of {', '.join(_READERS)}: convert it to one of these.")
        try:
            return load_dataset(_READERS[path.suffix], data_files=str(path))
        except (ValueError, DatasetGenerationError) as cause:
            raise ValueError(f"The file {dataset!r} is empty or cannot be read ({cause}).") from cause
    if not path.exists() and (path.suffix in _READERS or dataset.startswith((".", "/", "~"))):
        raise ValueError(f"There is no file or folder {dataset!r}: use another path, a hub id, or 'python'.")
    try:
        return _load_named(dataset, config)
    except (OSError, ValueError, RuntimeError) as cause:
        name, _, inner = dataset.partition("/")
        if config is None and inner and not path.exists():
            with contextlib.suppress(OSError, ValueError, RuntimeError):
                return _load_named(name, inner)  # "glue/sst2"
        raise ValueError(
            f"The dataset {dataset!r} is neither a local file or folder nor was it found on the hub ({cause}): use "
            "'python', a local path, or a hub id (with access to the hub)."
        ) from cause


def _load_named(dataset: str, config: str | None) -> DatasetDict:
    try:
        return load_dataset(dataset, config)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        # the hub's parquet copy of a dataset defined by a script
        return load_dataset(dataset, config, revision="refs/convert/parquet")


def _tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return hashlib.sha256(
        (backend.to_str() if backend else repr(sorted(tokenizer.get_vocab().items()))).encode()
    ).hexdigest()
