"""Keeps the libraries' banners and advice out of what our own commands print."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator


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
