"""The type of a measure, and the registry of the built-in ones, which are registered where they are defined."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

from torch import Tensor

Change = Callable[[Tensor, Tensor], Tensor]
OverSubsets = Callable[[Tensor, Tensor, Tensor], Tensor]
Needs = Literal["gram", "factor", "rows"]
Function = TypeVar("Function", bound=Change)


@dataclass(frozen=True)
class Measure:
    """A measure of how far a layer has moved, with its labels.

    Args:
        name: The name used in ``measures=`` and in logged keys.
        needs: What it needs of the reference: ``"gram"``, the doubly centred Gram matrix (n, n) including its diagonal;
            ``"factor"``, the centred rows in coordinates of their own span, (n, min(n, d)); or ``"rows"`` (n, d), for n
            rows of d features.
        change: Maps two of these, of the reference and current, both (..., n, k), to the change (...) in float64: 0
            where nothing moved, never negative, NaN where undefined.
        title: Display name; defaults to ``name``.
        unit: Axis label; defaults to ``name``.
        definition: One-sentence definition, including the estimator.
        over_subsets: Maps reference and current, (n, k), and the columns of a 0/1 matrix (n, h) to the change (h,) over
            each of these subsets of the rows, faster than one after the other; None if there is no such way.
        depends_on_rows: Whether its expected value depends on the number of rows, as it does without debiasing. Changes
            over halves of the rows are then shifted so that their mean is the change over all rows.

    Example:
        >>> import torch
        >>> from depthcb import depth_profile
        >>> from depthcb.similarity import Measure
        >>> def mean_shift(before, after):
        ...     return (after.double().mean(-2) - before.double().mean(-2)).norm(dim=-1)
        >>> shift = Measure("mean_shift", "rows", mean_shift, "shift of the mean", "distance of the mean rows")
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(6, 6) for _ in range(3)])
        >>> depth_profile(model, model, torch.randn(32, 6), measures=("cka", shift))["mean_shift"].change
        (0.0, 0.0, 0.0)
    """

    name: str
    needs: Needs
    change: Change
    title: str = ""
    unit: str = ""
    definition: str = ""
    over_subsets: OverSubsets | None = None
    depends_on_rows: bool = False

    def __post_init__(self) -> None:
        if self.needs not in get_args(Needs):
            raise ValueError(f"Measure {self.name!r}: needs={self.needs!r} is unknown: use one of {get_args(Needs)}.")
        if not re.fullmatch(r"\w+", self.name):
            raise ValueError(
                f"Measure {self.name!r}: the name is part of logged keys: use only letters, digits and '_'."
            )

    def __call__(self, before: Tensor, after: Tensor) -> Tensor:
        """Computes the change.

        Args:
            before: (..., n, k) of the reference, see ``needs``.
            after: The same for the current model.

        Returns:
            The change (...) in float64.

        Raises:
            ValueError: ``change`` returned the wrong shape.
        """
        found, expected = self.change(before, after), tuple(before.shape[:-2])
        if tuple(found.shape) != expected:
            raise ValueError(
                f"change returned shape {tuple(found.shape)} for {tuple(before.shape)}, not {expected}: it must keep "
                "all dimensions but the last two"
            )
        return found.double()


#: The built-in measures by name, in the order of their definition.
MEASURES: dict[str, Measure] = {}


def register(
    name: str,
    needs: Needs,
    title: str,
    unit: str,
    definition: str,
    over_subsets: OverSubsets | None = None,
    depends_on_rows: bool = False,
) -> Callable[[Function], Function]:
    """Returns a decorator that registers a function as a built-in measure; the arguments are those of `Measure`."""

    def add(change: Function) -> Function:
        MEASURES[name] = Measure(name, needs, change, title, unit, definition, over_subsets, depends_on_rows)
        return change

    return add


def find_measures(measures: Sequence[str | Measure]) -> list[Measure]:
    """Resolves names to measures.

    Args:
        measures: Names from `MEASURES`, or `Measure` objects.

    Raises:
        ValueError: No measure, an unknown name or a duplicate name.
    """
    if isinstance(measures, str):
        raise ValueError(f"measures={measures!r} is a string: pass a tuple of names, such as ({measures!r},).")
    names = [m.name if isinstance(m, Measure) else m for m in measures]
    unknown = [m for m in measures if not isinstance(m, Measure) and m not in MEASURES]
    if unknown or not names or len(set(names)) < len(names):
        raise ValueError(f"measures={tuple(names)!r}: pass one or more distinct names from {tuple(MEASURES)}.")
    return [m if isinstance(m, Measure) else MEASURES[m] for m in measures]
