"""Resuming with other measures joined their profiles by position: rows of two steps in one, or an IndexError."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import TinyLM, fit, seeded
from test_bugs.test_records_belong_to_a_fit import logger, pytestmark, resumed

from depthcb import DepthProfile

__all__ = ["pytestmark"]


@pytest.mark.parametrize(
    ("before", "after", "earlier"),
    [
        (("cka",), ("cka", "cka_normalized"), {"cka": 2, "cka_normalized": 0}),
        (("cka_normalized",), ("cka", "cka_normalized"), {"cka": 0, "cka_normalized": 2}),
        (("cka", "cka_normalized"), ("cka_normalized",), {"cka_normalized": 2}),
    ],
)
@pytest.mark.parametrize("folder", ["same", "other"])
def test_profiles_are_joined_by_step(
    folder: str, before: tuple[str, ...], after: tuple[str, ...], earlier: dict[str, int], tmp_path: Path
) -> None:
    options = {"logger": logger(tmp_path / "same"), "val_check_interval": 2}
    fit(seeded(TinyLM), [DepthProfile(measures=before)], **options).save_checkpoint(tmp_path / "last.ckpt")
    watch = DepthProfile(measures=after)
    run = resumed(tmp_path / folder, tmp_path / "last.ckpt", watch)
    assert run.profiles == watch.profiles_by_measure
    last = [p.step for p in run.profiles["cka_normalized"]][-2:]
    steps = {measure: [p.step for p in profiles] for measure, profiles in run.profiles.items()}
    assert steps == {measure: [1, 3][:count] + last for measure, count in earlier.items()}
    assert all(p.measure == measure for measure, profiles in run.profiles.items() for p in profiles)
