"""A fixed set of texts to measure on, the same ones for every model, objective and seed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from depthcb_recipes.data.corpus import in_hashed_order
from depthcb_recipes.data.text_data import load_splits


@dataclass(frozen=True)
class ProbeTexts:
    """Texts for a depth probe. They are chosen by their characters, so that no tokenizer has a say in which they are.

    Args:
        dataset: A hub id, a folder or a file, as for the data modules.
        config: Configuration name of a hub dataset.
        split: The split, best one that no fit trains on or validates on.
        column: Name of the text column.
        rows: Number of texts.
        min_characters: Shorter rows, such as headings, are left out.
        max_length: Maximum number of tokens per text.
        title: Regular expression of the rows that start a new document, for datasets of which a row is a paragraph;
            rows before the first one are left out. Texts are then drawn from as many different documents as possible,
            and intervals are over documents. Empty: every row is a document of its own.
        batch_size: Texts per batch.
        seed: Of the choice.
    """

    dataset: str
    config: str | None = None
    split: str = "test"
    column: str = "text"
    rows: int = 290
    min_characters: int = 200
    max_length: int = 128
    title: str = ""
    batch_size: int = 10
    seed: int = 0

    def texts(self) -> list[tuple[str, int]]:
        """Returns the texts, each with the number of its document.

        Raises:
            ValueError: The dataset has no such split or column, or too few texts.
        """
        splits = load_splits(self.dataset, self.config)
        if self.split not in splits:
            raise ValueError(
                f"probe: {self.dataset!r} has no split {self.split!r}: it has {', '.join(splits)}; set probe.split."
            )
        if self.column not in splits[self.split].column_names:
            raise ValueError(
                f"probe: {self.dataset!r} has no column {self.column!r}: it has "
                f"{', '.join(splits[self.split].column_names)}; set probe.column."
            )
        found = dict(self._long_ones(splits[self.split][self.column]))  # equal texts count once
        if len(found) < self.rows:
            raise ValueError(
                f"probe: the split {self.split!r} of {self.dataset!r} has {len(found)} texts of at least "
                f"{self.min_characters} characters, and {self.rows} are needed: set probe.rows or probe.min_characters."
            )
        turns: dict[int, int] = {}
        ranked = []
        for text in in_hashed_order(found, self.seed):
            document = found[text]
            turns[document] = turns.get(document, 0) + 1
            ranked.append((turns[document], text, document))
        ranked.sort(key=lambda item: item[0])  # stable: each document's first text, then each one's second ...
        return [(text, document) for _, text, document in ranked[: self.rows]]

    def batches(self, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Tensor]]:
        """Returns the texts as batches for a model.

        Args:
            tokenizer: The model's; it has a pad token.
        """
        batches, texts = [], self.texts()
        for start in range(0, len(texts), self.batch_size):
            part = texts[start : start + self.batch_size]
            coded = tokenizer(
                [text for text, _ in part],
                truncation=True,
                max_length=self.max_length,
                padding=True,
                split_special_tokens=True,
                return_tensors="pt",
            )
            batch = {name: coded[name] for name in ("input_ids", "attention_mask")}
            batches.append(batch | {"document": torch.tensor([document for _, document in part])})
        return batches

    def _long_ones(self, rows: list[str]) -> Iterator[tuple[str, int]]:
        document = -1
        for number, row in enumerate(rows):
            text = row.strip()
            if self.title and re.search(self.title, text):
                document += 1
            elif len(text) >= self.min_characters and (document >= 0 or not self.title):
                yield text, document if self.title else number
