"""Tables that are made once and kept in the user's cache."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from depthcb_recipes.publish import published


def cache_folder() -> Path:
    """Where depthcb keeps what it can make again: ``$XDG_CACHE_HOME/depthcb``, else ``~/.cache/depthcb``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "depthcb"


def cached(path: Path, make: Callable[[], pa.Table]) -> pa.Table:
    """The table in a file; where there is none, or it is spoilt, it is made and kept.

    Args:
        path: A parquet file, whose name says all that decides what is in it.
        make: Makes the table.
    """
    try:
        return pq.read_table(path, page_checksum_verification=True)
    except (OSError, pa.ArrowException):
        table = make()
    with published(path) as fresh:
        pq.write_table(table, fresh, write_page_checksum=True)
    return table


def digest(texts: Iterable[str]) -> str:
    """The SHA-256 of texts in their order."""
    found = hashlib.sha256()
    for text in texts:
        found.update(text.encode() + b"\0")  # the zero byte keeps ["ab", "c"] and ["a", "bc"] apart
    return found.hexdigest()
