"""The demo's sizes: the order in which they are reduced, and their selection by measured times."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from depthcb_recipes.demo.sizes import (
    MINUTES,
    QUICK,
    QUICK_MINUTES,
    SIZES,
    Costs,
    Settings,
    affordable,
    chosen,
    memory_needed,
)

GIVEN_UP = ["probe_rows", "block_size", "batch_size", "steps"]


def test_the_order_of_sacrifice() -> None:
    """Reduced in this order: probe rows, block length, batch size, steps (to 12), backbone."""
    for one, other in itertools.pairwise(SIZES.values()):
        differ = {f.name for f in dataclasses.fields(Settings) if getattr(one, f.name) != getattr(other, f.name)}
        if one.backbone != other.backbone:
            assert one.steps == 12
            assert other == QUICK
            continue
        (given_up,) = differ - {"validate_every"}
        assert getattr(other, given_up) < getattr(one, given_up)
        at = GIVEN_UP.index(given_up)
        full = next(size for size in SIZES.values() if size.backbone == one.backbone)
        assert all(getattr(one, name) < getattr(full, name) for name in GIVEN_UP[:at]), "what comes before was given up"
    assert min(size.steps for size in SIZES.values()) == 12
    assert all(size.steps % size.validate_every == 0 and size.validations >= 2 for size in SIZES.values())


@pytest.mark.parametrize("slower", [0.1, 1.0, 2.0, 4.0, 8.0])
def test_a_slower_machine_gives_up_more_and_keeps_to_its_minutes(slower: float) -> None:
    costs = Costs(2.0 * slower, 3.7 * slower, 256, 2.0 * slower, 1536)  # SmolLM2 on two cores with AVX2, and others
    sizes = list(SIZES.values())[:6]
    found = affordable(sizes, costs, 60 * MINUTES)
    if found is None:
        assert costs.seconds(sizes[-1]) > 60 * MINUTES
        return
    assert costs.seconds(found) <= 60 * MINUTES
    assert all(costs.seconds(size) > 60 * MINUTES for size in sizes[: sizes.index(found)])


def test_longer_steps_are_estimated_on_the_line_through_two() -> None:
    costs, short, long = Costs(3.0, 4.0, 256, 1.0, 1536), Settings(batch_size=4, block_size=64), Settings()

    def grows(step_twice: float) -> float:
        changed = dataclasses.replace(costs, step_twice=step_twice)
        return changed.step_seconds(long) / changed.step_seconds(short)

    assert grows(4.0) == pytest.approx(2.0)
    assert grows(2.0) == pytest.approx(1 + 0.25 * 3), "a step of more tokens is never free"
    assert grows(9.0) == pytest.approx(4.0), "nor more than in proportion"
    assert 0.5 * costs.step < costs.step_seconds(short) <= costs.step


def test_what_the_command_line_leaves_to_choose() -> None:
    assert chosen() == list(SIZES.values())
    assert {size.backbone for size in chosen(quick=True)} == {"minilm"}
    assert chosen("smollm2-3") == [SIZES["smollm2-3"]]
    own = chosen(backbone="gpt2", steps=40, precision="32-true")
    assert {(size.backbone, size.steps, size.precision) for size in own} == {("gpt2", 40, "32-true")}
    assert len(own) == len(set(own)) < len(SIZES), "no other backbone is given in place of the user's"
    assert [size.validate_every for size in chosen("smollm2-1", steps=4)] == [2]
    with pytest.raises(ValueError, match="--sizes huge is none of smollm2-1, smollm2-2"):
        chosen("huge")
    assert QUICK_MINUTES < MINUTES


def test_memory_grows_with_the_network_and_the_batch() -> None:
    small, large = SIZES["smollm2-6"], SIZES["smollm2-1"]
    assert 3e9 < memory_needed(134_515_008, small) < memory_needed(134_515_008, large) < 8e9
    assert memory_needed(22_700_000, QUICK) < memory_needed(134_515_008, small)
