"""Change as 1 - linear CKA, plain and row-normalised."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from depthcb.errors import NotFiniteError
from depthcb.similarity.gram import doubly_centred, gram, half_squared_distance, u_centred, unit_norm, unit_rows
from depthcb.similarity.measure import register
from depthcb.similarity.subsets import cka_normalized_over_subsets, cka_over_subsets

MIN_ROWS = 4  # the U-centred estimator divides by n - 3


def cka_change(reference: Tensor, current: Tensor, *, debiased: bool = True) -> Tensor:
    """Computes 1 - linear CKA between two sets of activations of the same rows.

    Source: Kornblith et al., "Similarity of neural network representations revisited" (2019); debiased by U-centring
    as in Szekely & Rizzo (2014). Computed in float64 as half the squared distance between the two normalised centred
    Gram matrices, which is accurate for tiny changes. Invariant to rotating, scaling and shifting either side.

    Args:
        reference: Activations (n, d), one row per probe row.
        current: Activations (n, d') of the same rows.
        debiased: Whether to use the debiased estimator, for which unrelated rows give 1 on average for any n; the
            biased one tends to 0 when n <= d.

    Returns:
        A float64 scalar: exactly 0 for equal inputs, in [0, 2] debiased and [0, 1] biased.

    Raises:
        ValueError: The shapes don't match, there are fewer than 4 rows, values are not finite, or the rows have no
            variance.

    Example:
        >>> import torch
        >>> x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        >>> cka_change(x, x).item(), round(cka_change(x, 3 * x + 1).item(), 12)
        (0.0, 0.0)
    """
    check_rows(reference, current)
    return check_defined(cka_change_of_grams(gram(reference), gram(current), debiased=debiased))


def cka_normalized_change(reference: Tensor, current: Tensor, *, debiased: bool = True) -> Tensor:
    """Computes `cka_change` after centring each row by its side's mean and scaling it to unit norm [ours].

    Plain linear CKA weights rows by their norms, so that in real decoders a single outlier direction dominates; here
    every row counts equally. Invariant to rotating, shifting and scaling either side. Takes the same arguments as
    `cka_change`.
    """
    check_rows(reference, current)
    return check_defined(cka_normalized_change_of_grams(gram(reference), gram(current), debiased=debiased))


@register(
    "cka",
    "gram",
    title="change",
    unit="1 - CKA  (0 = unchanged)",
    definition="1 - linear CKA between the layer's activations on the probe in the pretrained and the current model, "
    "debiased (U-centred Gram matrices of all rows). 0 is unchanged, about 1 unrelated. Dimensionless.",
    over_subsets=cka_over_subsets,
)
def cka_change_of_grams(reference: Tensor, current: Tensor, *, debiased: bool = True) -> Tensor:
    """Computes `cka_change` (...) from Gram matrices (..., n, n), centred or not; NaN where a side's rows are equal."""
    centre = u_centred if debiased else doubly_centred
    return half_squared_distance(*(unit_norm(centre(k), k) for k in (reference, current)))


@register(
    "cka_normalized",
    "gram",
    title="normalised change",
    unit="1 - CKA, rows normalised",
    definition="The same with every row centred and scaled to unit norm first, so that no single large direction can "
    "dominate it. Dimensionless.",
    over_subsets=cka_normalized_over_subsets,
)
def cka_normalized_change_of_grams(reference: Tensor, current: Tensor, *, debiased: bool = True) -> Tensor:
    """Computes `cka_normalized_change` from Gram matrices; see `cka_change_of_grams`."""
    normalised = [unit_rows(doubly_centred(k)) for k in (reference, current)]
    return cka_change_of_grams(*normalised, debiased=debiased)


def check_defined(change: Tensor) -> Tensor:
    """Raises an error if a change is undefined, else returns it.

    Raises:
        ValueError: The change is NaN, because the rows have no variance or a row has no direction.
    """
    if bool(change.isnan().any()):
        raise ValueError("the rows are all identical, or one has no direction: use rows that differ")
    return change


def check_rows(reference: Tensor, current: Tensor) -> None:
    """Raises an error if two sets of rows cannot be compared.

    Raises:
        ValueError: They are not two matrices with the same number of rows, have fewer than 4 rows, or are not finite.
    """
    if reference.dim() != 2 or current.dim() != 2 or len(reference) != len(current):
        raise ValueError(
            f"reference is {tuple(reference.shape)} and current {tuple(current.shape)}: both must be (n, d) "
            "activations of the same n rows."
        )
    if len(reference) < MIN_ROWS:
        raise ValueError(f"{len(reference)} rows are too few to compare: pass at least {MIN_ROWS}.")
    for name, rows in (("reference", reference), ("current", current)):
        if not bool(rows.isfinite().all()):
            raise NotFiniteError(f"{name} contains NaN or infinite values: the change is undefined.")


class CKAChange(Metric):
    """A metric that computes `cka_change` once over the rows of all updates and ranks.

    Averaging over mini-batches would give a different, biased quantity. Memory: all rows until `compute`.

    Args:
        debiased: See `cka_change`.

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
        """Returns 1 - CKA over all rows added."""
        return cka_change(dim_zero_cat(self.reference), dim_zero_cat(self.current), debiased=self.debiased)
