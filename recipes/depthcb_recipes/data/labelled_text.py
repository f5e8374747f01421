"""Texts with one label each, for sequence classification."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from depthcb_recipes.data.corpus import balanced, docstring_packages
from depthcb_recipes.data.labelled import LabelledData


class LabelledText(LabelledData):
    """Texts and their labels, for `SequenceClassification`.

    In the Python corpus, the texts are docstrings and the label is the library they come from: eight libraries with
    equally many docstrings each. Library names are masked in the text.

    Args:
        backbone: See `TextData`.
        dataset: See `TextData`.
        text: Name of the text column.
        label: Name of the label column (class indices or names).
        **options: See `TextData`.

    Raises:
        ValueError: See `TextData`; also if there are fewer than two labels.
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
