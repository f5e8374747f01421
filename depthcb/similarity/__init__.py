"""Measures of how far a layer's activations moved: pure functions, and a table of them for `DepthProfile`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from depthcb.similarity.cka import (
    CKAChange,
    check_defined,
    cka_change,
    cka_change_of_grams,
    cka_normalized_change,
    cka_normalized_change_of_grams,
)
from depthcb.similarity.gram import effective_rank, gram
from depthcb.similarity.rows import cosine_change, procrustes_change, relative_l2_change

__all__ = [
    "MEASURES",
    "CKAChange",
    "Measure",
    "check_defined",
    "cka_change",
    "cka_normalized_change",
    "cosine_change",
    "effective_rank",
    "find_measures",
    "gram",
    "procrustes_change",
    "relative_l2_change",
]


@dataclass(frozen=True)
class Measure:
    """One way to say how far a layer moved.

    Args:
        name: The key it is asked for and logged by.
        needs: What must be kept of the reference: its ``"gram"`` (n, n), or its ``"rows"`` (n, d).
        change: Reference and current, both (..., n, n) or (..., n, d), to their change (...) in float64, NaN
            where it is not defined.
    """

    name: str
    needs: Literal["gram", "rows"]
    change: Callable[[Tensor, Tensor], Tensor]


MEASURES = {
    measure.name: measure
    for measure in (
        Measure("cka", "gram", cka_change_of_grams),
        Measure("cka_normalized", "gram", cka_normalized_change_of_grams),
        Measure("cosine", "rows", cosine_change),
        Measure("relative_l2", "rows", relative_l2_change),
        Measure("procrustes", "rows", procrustes_change),
    )
}


def find_measures(names: Sequence[str]) -> list[Measure]:
    """The measures of these names.

    Raises:
        ValueError: No name, one that does not exist, or one given twice.
    """
    if isinstance(names, str):
        raise ValueError(f"measures={names!r} is a string: give a tuple of names, such as ({names!r},).")
    unknown = [name for name in names if name not in MEASURES]
    if unknown or not names or len(set(names)) < len(names):
        raise ValueError(f"measures={tuple(names)!r}: give one or more distinct names out of {tuple(MEASURES)}.")
    return [MEASURES[name] for name in names]
