"""Step ratios, compared to numpy, and invariants of rescaling."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from depthcb import step_ratio
from depthcb.step_ratio import (
    check_target,
    imposed_ratios,
    layer_norms,
    rescale,
    rescaled_sums,
    revert,
    step_ratios,
)


def layers(scale: float, seed: int = 0) -> list[list[Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [[scale * torch.randn(40, 30, generator=g), scale * torch.randn(30, generator=g)] for _ in range(3)]


def vector(layer: list[Tensor]) -> np.ndarray:
    return np.concatenate([t.double().numpy().ravel() for t in layer])


def test_norms_of_large_tensors_are_exact() -> None:
    big = 0.02 * torch.randn(3_000_000, generator=torch.Generator().manual_seed(0)) + 0.01
    assert layer_norms([[big]]).item() == pytest.approx(np.linalg.norm(big.double().numpy()), rel=1e-9)


def test_ratios_agree_with_numpy_and_rescaling_keeps_directions() -> None:
    before, now = (
        layers(1.0),
        [[b + d for b, d in zip(*pair, strict=True)] for pair in zip(layers(1.0), layers(1e-3, 1), strict=True)],
    )
    start, moved = [vector(l) for l in before], [vector(l) for l in now]  # noqa: E741
    expected = [np.linalg.norm(m - s) / np.linalg.norm(s) for s, m in zip(start, moved, strict=True)]
    ratios = step_ratios(now, before)
    assert ratios.tolist() == pytest.approx(expected, rel=1e-5)
    rescale(now, before, torch.tensor([0.01, 1.0, 7.0]) * 1e-3 / ratios)
    for i, wanted in enumerate((1e-5, 1e-3, 7e-3)):
        step = vector(now[i]) - start[i]
        assert np.linalg.norm(step) / np.linalg.norm(start[i]) == pytest.approx(
            wanted, rel=1e-4 * max(1, 1e-3 / wanted)
        )
        cosine = step @ (moved[i] - start[i]) / np.linalg.norm(step) / np.linalg.norm(moved[i] - start[i])
        assert cosine > 0.9999


def test_a_scale_of_one_changes_no_bit() -> None:
    before, now = layers(1.0), layers(1.0, 1)
    copy = [[t.clone() for t in layer] for layer in now]
    step_ratios(now, before)
    rescale(now, before, torch.ones(3))
    assert all(torch.equal(a, b) for x, y in zip(now, copy, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_layer_is_put_back_whole(bad: float) -> None:
    before, now = layers(1.0), layers(1.0, 1)
    now[1][0][3, 4] = bad
    kept = now[0][0].clone()
    broken = ~step_ratios(now, before).isfinite()
    assert broken.tolist() == [False, True, False]
    revert(now, before, broken)
    assert all(torch.equal(a, b) for a, b in zip(now[1], before[1], strict=True))
    assert torch.equal(now[0][0], kept)


@pytest.mark.parametrize("scale", [1e-30, 1e-21, 1e-12, 1.0, 1e12, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_ratios_of_any_size_and_layout(scale: float, dtype: torch.dtype) -> None:
    """More elements than a block has, small and large numbers, and memory that is not in order."""
    generator = torch.Generator().manual_seed(0)
    before = [[(scale * torch.randn(shape, generator=generator)).to(dtype)] for shape in ((700, 500), (9, 4, 3, 3))]
    before[1][0] = before[1][0].to(memory_format=torch.channels_last)
    now = [
        [t + (0.02 * scale * torch.randn(t.shape, generator=generator)).to(dtype) for t in layer] for layer in before
    ]
    moved = [vector(n) - vector(b) for n, b in zip(now, before, strict=True)]
    expected = [np.linalg.norm(m) / np.linalg.norm(vector(b)) for m, b in zip(moved, before, strict=True)]
    assert step_ratios(now, before).tolist() == pytest.approx(expected, rel=1e-6)
    start, factors = [vector(b) for b in before], torch.tensor([0.5, 2.0], dtype=torch.float64)
    copies = [[t.clone() for t in layer] for layer in now]
    sums = rescaled_sums(copies, before, factors)
    rescale(now, before, factors)
    for pair in zip(copies, now, strict=True):
        assert torch.equal(*(layer[0] for layer in pair))
    squares = [
        [np.square(vector(n) - b * of_step).sum() for n, b in zip(now, start, strict=True)] for of_step in (0, 1)
    ]
    assert sums.numpy() == pytest.approx(np.array(squares), rel=1e-5)
    for layer, b, m, factor in zip(now, start, moved, factors.tolist(), strict=True):
        precision = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.5}[dtype]
        assert np.abs(vector(layer) - b - factor * m).max() < precision * np.abs(m).max()


@pytest.mark.parametrize("step", [1e-3, 3e-4, 1e-5, 1.3e-6])
def test_equal_steps_are_summed_exactly(step: float) -> None:
    """The first step of Adam moves all weights by about the same: summed one by one in fp32, errors add up."""
    before, now = torch.zeros(1000, 1001), torch.full((1000, 1001), step)
    before[0, 0] = 1.0
    now[0, 0] += 1.0
    expected = np.linalg.norm(now.double() - before.double())
    assert step_ratios([[now]], [[before]]).tolist() == pytest.approx([expected], rel=1e-6)


RATIOS = torch.tensor([0.1, 0.0, 0.4, 0.2], dtype=torch.float64)  # the second layer had no update


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("mean", [0.7 / 3] * 4),
        ("median", [0.2] * 4),
        ("min", [0.1] * 4),
        ("geometric_mean", [0.2] * 4),
        (0.5, [0.5] * 4),
        ((1, 1, 2, 4), [0.7 / 3 * w / 2 for w in (1, 1, 2, 4)]),
        (lambda r, step: r * 0 + step, [5.0] * 4),
    ],
)
def test_targets(target: object, expected: list[float]) -> None:
    assert imposed_ratios(target, RATIOS, step=5).tolist() == pytest.approx(expected)  # type: ignore[arg-type]


def test_median_of_an_even_number() -> None:
    ratios = torch.tensor([0.1, 0.0, 0.4])
    assert imposed_ratios("median", ratios, 0)[0].item() == pytest.approx(0.25)


def test_no_update_at_all_gives_no_error() -> None:
    for target in ("mean", "median", "min", "geometric_mean"):
        imposed_ratios(target, torch.zeros(3), 0)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("max", "target='max' is unknown"),
        (0.0, "contains 0.0"),
        (-1, "contains -1.0"),
        (float("nan"), "contains nan"),
        ([1.0, -1.0, 1.0], "contains -1.0"),
        ([1.0, 2.0], "2 numbers for 3 controlled layers"),
    ],
)
def test_bad_targets_are_refused(target: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_target(target, layers=3)  # type: ignore[arg-type]


def test_a_callable_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"returned shape \(2,\), not \(4,\)"):
        imposed_ratios(lambda r, step: r[:2], RATIOS, 0)


def test_an_accelerator_sums_up_runs_of_tensors_whatever_their_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_ratio, "TOGETHER", 100)
    before = [torch.randn(size) for size in (30, 70, 1, 500, 20, 40)]
    now = [b + 1e-2 * torch.randn_like(b) for b in before]
    runs = list(step_ratio._together(now, before))
    assert [[len(t) for t in side] for side, _ in runs] == [[30, 70], [1], [500], [20, 40]]
    sums = torch.cat([step_ratio._sums_together(*run) for run in runs], dim=1)
    squares = [[float(np.square(t.double().numpy()).sum()) for t in side] for side in (before, [n - b for n, b in zip(now, before, strict=True)])]  # fmt: skip
    assert sums.numpy() == pytest.approx(np.array(squares), rel=1e-5)
