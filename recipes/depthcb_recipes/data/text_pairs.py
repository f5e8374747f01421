"""Pairs of related texts, for contrastive learning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from depthcb_recipes.data.corpus import docstring_pairs, python_corpus
from depthcb_recipes.data.text_data import TextData


class TextPairs(TextData):
    """Pairs of related texts, or single texts, for `Contrastive`.

    In the Python corpus, a pair is a docstring and the function it documents.

    Args:
        backbone: See `TextData`.
        dataset: See `TextData`.
        first: Name of the column with the first texts.
        second: Name of the column with the second texts; None pairs each text with itself (SimCSE).
        score: Name of the column with similarity scores, if not all pairs are positives (STS-B's ``label``).
        min_score: Pairs with a lower score are dropped.
        min_characters: Rows with a shorter text, such as headings and empty lines, are dropped.
        **options: See `TextData`.

    Raises:
        ValueError: See `TextData`.
    """

    python_columns = ("first", "second")

    def __init__(
        self,
        backbone: str | PreTrainedTokenizerBase,
        dataset: str = "python",
        *,
        first: str = "first",
        second: str | None = "second",
        score: str | None = None,
        min_score: float = 4.0,
        min_characters: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(backbone, dataset, **options)
        self.columns = tuple(column for column in (first, second, score) if column is not None)
        self.score, self.min_score, self.min_characters = score, min_score, min_characters

    def python_rows(self) -> Dataset:
        return docstring_pairs(python_corpus("code"))

    def settle(self, side: Dataset) -> Dataset:
        texts = [side[column] for column in self._texts]
        long = [min(map(len, row)) >= self.min_characters for row in zip(*texts, strict=True)]
        scores = side[self.score] if self.score is not None else [self.min_score] * len(side)
        return side.select([i for i, score in enumerate(scores) if long[i] and score >= self.min_score])

    @property
    def _texts(self) -> list[str]:
        return [column for column in self.columns if column != self.score]

    def encode(self, rows: Dataset) -> Iterator[dict[str, list[int]]]:
        names = ("input_ids", "pair_input_ids")
        for ids in zip(*(self.truncated(rows[column]) for column in self._texts), strict=True):
            yield dict(zip(names, ids, strict=False))
