"""Documents concatenated and split into blocks of equal length, for language modelling."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, get_args

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from depthcb_recipes.data.corpus import Kind, python_corpus
from depthcb_recipes.data.text_data import TextData, end_of_text, plain_ids


class PackedText(TextData):
    """Documents concatenated and split into blocks of equal length, for `CausalLM` and (with masks) `MaskedLM`.

    The Python corpus is read in hash order. Its validation rows name their ``document`` and come from as many different
    ones as possible: a second row from the same document only if there are too few others. Other datasets keep their
    order, because their rows are often lines of longer documents. Training masks are redrawn every epoch (of the
    selected tokens, 80 % become the mask token, 10 % a random token, 10 % stay unchanged); validation masks are fixed.

    Args:
        backbone: See `TextData`.
        dataset: See `TextData`.
        kind: Part of the Python corpus: ``"code"`` or ``"prose"``.
        column: Name of the text column of other datasets.
        masked: Whether to mask tokens; only masked tokens are then labelled.
        mask_probability: Fraction of tokens to select for masking.
        block_size: Tokens per row.
        **options: See `TextData`.

    Raises:
        ValueError: See `TextData`; also if ``kind`` is unknown or the tokenizer has no mask token.
    """

    python_columns = ("text",)

    def __init__(
        self,
        backbone: str | PreTrainedTokenizerBase,
        dataset: str = "python",
        *,
        kind: Kind = "code",
        column: str = "text",
        masked: bool = False,
        mask_probability: float = 0.15,
        block_size: int = 128,
        **options: Any,
    ) -> None:
        if kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {', '.join(map(repr, get_args(Kind)))}, not {kind!r}")
        if block_size < 2:
            raise ValueError(f"block_size must be at least 2, not {block_size}")
        if not 0 < mask_probability < 1:
            raise ValueError(f"mask_probability must be between 0 and 1, not {mask_probability}")
        super().__init__(backbone, dataset, **options)
        self.kind, self.block_size = kind, block_size
        self.columns = (column,)
        self.masked, self.mask_probability = masked, mask_probability

    def python_rows(self) -> Dataset:
        return python_corpus(self.kind)

    def settle(self, side: Dataset) -> Dataset:
        """Drops empty rows."""
        return side.select([i for i, text in enumerate(side[self.columns[0]]) if text.strip()])

    def collate(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        """Stacks blocks into a batch; there is no padding, and unless masked, the labels are the input ids."""
        batch = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch.setdefault("labels", batch["input_ids"].clone())
        return batch

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        loader = super().train_dataloader()
        if self.masked:
            if self.stateful:
                raise ValueError(
                    "stateful=True is not supported with masked=True: the random state of the masks cannot be saved."
                )
            loader.collate_fn = masking(self.tokenizer, self.mask_probability, self.seed)
        return loader

    @cached_property
    def val_data(self) -> Dataset:
        """The tokenised validation rows, with fixed masks if ``masked``."""
        rows = self._encoded(1)
        if not self.masked:
            return rows
        batch = masking(self.tokenizer, self.mask_probability, self.seed + 1)(list(rows))
        masked = {name: batch[name].tolist() for name in ("input_ids", "labels")}
        return Dataset.from_dict(masked | {name: rows[name] for name in rows.column_names if name == "document"})

    def probe_batches(
        self, rows: int = 64, batch_size: int = 16, *, block_size: int | None = None, kind: Kind | None = None
    ) -> list[dict[str, Tensor]]:
        """Returns fixed inputs for a depth probe, taken from the validation split.

        Each row is the start of a different document. Rows cut from the packed stream would often share a document and
        not be independent.

        Args:
            rows: Number of rows.
            batch_size: Rows per batch.
            block_size: Tokens per row, by default that of the training blocks; shorter documents are skipped.
            kind: Part of the Python corpus to use instead of the data module's own.

        Raises:
            ValueError: If too few documents are long enough.
        """
        size = block_size or self.block_size
        data = PackedText(self.tokenizer, kind=kind, seed=self.seed) if kind else self
        texts = data.sides[1][data.columns[0]]
        long = (ids[:size] for ids in plain_ids(self.tokenizer, texts) if len(ids) >= size)
        ids = list(itertools.islice(long, rows))
        if len(ids) < rows:
            raise ValueError(f"Only {len(ids)} validation documents have {size} tokens, but {rows} are needed")
        batches = torch.split(torch.tensor(ids), batch_size)
        return [{"input_ids": batch, "attention_mask": torch.ones_like(batch)} for batch in batches]

    def _ordered(self, side: Dataset) -> Dataset:
        # In other datasets, a row may be one line of a longer document.
        return super()._ordered(side) if self.dataset == "python" else side

    @property
    def row_length(self) -> int:
        return self.block_size

    def encode(self, rows: Dataset) -> Iterator[dict[str, list[int]]]:
        return ({"input_ids": block} for block in blocks(rows[self.columns[0]], self.tokenizer, self.block_size))

    def encode_validation(self, rows: Dataset) -> Iterator[dict[str, Any]]:
        if self.dataset != "python":
            return self.encode(rows)
        found: list[tuple[list[int], int]] = []
        texts, before, most = rows[self.columns[0]], -1, 1
        while before < len(found) < self.val_rows or before < 0:  # as few rows per document as will do
            before = len(found)
            made = document_rows(texts, self.tokenizer, self.block_size, self.seed, most)
            found, most = list(itertools.islice(made, self.val_rows)), 2 * most
        return ({"input_ids": ids, "document": document} for ids, document in found)


def blocks(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, size: int) -> Iterator[list[int]]:
    """Tokenises documents, appends the end-of-text token to each and splits the stream into blocks of equal length.

    No other special tokens are added, and special tokens spelled out in a text are encoded as plain text. The remainder
    of the stream is dropped.

    Args:
        texts: Documents, read lazily.
        tokenizer: Tokenizer whose end-of-text token (the separator for BERT-like models) ends each document.
        size: Tokens per block.

    Raises:
        ValueError: If the tokenizer has neither an end-of-text nor a separator token.
    """
    end = end_of_text(tokenizer)
    stream: list[int] = []
    for ids in plain_ids(tokenizer, texts):
        stream += [*ids, end]
        whole = len(stream) // size * size
        yield from (stream[i : i + size] for i in range(0, whole, size))
        del stream[:whole]


def document_rows(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, size: int, seed: int, most: int = 1
) -> Iterator[tuple[list[int], int]]:
    """Yields rows of equal length with few from the same document, each with the number of its (first) document.

    Of a document that is long enough, ``most`` rows are cut from one seeded random part. Shorter ones are packed, and
    none of them is in two rows if ``most`` is 1.

    Args:
        texts: Documents, read lazily.
        tokenizer: As in `blocks`.
        size: Tokens per row.
        seed: Seed of the parts.
        most: Largest number of rows per document.
    """
    end, chance = end_of_text(tokenizer), random.Random(seed)
    packed: list[int] = []
    first = 0
    for number, ids in enumerate(plain_ids(tokenizer, texts)):
        ids = [*ids, end]
        count = min(most, len(ids) // size)
        if count == most:
            start = chance.randrange(len(ids) - count * size + 1)
            yield from ((ids[i : i + size], number) for i in range(start, start + count * size, size))
            continue
        first = first if packed else number
        packed += ids
        while len(packed) >= size:
            yield packed[:size], first
            packed, first = packed[size:] if most > 1 else [], number


def masking(tokenizer: PreTrainedTokenizerBase, probability: float, seed: int) -> DataCollatorForLanguageModeling:
    """Returns a collator that masks tokens (80/10/10) with its own random generator.

    Raises:
        ValueError: If the tokenizer has no mask token.
    """
    if tokenizer.mask_token is None:
        raise ValueError(f"The tokenizer {tokenizer.name_or_path!r} has no mask token: use CausalLM.")
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=probability)
    collator.generator = torch.Generator().manual_seed(seed)  # its `seed` argument fails in spawned processes
    return collator
