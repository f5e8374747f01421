"""One thread per test process: small tensors gain nothing from two, which wait for each other on a busy machine."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Defaults for subprocesses of tests. Benchmarks run as users do, with several threads, which waiting passively slows down.
if "DEPTHCB_FIGURES" not in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_processes_left() -> Iterator[None]:
    """Fails where a test makes this process, and all that later tests start, one of several."""
    before = {name: os.environ.get(name) for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    yield
    assert not torch.distributed.is_initialized(), "a process group is left"
    assert before == {name: os.environ.get(name) for name in before}


def _hooks() -> set[int]:
    return {*_global_optimizer_pre_hooks, *_global_optimizer_post_hooks}


@pytest.fixture(autouse=True)
def _no_hooks_left() -> Iterator[None]:
    """Fails where hooks on all optimizers are left behind, not in a later test."""
    before = _hooks()
    yield
    left = _hooks() - before
    for hooks in (_global_optimizer_pre_hooks, _global_optimizer_post_hooks):
        for key in left & hooks.keys():
            del hooks[key]
    assert not left, f"{len(left)} hooks on all optimizers are left"
