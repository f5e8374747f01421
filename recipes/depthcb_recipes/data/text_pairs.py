"""Pairs of texts that belong together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from depthcb_recipes.data.corpus import docstring_pairs, python_corpus
from depthcb_recipes.data.text_data import TextData


class TextPairs(TextData):
    """Two texts that belong together, for `Contrastive`; or texts alone.

    Of Python text these are docstrings and the functions they describe.

    Args:
        backbone: As for `TextData`.
        dataset: As for `TextData`.
        first: Column of the first texts.
        second: Column of their partners; None for texts without partners, which then are their own (SimCSE).
        score: Column that says how near the two are, where not all belong together (STS-B's ``label``).
        min_score: The pairs below this score are left out.
        **options: As for `TextData`.

    Raises:
        ValueError: As for `TextData`.
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
