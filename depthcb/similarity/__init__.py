"""Measures of how far a layer's activations moved: pure functions, and a table of them for `DepthProfile`."""

from __future__ import annotations

import re
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
    """One way to say how far a layer moved, with its words.

    Args:
        name: The key it is asked for and logged by.
        needs: What is kept of the reference for it: ``"gram"``, the doubly centred (n, n) with its diagonal, or
            ``"rows"`` (n, d); n rows of d features.
        change: Maps reference and current, both (..., n, n) or (..., n, d), to their change (...) in float64: 0 where
            nothing moved, never below it, NaN where it is not defined.
        title: What it is called; by default its name.
        unit: The label of an axis that shows it; by default its name.
        definition: What it is, estimator included.

    Example:
        >>> import torch
        >>> from depthcb import depth_profile
        >>> def mean_shift(before, after):
        ...     return (after.double().mean(-2) - before.double().mean(-2)).norm(dim=-1)
        >>> shift = Measure("mean_shift", "rows", mean_shift, "shift of the mean", "distance of the mean rows")
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(6, 6) for _ in range(3)])
        >>> depth_profile(model, model, torch.randn(32, 6), measures=("cka", shift))["mean_shift"].change
        (0.0, 0.0, 0.0)
    """

    name: str
    needs: Literal["gram", "rows"]
    change: Callable[[Tensor, Tensor], Tensor]
    title: str = ""
    unit: str = ""
    definition: str = ""

    def __post_init__(self) -> None:
        if self.needs not in ("gram", "rows"):
            raise ValueError(f"Measure {self.name!r}: needs={self.needs!r} is unknown: use 'gram' or 'rows'.")
        if not re.fullmatch(r"\w+", self.name):
            raise ValueError(f"Measure {self.name!r}: a name is part of logged keys: use letters, digits and '_'.")

    def __call__(self, before: Tensor, after: Tensor) -> Tensor:
        """The change.

        Args:
            before: (..., n, n) or (..., n, d), the reference.
            after: The same of the current model.

        Returns:
            (...) in float64.

        Raises:
            ValueError: ``change`` gives another shape.
        """
        found, expected = self.change(before, after), tuple(before.shape[:-2])
        if tuple(found.shape) != expected:
            raise ValueError(
                f"change returned shape {tuple(found.shape)} for {tuple(before.shape)}, not {expected}: it must keep "
                "all dimensions but the last two"
            )
        return found.double()


#: The measures that have a name of their own in ``measures=``.
MEASURES = {
    measure.name: measure
    for measure in (
        Measure(
            "cka",
            "gram",
            cka_change_of_grams,
            "change",
            "1 - CKA  (0 = unchanged)",
            "1 - linear CKA of the layer's activations on the probe, pretrained model against now, debiased (U-centred "
            "Grams of all rows at once). 0 is unchanged, about 1 unrelated. No unit.",
        ),
        Measure(
            "cka_normalized",
            "gram",
            cka_normalized_change_of_grams,
            "normalised change",
            "1 - CKA, rows normalised",
            "The same after every row is centred and scaled to length 1, so that one large direction cannot rule it. "
            "No unit.",
        ),
        Measure(
            "cosine",
            "rows",
            cosine_change,
            "cosine change",
            "1 - cosine  (0 = unchanged)",
            "1 - cosine of a row before and now, mean over the rows. 0 is unchanged, 1 orthogonal. No unit.",
        ),
        Measure(
            "relative_l2",
            "rows",
            relative_l2_change,
            "relative L2 change",
            "‖ΔH‖ / ‖H‖",
            "Distance of the activations before and now over their length before. No unit.",
        ),
        Measure(
            "procrustes",
            "rows",
            procrustes_change,
            "Procrustes change",
            "Procrustes change  (0 = unchanged)",
            "What no rotation explains of the move: halved squared distance of the activations, centred and scaled to "
            "length 1, after the best rotation. 0 is unchanged, 1 the most. No unit.",
        ),
    )
}


def find_measures(measures: Sequence[str | Measure]) -> list[Measure]:
    """The measures that are asked for.

    Args:
        measures: Names out of `MEASURES`, or measures themselves.

    Raises:
        ValueError: None, a name that does not exist, or one that is given twice.
    """
    if isinstance(measures, str):
        raise ValueError(f"measures={measures!r} is a string: give a tuple of names, such as ({measures!r},).")
    names = [m.name if isinstance(m, Measure) else m for m in measures]
    unknown = [m for m in measures if not isinstance(m, Measure) and m not in MEASURES]
    if unknown or not names or len(set(names)) < len(names):
        raise ValueError(f"measures={tuple(names)!r}: give one or more distinct names out of {tuple(MEASURES)}.")
    return [m if isinstance(m, Measure) else MEASURES[m] for m in measures]
