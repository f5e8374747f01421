"""Random fits against three oracles.

Unchanged weights give exactly 0; a watched fit is the unwatched one bit for bit; controlled steps are equal, or there is
an error.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from random_fits import CASES, Case, run
from support import Judge

from depthcb import DepthProfile, EqualStep, UpdateRatioMonitor

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
FEW = settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
MANY = settings(FEW, max_examples=500)


def watch(case: Case) -> DepthProfile:
    return DepthProfile(rows=case.rows)  # type: ignore[arg-type]


def check(case: Case) -> None:
    watcher = watch(case)
    watched, bare = run(case, [watcher, UpdateRatioMonitor()]), run(case, [])
    torch.testing.assert_close(watched, bare, rtol=0, atol=0)
    assert watcher.profiles, "nothing was watched"
    if case.block != "batch norm":  # its running statistics change without any step
        still = watch(case)
        run(case, [still], lr=0.0)
        assert {change for profile in still.profiles for change in profile.change} == {0.0}
    wanted, realised = Judge(), Judge()
    try:
        run(case, [wanted, EqualStep(), realised])
    except ValueError as error:
        if case.block != "weight norm":
            raise
        event(f"refused: {str(error)[:80]}")
        return
    ratios, target = realised.ratios(), wanted.ratios().mean(axis=1, keepdims=True)
    assert len(ratios)
    resolved = target[:, 0] > 1e-4  # below that, fp32 weights cannot represent a ratio well enough
    assert np.abs(ratios / target - 1)[resolved].max(initial=0) < 1e-3


@FEW
@given(CASES)
def test_a_few(case: Case) -> None:
    check(case)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@MANY
@given(CASES)
def test_many(case: Case) -> None:
    check(case)
