"""Centred Gram matrices, which CKA compares; their size depends on the number of rows n, not on the layer width.

Unless noted otherwise, functions take (..., n, n) tensors and operate on the last two dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Relative size below which a result is rounding error rather than signal.
DEGENERATE = 1e-12


def to_float64(x: Tensor) -> Tensor:
    """Returns ``x`` in float64, moved to the CPU if its device does not support it (MPS)."""
    return (x.cpu() if x.device.type == "mps" else x).to(torch.float64)


def gram(rows: Tensor) -> Tensor:
    """Returns the doubly centred, unnormalised Gram matrix of (..., n, d) rows: (..., n, n) in float64.

    >>> gram(torch.tensor([[0.0], [2.0]])).tolist()
    [[1.0, -1.0], [-1.0, 1.0]]
    """
    rows = to_float64(rows)
    rows = rows - rows.mean(dim=-2, keepdim=True)
    return rows @ rows.mT


def factor(rows: Tensor) -> Tensor:
    """Returns centred (n, d) rows in coordinates of their own span, (n, min(n, d)) in float64, with their Gram matrix.

    All zeros if the rows differ by rounding errors only.

    >>> factor(torch.tensor([[0.0, 0.0, 0.0], [0.0, 3.0, 4.0]])).norm(dim=1).tolist()
    [2.5, 2.5]
    """
    rows = to_float64(rows)
    centred = rows - rows.mean(dim=0)
    if torch.linalg.matrix_norm(centred) <= DEGENERATE * torch.linalg.matrix_norm(rows):
        centred = torch.zeros_like(centred)
    return centred if rows.shape[1] <= rows.shape[0] else torch.linalg.qr(centred.mT, mode="r").R.mT


def sketch(kind: str, rows: Tensor) -> Tensor:
    """Returns what a measure that needs ``kind`` compares of (n, d) rows, see `Measure`."""
    return gram(rows) if kind == "gram" else factor(rows) if kind == "factor" else rows


def doubly_centred(k: Tensor) -> Tensor:
    """Returns H K H with H = I - 11'/n: the Gram matrix of the rows minus their mean."""
    rows = k.mean(dim=-1, keepdim=True)
    return k - rows - rows.mT + rows.mean(dim=-2, keepdim=True)


def u_centred(k: Tensor) -> Tensor:
    """Returns U-centred K, with zero diagonal and zero row sums, which makes its inner products unbiased.

    Source: Szekely & Rizzo, "Partial distance correlation with methods for dissimilarities" (2014), for n >= 4.
    """
    n = k.shape[-1]
    k = k - torch.diag_embed(k.diagonal(dim1=-2, dim2=-1))
    rows = k.sum(dim=-1, keepdim=True) / (n - 2)
    total = rows.sum(dim=-2, keepdim=True) / (n - 1)
    k = k - rows - rows.mT + total
    return k - torch.diag_embed(k.diagonal(dim1=-2, dim2=-1))


def unit_rows(k: Tensor) -> Tensor:
    """Returns K_ij / sqrt(K_ii K_jj), the Gram matrix of the rows scaled to unit norm; NaN for a row of norm 0."""
    squares = k.diagonal(dim1=-2, dim2=-1)
    directed = squares > DEGENERATE * squares.amax(dim=-1, keepdim=True)
    norms = torch.where(directed, squares, torch.nan).sqrt()
    return k / (norms[..., :, None] * norms[..., None, :])


def unit_norm(centred: Tensor, k: Tensor) -> Tensor:
    """Returns ``centred`` scaled to Frobenius norm 1; NaN if only rounding errors of ``k`` remain (equal rows)."""
    norm = torch.linalg.matrix_norm(centred, keepdim=True)
    spread = norm > DEGENERATE * torch.linalg.matrix_norm(k, keepdim=True)
    return centred / torch.where(spread, norm, torch.nan)


def half_squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """Computes 1 - cos(A, B) of two matrices of norm 1 (last two dimensions) as half their squared distance.

    The identity is exact, and unlike ``1 - cos`` it keeps its relative precision for changes far below 1e-8.
    """
    return (a - b).square().sum(dim=(-2, -1)) / 2


def effective_rank(k: Tensor) -> Tensor:
    """Returns (tr K)^2 / ||K||_F^2 of a doubly centred Gram matrix: the number of directions that CKA sees [ours].

    >>> effective_rank(torch.eye(3).double()).item()
    3.0
    """
    trace = k.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    return trace.square() / k.square().sum(dim=(-2, -1))
