"""Publishes files and folders whole or not at all, so that no reader and no power cut ever finds half of one."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def published(path: Path, whole: Callable[[Path], bool] = lambda path: False) -> Iterator[Path]:
    """A place beside ``path`` to write to, which becomes ``path`` when the block ends without an error.

    Args:
        path: The file or folder; its own folder is made if missing.
        whole: Whether a folder that is there already is whole: then another process was faster, and its folder stays.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "notes.txt"
        >>> with published(path) as fresh:
        ...     _ = fresh.write_text("all of it")
        ...     path.exists()
        False
        >>> path.read_text()
        'all of it'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        yield fresh
        if fresh.is_file():
            _sync(fresh)
        elif not whole(path):
            shutil.rmtree(path, ignore_errors=True)
        try:
            os.replace(fresh, path)
        except OSError:
            if not whole(path):
                raise
    finally:
        _remove(fresh)


def write_whole(path: Path, text: str) -> None:
    """Writes a text file so that a reader finds the old or the new one."""
    with published(path) as fresh:
        fresh.write_text(text, encoding="utf-8")


def remove_left_over(path: Path) -> None:
    """Removes what killed processes left beside ``path``, but no lock; nobody may be publishing it at this moment."""
    for left in (path.with_name(f".{path.name}"), *path.parent.glob(f".{path.name}.*")):
        if left.suffix != ".lock":
            _remove(left)


def _sync(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
