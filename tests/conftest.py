"""One thread a test process: tiny tensors gain nothing from two, and two wait for each other on a busy machine."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
