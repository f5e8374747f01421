"""Changes over halves by matrix products are those of each half's own rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from depthcb.similarity.cka import cka_change_of_grams, cka_normalized_change_of_grams
from depthcb.similarity.gram import gram
from depthcb.similarity.subsets import (
    cka_normalized_over_subsets,
    cka_over_subsets,
    cosine_over_subsets,
    relative_l2_over_subsets,
)

PAIRS = [
    (cka_over_subsets, cka_change_of_grams),
    (cka_normalized_over_subsets, cka_normalized_change_of_grams),
]


def subsets(n: int, sizes: list[int]) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    found = torch.zeros(n, len(sizes), dtype=torch.float64)
    for column, size in enumerate(sizes):
        found[torch.randperm(n, generator=generator)[:size], column] = 1
    return found


def sides(kind: str, size: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(60, 24, generator=generator, dtype=torch.float64) for _ in range(2))
    if kind == "outlier":  # one direction carries nearly everything, as in real decoders
        x[:, 0] = 300 + 100 * x[:, 0]
    if kind == "scaled":
        return x, 3.7 * (x + size * noise)
    return x, x + size * noise


@pytest.mark.parametrize(("fast", "direct"), PAIRS)
@pytest.mark.parametrize("kind", ["plain", "outlier", "scaled"])
@pytest.mark.parametrize("size", [3.0, 0.3, 1e-2, 1e-4, 1e-6])
def test_is_that_of_each_subset(fast, direct, kind: str, size: float) -> None:  # type: ignore[no-untyped-def]
    before, after = (gram(rows) for rows in sides(kind, size))
    chosen = subsets(60, [30] * 8 + [29, 31, 12, 60])
    found = fast(before, after, chosen)
    for column, change in zip(chosen.T, found, strict=True):
        index = column.nonzero().flatten()
        wanted = direct(before[index][:, index], after[index][:, index])
        # The wanted value itself is a difference of two matrices of norm 1, so it carries its own rounding error.
        assert change.item() == pytest.approx(wanted.item(), rel=max(1e-10, 1e-14 / wanted.sqrt().item()))


@pytest.mark.parametrize(("fast", "direct"), PAIRS)
def test_nothing_moved_is_exactly_nothing(fast, direct) -> None:  # type: ignore[no-untyped-def]
    before = gram(sides("outlier", 1.0)[0])
    assert fast(before, before.clone(), subsets(60, [30] * 5)).tolist() == [0.0] * 5


@pytest.mark.parametrize(("fast", "direct"), PAIRS)
def test_halves_of_equal_rows_are_undefined(fast, direct) -> None:  # type: ignore[no-untyped-def]
    rows = torch.zeros(20, 5, dtype=torch.float64)
    rows[10:] = torch.randn(10, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moved = rows + 0.1 * torch.randn(20, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    chosen = torch.zeros(20, 2, dtype=torch.float64)
    chosen[:10, 0] = chosen[10:, 1] = 1
    found = fast(gram(rows), gram(moved), chosen)
    assert found.isnan().tolist() == [True, False]


@pytest.mark.parametrize("size", [3.0, 1e-2, 1e-6])
def test_measures_of_rows_are_those_of_each_subset(size: float) -> None:
    """Against NumPy in extended precision, because 1 - cosine is a small difference."""
    before, after = sides("outlier", size)
    chosen = subsets(60, [30] * 8 + [29, 1, 60])
    a, b = (side.numpy().astype(np.longdouble) for side in (before, after))
    norms = np.sqrt((a**2).sum(axis=1)), np.sqrt((b**2).sum(axis=1))
    of_rows = 1 - (a * b).sum(axis=1) / norms[0] / norms[1]
    inside = [column.numpy().astype(bool) for column in chosen.T]
    cosine = [float(of_rows[i].mean()) for i in inside]
    l2 = [float(np.sqrt(((b - a)[i] ** 2).sum() / (a[i] ** 2).sum())) for i in inside]
    # The difference in extended precision is itself known to 1e-19 only.
    assert cosine_over_subsets(before, after, chosen).tolist() == pytest.approx(cosine, rel=1e-9, abs=1e-18)
    assert relative_l2_over_subsets(before, after, chosen).tolist() == pytest.approx(l2, rel=1e-12)


def test_a_relative_change_from_nothing_is_undefined() -> None:
    before, after = torch.zeros(4, 3), torch.ones(4, 3)
    before[:2] = 1
    chosen = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    found = relative_l2_over_subsets(before, after, chosen)
    assert found[0] == 0
    assert found[1].isnan()
