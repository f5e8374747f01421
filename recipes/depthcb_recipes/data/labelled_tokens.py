"""Texts with one label per word, for token classification."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from depthcb_recipes.data.corpus import TOKEN_KINDS, python_corpus, python_tokens
from depthcb_recipes.data.labelled import LabelledData
from depthcb_recipes.objectives.objective import IGNORED


class LabelledTokens(LabelledData):
    """Words and their labels, for `TokenClassification`; subwords after the first have the label -100.

    In the Python corpus, the words are Python tokens and the labels their types. Words are joined by single spaces.

    Args:
        backbone: See `TextData`. The tokenizer must be a fast one, since character offsets are needed.
        dataset: See `TextData`.
        tokens: Name of the column with lists of words.
        labels: Name of the column with lists of labels (class indices or names).
        **options: See `TextData`.

    Raises:
        ValueError: See `TextData`; also if a row has a different number of labels and words, or the tokenizer is slow.
    """

    python_columns = ("tokens", "labels")

    def __init__(
        self,
        backbone: str | PreTrainedTokenizerBase,
        dataset: str = "python",
        *,
        tokens: str = "tokens",
        labels: str = "labels",
        **options: Any,
    ) -> None:
        super().__init__(backbone, dataset, **options)
        self.columns = (tokens, labels)

    def all_labels(self) -> Iterator[Any]:
        if self.dataset == "python":  # all types, even those that do not occur in this Python version
            yield from TOKEN_KINDS
        for side in self.sides:
            for row in side[self.columns[1]]:
                yield from row

    def python_rows(self) -> Dataset:
        return python_tokens(python_corpus("code"))

    def encode(self, rows: Dataset) -> Iterator[dict[str, list[int]]]:
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"The tokenizer {self.tokenizer.name_or_path!r} has no character offsets: use a fast tokenizer."
            )
        for words, labels in zip(*(rows[column] for column in self.columns), strict=True):
            if len(words) != len(labels):
                raise ValueError(
                    f"A row of {self.dataset!r} has {len(words)} tokens and {len(labels)} labels: {words[:5]}…"
                )
            yield self._aligned(words, list(map(self.number, labels)))

    def _aligned(self, words: list[str], labels: list[int]) -> dict[str, list[int]]:
        starts, at = {}, 0
        for word, label in zip(words, labels, strict=True):
            starts[at] = label
            at += len(word) + 1
        text = " ".join(words)
        limits: dict[str, Any] = {"truncation": True, "max_length": self.max_length, "split_special_tokens": True}
        coded = self.tokenizer(text, return_offsets_mapping=True, **limits)
        aligned = []
        for begin, end in coded["offset_mapping"]:
            # Byte-level subwords include the space before the word.
            first = begin + (len(text[begin:end]) - len(text[begin:end].lstrip(" ")))
            aligned.append(starts.pop(first, IGNORED) if end > begin else IGNORED)
        return {"input_ids": coded["input_ids"], "labels": aligned}
