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
        **options: Any,
    ) -> None:
        super().__init__(backbone, dataset, **options)
        self.columns = tuple(column for column in (first, second, score) if column is not None)
        self.score, self.min_score = score, min_score

    def python_rows(self) -> Dataset:
        return docstring_pairs(python_corpus("code"))

    def settle(self, side: Dataset) -> Dataset:
        if self.score is None:
            return side
        return side.select([i for i, score in enumerate(side[self.score]) if score >= self.min_score])

    def encode(self, rows: Dataset) -> Iterator[dict[str, list[int]]]:
        names = ("input_ids", "pair_input_ids")
        texts = [column for column in self.columns if column != self.score]
        for ids in zip(*(self.truncated(rows[column]) for column in texts), strict=True):
            yield dict(zip(names, ids, strict=False))
