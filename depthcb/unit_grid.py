"""Values of units smaller than layers as a table of layer x kind, for heatmaps."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, eq=False)
class UnitGrid:
    """Values by layer and by kind of unit.

    Args:
        layers: The R layers, or modules outside them, in order.
        kinds: The K kinds of units, such as ``"mlp.c_fc.weight"``; numbered ones (experts) are one kind, with a ``*``.
        values: (R, K) values, the mean over numbered units; NaN where a layer has none of a kind.
    """

    layers: tuple[str, ...]
    kinds: tuple[str, ...]
    values: npt.NDArray[np.float64]

    @classmethod
    def of(cls, values: Mapping[str, float]) -> UnitGrid:
        """Arranges values by the key of their unit.

        >>> grid = UnitGrid.of({"L00/attention": 1.0, "L00/mlp.experts.0.up": 2.0, "L00/mlp.experts.1.up": 4.0})
        >>> grid.kinds, grid.values.tolist()
        (('attention', 'mlp.experts.*.up'), [[1.0, 3.0]])
        """
        cells: dict[tuple[str, str], list[float]] = {}
        for key, value in values.items():
            layer, _, part = key.partition("/")
            cells.setdefault((layer, re.sub(r"(?<=\.)\d+(?=\.)", "*", part)), []).append(value)
        layers, kinds = (tuple(dict.fromkeys(names)) for names in zip(*cells, strict=True)) if cells else ((), ())
        table = np.full((len(layers), len(kinds)), np.nan)
        for (layer, kind), found in cells.items():
            table[layers.index(layer), kinds.index(kind)] = np.mean(found)
        return cls(layers, kinds, table)

    @property
    def labels(self) -> list[str]:
        """Names of the kinds without the ``.weight`` that most of them end in."""
        return [kind.removesuffix(".weight") for kind in self.kinds]


def small_unit(key: str) -> bool:
    """Returns whether a key is that of a unit smaller than a layer.

    >>> [small_unit(key) for key in ("L00", "L00/attention", "spread", "grad_norm/L00")]
    [False, True, False, False]
    """
    return bool(re.match(r"(L\d+)/.", key))
