"""One thread a test process: tiny tensors gain nothing from two, and two wait for each other on a busy machine."""

from __future__ import annotations

import os

# For the processes that tests start, unless a test says otherwise.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

torch.set_num_threads(1)
