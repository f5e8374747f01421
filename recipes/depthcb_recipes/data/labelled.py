"""What data with labels share: which labels there are, and their numbers."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

from datasets import ClassLabel

from depthcb_recipes.data.text_data import TextData


class LabelledData(TextData):
    """Data whose second column holds labels, as numbers or as names; arguments and errors are those of `TextData`."""

    @cached_property
    def label_names(self) -> list[str]:
        """What the labels 0, 1, … stand for: the data set's own order, or the alphabet's.

        Raises:
            ValueError: Labels that are neither names nor whole numbers; fewer than two.
        """
        return list(self._classes.names) if self._classes else list(map(str, self._numbers))

    @property
    def num_labels(self) -> int:
        """How many labels there are."""
        return len(self.label_names)

    def number(self, label: Any) -> int:
        """The number of a label.

        Raises:
            ValueError: There is no such label: unlabelled rows often have -1.
        """
        try:
            return self._numbers[label]
        except KeyError:
            raise ValueError(
                f"A row of {self.dataset!r} has the label {label!r} in {self.columns[1]!r}: leave it out."
            ) from None

    def all_labels(self) -> Iterable[Any]:
        """Every label in the data."""
        raise NotImplementedError

    @property
    def _classes(self) -> ClassLabel | None:
        """The data set's own list of labels, if it has one."""
        feature = self.sides[0].features[self.columns[1]]
        feature = getattr(feature, "feature", feature)
        return feature if isinstance(feature, ClassLabel) else None

    @cached_property
    def _numbers(self) -> dict[Any, int]:
        if self._classes:
            return {i: i for i in range(self._classes.num_classes)}
        found = set(self.all_labels())
        for label in found:
            if not isinstance(label, (str, int)):
                raise ValueError(
                    f"The label {label!r} in column {self.columns[1]!r} of {self.dataset!r} is neither a name nor a "
                    "whole number: name another column, or leave such rows out."
                )
        if len(found) < 2:
            raise ValueError(f"Column {self.columns[1]!r} of {self.dataset!r} has one label alone: {found}.")
        return {label: i for i, label in enumerate(sorted(found))}
