"""Texts with a label for each word."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from depthcb_recipes.data.corpus import TOKEN_KINDS, python_corpus, python_tokens
from depthcb_recipes.data.labelled import LabelledData
from depthcb_recipes.objectives.objective import IGNORED


class LabelledTokens(LabelledData):
    """Words and their labels, for `TokenClassification`: the first subword of a word has its label, the others -100.

    Of Python text the words are Python's own tokens, and the labels their kinds. Words are joined by single spaces.

    Args:
        backbone: As for `TextData`; a tokenizer that knows where in the text its subwords are (a fast one).
        dataset: As for `TextData`.
        tokens: Column of the lists of words.
        labels: Column of the lists of labels, numbers or names.
        **options: As for `TextData`.

    Raises:
        ValueError: As for `TextData`; a row with more or fewer labels than words; a slow tokenizer.
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
        if self.dataset == "python":  # all kinds, whether this Python has them all or not
            yield from TOKEN_KINDS
        for side in self.sides:
            for row in side[self.columns[1]]:
                yield from row

    def python_rows(self) -> Dataset:
        return python_tokens(python_corpus("code"))

    def encode(self, rows: Dataset) -> Iterator[dict[str, list[int]]]:
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"The tokenizer {self.tokenizer.name_or_path!r} does not say where its subwords are: take a fast one."
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
            # Byte-level subwords hold the space before the word.
            first = begin + (len(text[begin:end]) - len(text[begin:end].lstrip(" ")))
            aligned.append(starts.pop(first, IGNORED) if end > begin else IGNORED)
        return {"input_ids": coded["input_ids"], "labels": aligned}
