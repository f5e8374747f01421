"""Documents joined and cut into blocks of equal length, for language models."""

from __future__ import annotations

import itertools
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
    """Documents joined and cut into blocks of equal length, for `CausalLM` and, masked, for `MaskedLM`.

    Python text is taken in hashed order, so a few blocks are already a mix of many files; other data keep their order,
    because their rows are often the lines of longer documents. Masks are drawn anew every
    epoch (of the chosen tokens 80 % become the mask token, 10 % another token, 10 % stay); those of the validation are
    always the same.

    Args:
        backbone: As for `TextData`.
        dataset: As for `TextData`.
        kind: Of Python text: ``"code"`` or ``"prose"``.
        column: Of other data: the column with the text.
        masked: Mask tokens and label them, and them alone.
        mask_probability: Share of the tokens to label.
        block_size: Tokens in a row.
        **options: As for `TextData`.

    Raises:
        ValueError: As for `TextData`; another kind; no mask token.
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
            raise ValueError(f"mask_probability must lie between 0 and 1, not at {mask_probability}")
        super().__init__(backbone, dataset, **options)
        self.kind, self.block_size = kind, block_size
        self.columns = (column,)
        self.masked, self.mask_probability = masked, mask_probability

    def python_rows(self) -> Dataset:
        return python_corpus(self.kind)

    def settle(self, side: Dataset) -> Dataset:
        """Rows with text in them."""
        return side.select([i for i, text in enumerate(side[self.columns[0]]) if text.strip()])

    def collate(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        """Blocks are all of one length: nothing is padding, and every token is its own label unless masked."""
        batch = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch.setdefault("labels", batch["input_ids"].clone())
        return batch

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        loader = super().train_dataloader()
        if self.masked:
            if self.stateful:
                raise ValueError(
                    "stateful=True is not supported with masks: their random numbers have no state to keep."
                )
            loader.collate_fn = masking(self.tokenizer, self.mask_probability, self.seed)
        return loader

    @cached_property
    def val_data(self) -> Dataset:
        """The validation rows; masked ones are masked once and for all."""
        rows = self._encoded(1)
        if not self.masked:
            return rows
        batch = masking(self.tokenizer, self.mask_probability, self.seed + 1)(list(rows))
        return Dataset.from_dict({name: batch[name].tolist() for name in ("input_ids", "labels")})

    def probe_batches(
        self, rows: int = 64, batch_size: int = 16, *, block_size: int | None = None, kind: Kind | None = None
    ) -> list[dict[str, Tensor]]:
        """Fixed inputs for a depth probe, from validation only.

        Each row is the start of a different document: cut from one packed stream, neighbouring rows would share their
        document and count as fewer than they are.

        Args:
            rows: Number of rows.
            batch_size: Rows in a batch.
            block_size: Tokens in a row, by default the blocks' own; shorter documents are passed over.
            kind: Of Python text: another kind than the blocks'.

        Raises:
            ValueError: Too few documents are that long.
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
        # Elsewhere than in Python text a row may be one line of a longer document.
        return super()._ordered(side) if self.dataset == "python" else side

    @property
    def row_length(self) -> int:
        return self.block_size

    def encode(self, rows: Dataset) -> Iterator[dict[str, list[int]]]:
        return ({"input_ids": block} for block in blocks(rows[self.columns[0]], self.tokenizer, self.block_size))


def blocks(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, size: int) -> Iterator[list[int]]:
    """Tokenise documents, end each with the end-of-text token, and cut the stream into equal blocks.

    The tokenizer adds no token of its own, and a text that spells out a special token does not become one. The
    remainder of the stream is dropped.

    Args:
        texts: Documents, read only as far as needed.
        tokenizer: Its end-of-text token (for BERT and the like the separator) goes between documents.
        size: Tokens in a block.

    Raises:
        ValueError: The tokenizer has no token to end a text with.
    """
    end = end_of_text(tokenizer)
    stream: list[int] = []
    for ids in plain_ids(tokenizer, texts):
        stream += [*ids, end]
        whole = len(stream) // size * size
        yield from (stream[i : i + size] for i in range(0, whole, size))
        del stream[:whole]


def masking(tokenizer: PreTrainedTokenizerBase, probability: float, seed: int) -> DataCollatorForLanguageModeling:
    """What masks tokens 80/10/10, with random numbers of its own.

    Raises:
        ValueError: The tokenizer has no mask token.
    """
    if tokenizer.mask_token is None:
        raise ValueError(f"The tokenizer {tokenizer.name_or_path!r} has no mask token: take CausalLM.")
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=probability)
    collator.generator = torch.Generator().manual_seed(seed)  # its own `seed` is refused in a spawned process
    return collator
