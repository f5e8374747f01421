"""Property-based tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import TinyLM, seeded
from torch import Tensor, nn

from depthcb import LayerStack, Profile, depth_profile
from depthcb.similarity import cka_change, cka_normalized_change
from depthcb.step_ratio import imposed_ratios, rescale, step_ratios

SEEDS = st.integers(0, 10_000)
RUNS = settings(max_examples=20, deadline=None)


def rows(seed: int, n: int = 24, d: int = 7) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair() -> tuple[nn.Module, nn.Module]:
    """A decoder, and a copy with slightly different weights."""
    before, after = seeded(TinyLM), seeded(TinyLM)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for p in after.parameters():
            p += 0.02 * torch.randn(p.shape, generator=generator)
    return before.model, after.model  # type: ignore[return-value]


BEFORE, AFTER = pair()


def change(batches: list[dict[str, Tensor]]) -> dict[str, Any]:
    return {m: p.change for m, p in depth_profile(BEFORE, AFTER, batches, measures=("cka", "cka_normalized")).items()}


@pytest.mark.slow
@RUNS
@given(st.permutations(range(16)), st.lists(st.integers(1, 6), min_size=3, max_size=12))
def test_profiles_depend_neither_on_batch_size_nor_on_row_order(order: list[int], sizes: list[int]) -> None:
    tokens = torch.randint(1, 60, (16, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(16, 9, dtype=torch.int64)
    mask[::3, 6:] = 0  # ragged: padded on the right
    whole = change([{"input_ids": tokens, "attention_mask": mask}])
    index, parts = torch.tensor(order), []
    while len(index):
        size = sizes[len(parts) % len(sizes)]
        part, index = index[:size], index[size:]
        parts.append({"input_ids": tokens[part], "attention_mask": mask[part]})
    for measure, found in change(parts).items():
        assert found == pytest.approx(whole[measure], rel=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second kind of device")
@pytest.mark.parametrize("models", ["cpu", "cuda"])
def test_profiles_do_not_depend_on_where_the_probe_lies(models: str) -> None:
    tokens = torch.randint(1, 60, (16, 9), generator=torch.Generator().manual_seed(2))
    expected = change([{"input_ids": tokens}])
    before, after = (m.to(models) for m in pair())
    for probe in ("cpu", "cuda"):
        found = depth_profile(before, after, [{"input_ids": tokens.to(probe)}], measures=("cka", "cka_normalized"))
        for measure, profile in found.items():
            assert profile.change == pytest.approx(expected[measure], rel=1e-2 if models == "cuda" else 1e-6)


@RUNS
@given(SEEDS, st.floats(1e-3, 1e3))
def test_scaling_rotating_and_shifting_a_side_does_not_move_cka(seed: int, scale: float) -> None:
    x, y = rows(seed), rows(seed) + 0.1 * rows(seed + 1)
    rotation = torch.linalg.qr(rows(seed + 2, 7, 7)).Q
    for measure in (cka_change, cka_normalized_change):
        turned = measure(x, scale * y @ rotation + rows(seed + 3, 1))
        assert turned.item() == pytest.approx(measure(x, y).item(), rel=1e-6)
        assert measure(y, scale * y @ rotation).item() == pytest.approx(0, abs=1e-12)


@RUNS
@given(SEEDS, st.permutations(range(5)), st.sampled_from(["mean", "median", "min", "geometric_mean", 3e-3]))
def test_equal_step_commutes_with_relabelling_layers(seed: int, order: list[int], target: Any) -> None:
    def controlled(labels: list[int]) -> list[Tensor]:
        before = [[rows(seed + i), rows(seed + 10 + i, 3)] for i in labels]
        now = [
            [t + 0.01 * (i + 1) * rows(seed + 20 + i, len(t)) for t in layer]
            for i, layer in zip(labels, before, strict=True)
        ]
        ratios = step_ratios(now, before)
        rescale(now, before, imposed_ratios(target, ratios, 0) / ratios)
        return [torch.cat(layer) for layer in now]

    plain, relabelled = controlled(list(range(5))), controlled(order)
    for place, label in enumerate(order):
        torch.testing.assert_close(relabelled[place], plain[label], rtol=1e-12, atol=1e-12)


@RUNS
@given(st.lists(st.floats(1e-6, 2), min_size=2, max_size=40))
def test_slope_and_width_have_their_closed_forms(changes: list[float]) -> None:
    profile = Profile(tuple(changes), tuple(map(str, range(len(changes)))), "cka")
    x, c = np.linspace(0, 1, len(changes)), np.array(changes)
    assert profile.slope == pytest.approx(np.polyfit(x, c, 1)[0], abs=1e-9)
    assert profile.width == pytest.approx(c.sum() ** 2 / (len(c) * (c**2).sum()))
    assert 1 / len(c) - 1e-12 <= profile.width <= 1 + 1e-12


def test_the_stack_is_what_was_compared() -> None:
    """Sanity check: the two models differ in every layer."""
    layers = zip(LayerStack.find(BEFORE).parameters(), LayerStack.find(AFTER).parameters(), strict=True)
    assert all(not torch.equal(p, q) for a, b in layers for p, q in zip(a, b, strict=True))
