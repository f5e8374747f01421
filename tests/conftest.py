"""One thread per test process: small tensors gain nothing from two, which wait for each other on a busy machine."""

from __future__ import annotations

import os

# Default for subprocesses of tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

torch.set_num_threads(1)
