"""Suppresses banners and hints of other libraries in the output of depthcb's commands."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

from transformers.utils import logging as transformers_logging


@contextlib.contextmanager
def silent_libraries() -> Iterator[None]:
    """Suppresses Lightning's banners and hints, and warnings about what a report shows anyway."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        about_loops = (".*num_workers.*", ".*LeafSpec.*", ".*in eval mode.*", ".*Skipping val loop.*")
        about_files = (".*logs directory .* exists.*",)  # W&B writes there before the CSV logger
        for about in (*about_loops, *about_files, ".*fewer than 5 directions.*"):
            warnings.filterwarnings("ignore", about)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextlib.contextmanager
def silent_transformers() -> Iterator[None]:
    """Suppresses progress bars and hints of transformers."""
    # transformers only has global switches; both are restored.
    switches: Any = transformers_logging
    bars, level = switches.is_progress_bar_enabled(), switches.get_verbosity()
    switches.disable_progress_bar()
    switches.set_verbosity_error()
    try:
        yield
    finally:
        switches.set_verbosity(level)
        if bars:
            switches.enable_progress_bar()
