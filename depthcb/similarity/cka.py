"""Change as 1 - linear CKA, plain and row-normalised."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from depthcb.errors import NotFiniteError
from depthcb.similarity.gram import doubly_centred, gram, half_squared_distance, u_centred, unit_norm, unit_rows

MIN_ROWS = 4  # the U-centred estimator divides by n - 3


def cka_change(reference: Tensor, current: Tensor, *, debiased: bool = True) -> Tensor:
    """1 - linear CKA of two sets of activations of the same rows.

    Source: Kornblith et al., "Similarity of neural network representations revisited" (2019); debiased by U-centring
    as in Szekely & Rizzo (2014). Computed in float64 as half the squared distance of the two normalised centred Gram
    matrices, which is exact for tiny changes. Invariant to rotating, scaling and shifting either side.

    Args:
        reference: Activations (n, d), one row per probe row.
        current: Activations (n, d') of the same rows.
        debiased: Whether unrelated rows give 1 on average for any n; the biased form tends to 0 when n <= d.

    Returns:
        A float64 scalar: exactly 0 for equal inputs, in [0, 2] debiased and [0, 1] biased.

    Raises:
        ValueError: Shapes that don't pair, fewer than 4 rows, values that are not finite, or rows without variance.

    Example:
        >>> import torch
        >>> x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        >>> cka_change(x, x).item(), round(cka_change(x, 3 * x + 1).item(), 12)
        (0.0, 0.0)
    """
    check_rows(reference, current)
    return check_defined(cka_change_of_grams(gram(reference), gram(current), debiased=debiased))


def cka_normalized_change(reference: Tensor, current: Tensor, *, debiased: bool = True) -> Tensor:
    """The same after each row was centred by its side's mean and scaled to unit norm [ours].

    Plain linear CKA weighs rows by their norms, so that in real decoders one outlier direction decides; here every
    row counts alike. Invariant to rotating, shifting and scaling either side. Arguments as `cka_change`.
    """
    check_rows(reference, current)
    return check_defined(cka_normalized_change_of_grams(gram(reference), gram(current), debiased=debiased))


def cka_change_of_grams(reference: Tensor, current: Tensor, *, debiased: bool = True) -> Tensor:
    """`cka_change` from Gram matrices (..., n, n), centred or not: (...), NaN where all rows of a side are the same."""
    centre = u_centred if debiased else doubly_centred
    return half_squared_distance(*(unit_norm(centre(k), k) for k in (reference, current)))


def cka_normalized_change_of_grams(reference: Tensor, current: Tensor, *, debiased: bool = True) -> Tensor:
    """`cka_normalized_change` from Gram matrices (..., n, n), centred or not: (...), NaN as above."""
    normalised = [unit_rows(doubly_centred(k)) for k in (reference, current)]
    return cka_change_of_grams(*normalised, debiased=debiased)


def check_defined(change: Tensor) -> Tensor:
    """Refuses a change that is not defined.

    Raises:
        ValueError: NaN, which the measures give for rows without variance or direction.
    """
    if bool(change.isnan().any()):
        raise ValueError("the rows are all identical, or one has no direction: use rows that differ")
    return change


def check_rows(reference: Tensor, current: Tensor) -> None:
    """Refuses two sets of rows that cannot be compared.

    Raises:
        ValueError: Not two matrices of equally many rows, fewer than 4 rows, or values that are not finite.
    """
    if reference.dim() != 2 or current.dim() != 2 or len(reference) != len(current):
        raise ValueError(
            f"reference is {tuple(reference.shape)} and current {tuple(current.shape)}: both must be (n, d) "
            "activations of the same n rows."
        )
    if len(reference) < MIN_ROWS:
        raise ValueError(f"{len(reference)} rows are too few to compare: give at least {MIN_ROWS}.")
    for name, rows in (("reference", reference), ("current", current)):
        if not bool(rows.isfinite().all()):
            raise NotFiniteError(f"{name} holds NaN or infinite values: no change can be computed from it.")


class CKAChange(Metric):
    """`cka_change` over all rows of all updates and ranks, computed once.

    Averaging over mini-batches would be another, biased quantity. Memory: every row, until `compute`.

    Args:
        debiased: As in `cka_change`.

    Example:
        >>> import torch
        >>> metric = CKAChange()
        >>> x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        >>> for rows in x.split(16):
        ...     metric.update(rows, rows)
        >>> metric.compute().item()
        0.0
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    reference: list[Tensor]
    current: list[Tensor]

    def __init__(self, *, debiased: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.debiased = debiased
        self.add_state("reference", default=[], dist_reduce_fx="cat")
        self.add_state("current", default=[], dist_reduce_fx="cat")

    def update(self, reference: Tensor, current: Tensor) -> None:
        """Adds (n, d) and (n, d') activations of the same rows."""
        self.reference.append(reference.detach())
        self.current.append(current.detach())

    def compute(self) -> Tensor:
        """1 - CKA over everything added."""
        return cka_change(dim_zero_cat(self.reference), dim_zero_cat(self.current), debiased=self.debiased)
