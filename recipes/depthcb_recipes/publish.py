"""Atomic writes of files and folders; neither concurrent readers nor power failures leave partial ones."""

from __future__ import annotations

import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def temporary(path: Path) -> Path:
    """Returns a path next to ``path`` that no other process has, in containers that share a process number either."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:12]}")


@contextmanager
def published(
    path: Path, whole: Callable[[Path], bool] = lambda path: False, check: Callable[[], None] = lambda: None
) -> Iterator[Path]:
    """Yields a temporary path next to ``path``, which is renamed to ``path`` if the block succeeds.

    Args:
        path: The file or folder to write; its parent folder is created if missing.
        whole: Returns whether an existing folder is complete. If so, another process was faster and its folder is kept.
        check: Called right before the renaming; an error prevents it.

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
    fresh = temporary(path)
    try:
        yield fresh
        if fresh.is_file():
            _sync(fresh)
        elif not whole(path):
            shutil.rmtree(path, ignore_errors=True)
        check()
        try:
            os.replace(fresh, path)
        except OSError:
            if not whole(path):
                raise
    finally:
        _remove(fresh)


def write_whole(path: Path, text: str, check: Callable[[], None] = lambda: None) -> None:
    """Writes a text file atomically; see `published` for ``check``."""
    with published(path, check=check) as fresh:
        fresh.write_text(text, encoding="utf-8")


def remove_left_over(path: Path) -> None:
    """Removes temporary files of killed processes for ``path``, except locks. No process may be publishing ``path``."""
    for leftover in (path.with_name(f".{path.name}"), *path.parent.glob(f".{path.name}.*")):
        if leftover.suffix != ".lock":
            _remove(leftover)


def _sync(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
