"""Measures that compare the rows themselves, or in coordinates of their span, instead of Gram matrices.

All functions take (..., n, d) tensors and return (...) in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from depthcb.similarity.gram import to_float64, unit_norm
from depthcb.similarity.measure import register
from depthcb.similarity.subsets import (
    cosine_changes,
    cosine_over_subsets,
    procrustes_over_subsets,
    relative_l2_over_subsets,
)


@register(
    "cosine",
    "rows",
    title="cosine change",
    unit="1 - cosine  (0 = unchanged)",
    definition="1 - cosine similarity of a row before and now, averaged over the rows. 0 is unchanged, 1 orthogonal. "
    "Dimensionless.",
    over_subsets=cosine_over_subsets,
)
def cosine_change(reference: Tensor, current: Tensor) -> Tensor:
    """Returns the mean over rows of 1 - cos(reference row, current row), in [0, 2].

    Invariant to scaling any row, but not to rotating or shifting, so both sides must share their coordinates. NaN if a
    row is all zeros.

    Example:
        >>> cosine_change(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])).item()
        1.0
    """
    return cosine_changes(reference, current).mean(dim=-1)


@register(
    "relative_l2",
    "rows",
    title="relative L2 change",
    unit="‖ΔH‖ / ‖H‖",
    definition="Norm of the change of the activations divided by their norm before. Dimensionless.",
    over_subsets=relative_l2_over_subsets,
)
def relative_l2_change(reference: Tensor, current: Tensor) -> Tensor:
    """Returns ||current - reference||_F / ||reference||_F, the norm of the change relative to the reference.

    Invariant to rotating or scaling both sides equally, but not to changing one side only. NaN if the reference is all
    zeros.

    Example:
        >>> relative_l2_change(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 5.0]])).item()
        0.2
    """
    a, b = to_float64(reference), to_float64(current)
    norm = torch.linalg.matrix_norm(a)
    ratio: Tensor = torch.linalg.matrix_norm(b - a) / torch.where(norm > 0, norm, torch.nan)
    return ratio


@register(
    "procrustes",
    "factor",
    title="Procrustes change",
    unit="Procrustes change  (0 = unchanged)",
    definition="The part of the change that no rotation explains: half the squared distance between the activations, "
    "centred and scaled to unit norm, after the best rotation; with more features than rows that explains part of any "
    "change, so that only probes of one size are comparable. 0 is unchanged, 1 the maximum. Dimensionless.",
    over_subsets=procrustes_over_subsets,
    depends_on_rows=True,
)
def procrustes_change(reference: Tensor, current: Tensor) -> Tensor:
    """Returns the change no rotation explains: min over orthogonal R of ||A - B R||^2 / 2 = 1 - ||A'B||_*, in [0, 1].

    A and B are the two sides with columns centred, scaled to Frobenius norm 1. Source: the Procrustes distance in Ding
    et al., "Grounding representation similarity through statistical testing" (2021), one of the paper's two measures
    [second-hand], halved to match the scale of 1 - CKA [ours]. Invariant to rotating, shifting and scaling either side.
    NaN if all rows of a side are equal.

    Example:
        >>> x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
        >>> round(procrustes_change(x, 2 * x.flip(-1) + 1).item(), 12)
        0.0
    """
    # The rows span at most n dimensions, so the rotation is found in n-dimensional coordinates (thin QR).
    a, b = _standard(reference), _standard(current)
    defined = ~(a.isnan().any(dim=(-2, -1)) | b.isnan().any(dim=(-2, -1)))
    a, b = (torch.linalg.qr(x.nan_to_num().mT, mode="r").R for x in (a, b))  # LAPACK rejects NaN
    width = max(a.shape[-2], b.shape[-2])
    a, b = (torch.nn.functional.pad(r, (0, 0, 0, width - r.shape[-2])) for r in (a, b))
    u, _, v = torch.linalg.svd(b @ a.mT)
    unexplained: Tensor = a.mT - b.mT @ u @ v
    return torch.where(defined, unexplained.square().sum(dim=(-2, -1)) / 2, torch.nan)


def _standard(rows: Tensor) -> Tensor:
    rows = to_float64(rows)
    return unit_norm(rows - rows.mean(dim=-2, keepdim=True), rows)
