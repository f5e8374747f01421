"""Warnings that one process says for all."""

from __future__ import annotations

import os
import warnings

import torch.distributed as dist


def warn(message: str) -> None:
    """Warns on the first process alone.

    Args:
        message: What is said, as a ``UserWarning``.
    """
    started = dist.is_available() and dist.is_initialized()
    if not (dist.get_rank() if started else int(os.environ.get("LOCAL_RANK", 0))):
        warnings.warn(message, stacklevel=3)
