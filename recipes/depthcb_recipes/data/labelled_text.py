"""Texts with one label each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from depthcb_recipes.data.corpus import balanced, docstring_packages
from depthcb_recipes.data.labelled import LabelledData


class LabelledText(LabelledData):
    """Texts and their labels, for `SequenceClassification`.

    Of Python text these are docstrings and the library that each is from, equally many of each of eight libraries,
    whose names are taken out of the text.

    Args:
        backbone: As for `TextData`.
        dataset: As for `TextData`.
        text: Column of the texts.
        label: Column of the labels, numbers or names.
        **options: As for `TextData`.

    Raises:
        ValueError: As for `TextData`; fewer than two labels.
    """

    python_columns = ("text", "label")

    def __init__(
        self,
        backbone: str | PreTrainedTokenizerBase,
        dataset: str = "python",
        *,
        text: str = "text",
        label: str = "label",
        **options: Any,
    ) -> None:
        super().__init__(backbone, dataset, **options)
        self.columns = (text, label)

    def all_labels(self) -> Iterator[Any]:
        for side in self.sides:
            yield from side[self.columns[1]]

    def python_rows(self) -> Dataset:
        return docstring_packages()

    def settle(self, side: Dataset) -> Dataset:
        return balanced(side, self.columns[1]) if self.dataset == "python" else side

    def encode(self, rows: Dataset) -> Iterator[dict[str, Any]]:
        for ids, label in zip(self.truncated(rows[self.columns[0]]), rows[self.columns[1]], strict=True):
            yield {"input_ids": ids, "labels": self.number(label)}
