"""Warnings emitted by the first process only."""

from __future__ import annotations

import os
import warnings

import torch.distributed as dist


def warn(message: str) -> None:
    """Emits a ``UserWarning`` on the first process only.

    Args:
        message: The warning message.
    """
    started = dist.is_available() and dist.is_initialized()
    if not (dist.get_rank() if started else int(os.environ.get("LOCAL_RANK", 0))):
        warnings.warn(message, stacklevel=3)
