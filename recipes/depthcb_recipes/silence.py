"""Keeps the libraries' banners and advice out of what our own commands print."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

from transformers.utils import logging as transformers_logging


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keeps banners, advice and what a report says anyway out of the output."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        about_loops = (".*num_workers.*", ".*LeafSpec.*", ".*in eval mode.*", ".*Skipping val loop.*")
        about_files = (".*logs directory .* exists.*",)  # W&B's files are there before the CSV's
        for about in (*about_loops, *about_files, ".*fewer than 5 directions.*"):
            warnings.filterwarnings("ignore", about)
        try:
            yield
        finally:
            logger.setLevel(level)


@contextlib.contextmanager
def silent_transformers() -> Iterator[None]:
    """Keeps transformers' bars and advice away."""
    # transformers has only process-wide switches; both are put back as they were.
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
