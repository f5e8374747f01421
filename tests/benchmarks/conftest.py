"""Benchmarks use all cores that they may, unlike the tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from depthcb_recipes.machine import available_cores


@pytest.fixture(autouse=True)
def _all_cores() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(available_cores())
    yield
    torch.set_num_threads(before)
