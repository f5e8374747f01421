"""Every measure is compared to an independent float64 numpy computation and to closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial
import torch
from torch import Tensor

from depthcb.similarity import (
    MEASURES,
    CKAChange,
    Measure,
    cka_change,
    cka_normalized_change,
    cosine_change,
    effective_rank,
    find_measures,
    gram,
    procrustes_change,
    relative_l2_change,
)
from depthcb.similarity.gram import factor, u_centred
from depthcb.similarity.subsets import procrustes_over_subsets


def rows(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def hsic1(k: np.ndarray, l: np.ndarray) -> float:  # noqa: E741
    """The unbiased HSIC of Song et al. (2012), equation 5, term by term."""
    n = len(k)
    k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))  # noqa: E741
    one = np.ones(n)
    return float(
        np.trace(k @ l) + (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ l @ one)
    ) / (n * (n - 3))


def numpy_cka(x: Tensor, y: Tensor, debiased: bool) -> float:
    """CKA by its textbook ratio, not as a difference, and without shared code."""
    a, b = x.double().numpy(), y.double().numpy()
    if debiased:
        k, l = a @ a.T, b @ b.T  # noqa: E741
        return hsic1(k, l) / np.sqrt(hsic1(k, k) * hsic1(l, l))
    a, b = a - a.mean(0), b - b.mean(0)
    return float(np.linalg.norm(b.T @ a) ** 2 / (np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b)))


def unit(x: Tensor) -> Tensor:
    x = x.double() - x.double().mean(0)
    return x / x.norm(dim=1, keepdim=True)


@pytest.mark.parametrize(("n", "d", "e"), [(4, 3, 3), (20, 7, 5), (64, 300, 200), (200, 16, 16)])
@pytest.mark.parametrize("debiased", [True, False])
def test_cka_is_the_textbook_ratio(n: int, d: int, e: int, debiased: bool) -> None:
    x = rows(n, d, 0)
    y = x @ rows(d, e, 1) + 0.5 * rows(n, e, 2) + 3
    assert cka_change(x, y, debiased=debiased).item() == pytest.approx(1 - numpy_cka(x, y, debiased), rel=1e-6)
    # The norms are those of rows centred by each side's mean; the second centring removes the mean of the unit rows.
    expected = 1 - numpy_cka(unit(x), unit(y), debiased)
    assert cka_normalized_change(x, y, debiased=debiased).item() == pytest.approx(expected, rel=1e-6)


def truth(x: Tensor, y: Tensor) -> float:
    """Debiased 1 - CKA in extended precision: U-centring by its definition, then ||a - b||^2 / 2."""
    k = []
    for side in (x, y):
        a = side.double().numpy().astype(np.longdouble)
        g = (a - a.mean(0)) @ (a - a.mean(0)).T
        np.fill_diagonal(g, 0)
        n = len(g)
        r = g.sum(0)
        u = g - r[:, None] / (n - 2) - r[None, :] / (n - 2) + r.sum() / ((n - 1) * (n - 2))
        np.fill_diagonal(u, 0)
        k.append(u / np.sqrt((u * u).sum()))
    return float(((k[0] - k[1]) ** 2).sum() / 2)


@pytest.mark.parametrize("size", [0.4, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
def test_small_changes_are_right_within_a_percent(size: float) -> None:
    """Changes from 1e-1 down to 1e-10, where ``1 - cka`` in fp32 is noise."""
    x = rows(128, 256, 0)
    y = x + size * rows(128, 256, 1)
    change = cka_change(x, y).item()
    assert change == pytest.approx(truth(x, y), rel=0.01)
    assert 1e-11 < change < 0.3


def test_a_rotation_by_a_small_angle_has_a_closed_form() -> None:
    """Rows on two axes, one rotated by t towards a third: biased CKA follows from 2 x 2 Gram matrices."""
    t = 1e-4
    x = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]], dtype=torch.float64)
    y = x.clone()
    y[2:, 0], y[2:, 1] = x[2:, 1] * np.sin(t), x[2:, 1] * np.cos(t)
    # K = diag blocks of [[1,-1],[-1,1]]; Kt adds sin(t) blocks beside them: <K,Kt> = 8, ||Kt||^2 = 8 (1 + sin^2 t).
    assert cka_change(x, y, debiased=False).item() == pytest.approx(1 - 1 / np.sqrt(1 + np.sin(t) ** 2), rel=1e-6)


@pytest.mark.parametrize("measure", MEASURES)
def test_unchanged_is_zero(measure: str) -> None:
    x = rows(32, 12, 0)
    side = gram(x) if MEASURES[measure].needs == "gram" else x
    change = MEASURES[measure].change(side, side.clone()).item()
    assert change == 0 if measure != "procrustes" else change < 1e-25


@pytest.mark.parametrize("n", [32, 128, 512])
def test_unrelated_rows_have_changed_by_one(n: int) -> None:
    pairs = [(rows(n, 512, 2 * s), rows(n, 512, 2 * s + 1)) for s in range(8)]
    for change in (cka_change, cka_normalized_change):
        assert np.mean([change(x, y).item() for x, y in pairs]) == pytest.approx(1, abs=0.03)
    assert cka_change(*pairs[0], debiased=False).item() == pytest.approx(
        n / (n + 512), abs=0.03
    )  # the bias, for contrast


def test_invariances() -> None:
    x, y = rows(40, 10, 0), rows(40, 10, 0) + 0.3 * rows(40, 10, 1)
    turn = torch.linalg.qr(rows(10, 10, 2).double()).Q
    turned = 5 * (y.double() @ turn) + 2
    for change in (cka_change, cka_normalized_change, procrustes_change):
        assert change(x, turned).item() == pytest.approx(change(x, y).item(), rel=1e-6)
    lengths = torch.rand(40, 1, generator=torch.Generator().manual_seed(3)) + 0.5
    assert cosine_change(x, y * lengths).item() == pytest.approx(cosine_change(x, y).item(), rel=1e-5)
    assert cosine_change(x, turned).item() != pytest.approx(cosine_change(x, y).item(), rel=0.1)
    both = relative_l2_change(3 * x.double() @ turn, 3 * y.double() @ turn).item()
    assert both == pytest.approx(relative_l2_change(x, y).item(), rel=1e-6)


def test_row_measures_agree_with_scipy() -> None:
    x, y = rows(30, 8, 0), rows(30, 8, 1)
    a, b = x.double().numpy(), y.double().numpy()
    cosines = [scipy.spatial.distance.cosine(p, q) for p, q in zip(a, b, strict=True)]
    assert cosine_change(x, y).item() == pytest.approx(np.mean(cosines))
    assert relative_l2_change(x, y).item() == pytest.approx(scipy.linalg.norm(b - a) / scipy.linalg.norm(a))


@pytest.mark.parametrize(("d", "e"), [(8, 8), (5, 9), (60, 50)])
def test_procrustes_is_the_nuclear_norm(d: int, e: int) -> None:
    x, y = rows(30, d, 0), rows(30, e, 1)
    a, b = ((m - m.mean(0)) / np.linalg.norm(m - m.mean(0)) for m in (x.double().numpy(), y.double().numpy()))
    assert procrustes_change(x, y).item() == pytest.approx(1 - np.linalg.norm(b.T @ a, "nuc"))
    if d == e:
        turn, _ = scipy.linalg.orthogonal_procrustes(b, a)
        assert procrustes_change(x, y).item() == pytest.approx(np.linalg.norm(a - b @ turn) ** 2 / 2)


def test_u_centring_by_its_definition() -> None:
    k = gram(rows(9, 4, 0))
    u = u_centred(k)
    assert u.diagonal().abs().max() == 0
    assert u.sum(dim=0).abs().max() < 1e-12
    other = u_centred(k + rows(9, 1, 1).double() + rows(9, 1, 1).double().T)  # row and column offsets cancel
    assert torch.allclose(u, other)


def test_effective_rank_counts_directions() -> None:
    x = torch.zeros(12, 12).double()
    x[:6, 0], x[6:, 0] = 1, -1
    assert effective_rank(gram(x)).item() == pytest.approx(1)
    spread = np.linalg.svd((rows(40, 6, 0) - rows(40, 6, 0).mean(0)).double().numpy(), compute_uv=False) ** 2
    assert effective_rank(gram(rows(40, 6, 0))).item() == pytest.approx(spread.sum() ** 2 / (spread**2).sum(), rel=1e-5)


def test_batched_like_one_by_one() -> None:
    x, y = torch.stack([rows(16, 5, s) for s in range(3)]), torch.stack([rows(16, 5, s) for s in range(3, 6)])
    for measure in MEASURES.values():
        a, b = (gram(x), gram(y)) if measure.needs == "gram" else (x, y)
        one_by_one = torch.stack([measure.change(p, q) for p, q in zip(a, b, strict=True)])
        assert torch.allclose(measure.change(a, b), one_by_one)


@pytest.mark.parametrize("measure", MEASURES.values(), ids=list(MEASURES))
def test_what_is_not_defined_is_nan_and_spares_the_rest(measure: Measure) -> None:
    """Of three comparisons in a batch, only the one without variance is undefined."""
    x, y = torch.stack([rows(16, 5, s) for s in range(3)]), torch.stack([rows(16, 5, s) for s in range(3, 6)])
    x[1] = 0
    a, b = (gram(x), gram(y)) if measure.needs == "gram" else (x, y)
    assert measure.change(a, b).isnan().tolist() == [False, True, False]


def test_metric_computes_once_over_all_rows() -> None:
    x, y = rows(50, 20, 0), rows(50, 20, 0) + rows(50, 20, 1)
    metric = CKAChange()
    for a, b in zip(x.split(7), y.split(7), strict=True):
        metric.update(a, b)
    assert metric.compute().item() == pytest.approx(1 - numpy_cka(x, y, debiased=True), rel=1e-6)
    metric.reset()
    metric.update(x, x)
    assert metric.compute().item() == 0


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.ones(5, 2), torch.ones(6, 2), r"reference is \(5, 2\) and current \(6, 2\)"),
        (torch.ones(5), torch.ones(5), r"\(5,\)"),
        (rows(3, 2, 0), rows(3, 2, 1), "3 rows are too few"),
        (rows(5, 2, 0), rows(5, 2, 1) / 0, "current contains NaN or infinite"),
        (torch.ones(5, 2), rows(5, 2, 1), "rows are all identical"),
    ],
)
def test_bad_rows_are_refused(x: Tensor, y: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cka_change(x, y)


def test_unknown_measures_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'cca'.*'cka', 'cka_normalized'"):
        find_measures(["cca"])
    with pytest.raises(ValueError, match="is a string"):
        find_measures("cka")
    with pytest.raises(ValueError, match="distinct"):
        find_measures(["cka", "cka"])


@pytest.mark.parametrize("d", [6, 90])
def test_a_factor_stands_for_the_rows(d: int) -> None:
    x, y = rows(40, d, 0), rows(40, d, 0) + 0.1 * rows(40, d, 1)
    a, b = factor(x), factor(y)
    assert a.shape == (40, min(40, d))
    torch.testing.assert_close(a @ a.T, gram(x))
    assert procrustes_change(a, b).item() == pytest.approx(procrustes_change(x, y).item())
    assert not factor(torch.full((5, 3), 0.1)).any()


@pytest.mark.parametrize("size", [1e-5, 0.1])
def test_the_procrustes_change_without_a_row_is_foreseen(size: float) -> None:
    """The jackknife values are those of scipy's rotation, fitted again without each row."""
    x, y = rows(60, 8, 0), rows(60, 8, 0) + size * rows(60, 8, 1)

    def change(a: np.ndarray, b: np.ndarray) -> float:
        a, b = ((m - m.mean(0)) / np.linalg.norm(m - m.mean(0)) for m in (a, b))
        turn, _ = scipy.linalg.orthogonal_procrustes(b, a)
        return float(np.linalg.norm(a - b @ turn) ** 2 / 2)

    a, b = x.double().numpy(), y.double().numpy()
    without = np.array([change(np.delete(a, i, 0), np.delete(b, i, 0)) for i in range(60)])
    values = 59 * (change(a, b) - without)
    one_by_one = torch.eye(60, dtype=torch.float64)
    found = procrustes_over_subsets(factor(x), factor(y), one_by_one).numpy() - change(a, b)
    assert np.allclose(found, values - values.mean(), rtol=0.05, atol=0.1 * values.std())
    assert found.std() == pytest.approx(values.std(), rel=0.03)
