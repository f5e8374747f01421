"""Centred Gram matrices: what a layer's CKA sees of n rows, whatever their width.

All functions take (..., n, n) tensors and work on the last two dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """``x`` in float64, on the CPU where its device has none (MPS)."""
    return (x.cpu() if x.device.type == "mps" else x).to(torch.float64)


def gram(rows: Tensor) -> Tensor:
    """Doubly centred, unnormalised Gram matrix of (..., n, d) rows: (..., n, n) in float64.

    >>> gram(torch.tensor([[0.0], [2.0]])).tolist()
    [[1.0, -1.0], [-1.0, 1.0]]
    """
    rows = wide(rows)
    rows = rows - rows.mean(dim=-2, keepdim=True)
    return rows @ rows.mT


def doubly_centred(k: Tensor) -> Tensor:
    """H K H with H = I - 11'/n: the Gram matrix of the rows minus their mean."""
    rows = k.mean(dim=-1, keepdim=True)
    return k - rows - rows.mT + rows.mean(dim=-2, keepdim=True)


def u_centred(k: Tensor) -> Tensor:
    """U-centred K: zero diagonal and zero row sums, which makes its inner products unbiased.

    Source: Szekely & Rizzo, "Partial distance correlation with methods for dissimilarities" (2014), for n >= 4.
    """
    n = k.shape[-1]
    k = k - torch.diag_embed(k.diagonal(dim1=-2, dim2=-1))
    rows = k.sum(dim=-1, keepdim=True) / (n - 2)
    total = rows.sum(dim=-2, keepdim=True) / (n - 1)
    k = k - rows - rows.mT + total
    return k - torch.diag_embed(k.diagonal(dim1=-2, dim2=-1))


def unit_rows(k: Tensor) -> Tensor:
    """K_ij / sqrt(K_ii K_jj): the Gram matrix after each row has been scaled to unit norm.

    Raises:
        ValueError: A row has norm 0.
    """
    norms = k.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()  # a rounded -1e-20 is a norm of 0, refused below
    if bool((norms == 0).any()):
        raise ValueError("a row equals the mean of all rows, so it has no direction: use rows that differ")
    return k / (norms[..., :, None] * norms[..., None, :])


def half_squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - cos(A, B) over the last two dimensions, as half the squared distance of A/||A|| and B/||B||.

    The identity is exact, and unlike ``1 - cos`` it keeps its relative precision for changes far below 1e-8.

    Raises:
        ValueError: A or B is 0.
    """
    norm_a = torch.linalg.matrix_norm(a, keepdim=True)
    norm_b = torch.linalg.matrix_norm(b, keepdim=True)
    if bool((norm_a == 0).any() or (norm_b == 0).any()):
        raise ValueError("all rows are identical, so they have no variance to compare: use rows that differ")
    difference: Tensor = a / norm_a - b / norm_b
    return difference.square().sum(dim=(-2, -1)) / 2


def effective_rank(k: Tensor) -> Tensor:
    """(tr K)^2 / ||K||_F^2 of a doubly centred Gram matrix: how many directions a layer's CKA really sees [ours].

    >>> effective_rank(torch.eye(3).double()).item()
    3.0
    """
    trace = k.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    return trace.square() / k.square().sum(dim=(-2, -1))
