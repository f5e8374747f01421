"""Tables cached on disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from depthcb_recipes.publish import published

if TYPE_CHECKING:
    import pyarrow as pa


def cache_folder() -> Path:
    """Returns depthcb's cache folder: ``$XDG_CACHE_HOME/depthcb``, or ``~/.cache/depthcb``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "depthcb"


class CacheError(ValueError):
    """The cache folder cannot be written."""


@contextmanager
def writing_cache() -> Iterator[None]:
    """Turns an error of writing to the cache folder into one sentence.

    Raises:
        CacheError: The block raised an OSError.
    """
    try:
        yield
    except OSError as error:
        raise CacheError(
            f"The cache folder {cache_folder()} cannot be written ({error.strerror or error}): set XDG_CACHE_HOME to a "
            "folder that can."
        ) from error


def cached(path: Path, make: Callable[[], pa.Table]) -> pa.Table:
    """Reads a cached table; if the file is missing or damaged, computes the table and writes it.

    Args:
        path: A parquet file whose name depends on everything that determines its contents.
        make: Computes the table.

    Raises:
        CacheError: The table cannot be written.
    """
    import pyarrow as pa  # slow, and a study's driver only needs CacheError
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path, page_checksum_verification=True)
    except (OSError, pa.ArrowException):
        with writing_cache():  # before the work
            path.parent.mkdir(parents=True, exist_ok=True)
        table = make()
    with writing_cache(), published(path) as fresh:
        pq.write_table(table, fresh, write_page_checksum=True)
    return table


def digest(texts: Iterable[str]) -> str:
    """Returns the SHA-256 of texts, in order."""
    sha = hashlib.sha256()
    for text in texts:
        sha.update(text.encode() + b"\0")  # the null byte distinguishes ["ab", "c"] from ["a", "bc"]
    return sha.hexdigest()
