"""Base class for labelled data: label names and class indices."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

from datasets import ClassLabel

from depthcb_recipes.data.text_data import TextData


class LabelledData(TextData):
    """Data whose second column holds labels, as class indices or names; see `TextData` for arguments and errors."""

    @cached_property
    def label_names(self) -> list[str]:
        """Names of the classes 0, 1, …, in the dataset's own order if it defines one, otherwise sorted.

        Raises:
            ValueError: If a label is neither a string nor an integer, or there are fewer than two labels.
        """
        return list(self._classes.names) if self._classes else list(map(str, self._numbers))

    @property
    def num_labels(self) -> int:
        """Number of labels."""
        return len(self.label_names)

    def number(self, label: Any) -> int:
        """Returns the class index of a label.

        Raises:
            ValueError: If the label is unknown; unlabelled rows often have -1.
        """
        try:
            return self._numbers[label]
        except KeyError:
            raise ValueError(
                f"A row of {self.dataset!r} has the label {label!r} in {self.columns[1]!r}: remove it."
            ) from None

    def all_labels(self) -> Iterable[Any]:
        """Yields every label in the data."""
        raise NotImplementedError

    @property
    def _classes(self) -> ClassLabel | None:
        """The dataset's own `ClassLabel` feature, if it has one."""
        feature = self.sides[0].features[self.columns[1]]
        feature = getattr(feature, "feature", feature)
        return feature if isinstance(feature, ClassLabel) else None

    @cached_property
    def _numbers(self) -> dict[Any, int]:
        if self._classes:
            return {i: i for i in range(self._classes.num_classes)}
        labels = set(self.all_labels())
        for label in labels:
            if not isinstance(label, (str, int)):
                raise ValueError(
                    f"The label {label!r} in column {self.columns[1]!r} of {self.dataset!r} is neither a string nor "
                    "an integer: choose another column or remove such rows."
                )
        if len(labels) < 2:
            raise ValueError(f"Column {self.columns[1]!r} of {self.dataset!r} has only one label: {labels}.")
        return {label: i for i, label in enumerate(sorted(labels))}
