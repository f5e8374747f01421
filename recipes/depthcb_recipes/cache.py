"""Tables cached on disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from depthcb_recipes.publish import published


def cache_folder() -> Path:
    """Returns depthcb's cache folder: ``$XDG_CACHE_HOME/depthcb``, or ``~/.cache/depthcb``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "depthcb"


def cached(path: Path, make: Callable[[], pa.Table]) -> pa.Table:
    """Reads a cached table; if the file is missing or damaged, computes the table and writes it.

    Args:
        path: A parquet file whose name depends on everything that determines its contents.
        make: Computes the table.
    """
    try:
        return pq.read_table(path, page_checksum_verification=True)
    except (OSError, pa.ArrowException):
        table = make()
    with published(path) as fresh:
        pq.write_table(table, fresh, write_page_checksum=True)
    return table


def digest(texts: Iterable[str]) -> str:
    """Returns the SHA-256 of texts, in order."""
    sha = hashlib.sha256()
    for text in texts:
        sha.update(text.encode() + b"\0")  # the null byte distinguishes ["ab", "c"] from ["a", "bc"]
    return sha.hexdigest()
