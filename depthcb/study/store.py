"""The folders of a study's runs: the only state there is.

``<study>/runs/<hash>/`` holds ``config.yaml``, the run's record and log while it runs, and ``result.json`` from its
end on: written last, beside its place, and moved there, so that a reader finds all of it or none. A run is locked by
the process that makes it, for as long as that process lives.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from depthcb.study.grid import RunConfig

RESULT, CONFIG, LOCK, LOG = "result.json", "config.yaml", "lock", "log.txt"


class Busy(Exception):
    """Another process makes this run."""


@dataclass(frozen=True)
class Store:
    """A study's folder.

    Args:
        root: The folder; made when the first run starts.
    """

    root: Path

    def folder(self, config: RunConfig) -> Path:
        """The folder of a run, whether it exists or not."""
        return self.root / "runs" / config.hash

    def prepare(self, config: RunConfig) -> Path:
        """The folder of a run, with its configuration in it."""
        folder = self.folder(config)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / CONFIG, yaml.safe_dump(config.to_dict(), sort_keys=False))
        return folder

    def forget_failures(self, configs: Sequence[RunConfig]) -> None:
        """Removes the results of runs that ended without figures, so that they are made again."""
        for config in configs:
            result = self.result(config)
            if result is not None and result["status"] != "finished":
                (self.folder(config) / RESULT).unlink()

    def result(self, config: RunConfig) -> dict[str, Any] | None:
        """What is known of a run: None while it has no result, or where it is damaged (then it is run again)."""
        return read_result(self.folder(config))


def read_result(folder: Path) -> dict[str, Any] | None:
    """A run's result; None where there is none, or not the whole of it.

    Raises:
        ValueError: It is there and cannot be read.
    """
    try:
        text = (folder / RESULT).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(
            f"{folder / RESULT} cannot be read ({error.strerror}): give this user the right to."
        ) from error
    with contextlib.suppress(ValueError, KeyError, TypeError):
        result: dict[str, Any] = json.loads(text)
        if result["sha256"] == _digest(result):
            return result
    return None


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Writes a run's result with a checksum of itself, whole or not at all."""
    plain = json.loads(json.dumps(result))
    write_whole(folder / RESULT, json.dumps(plain | {"sha256": _digest(plain)}, indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that a reader, or a power cut, finds the old or the new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a run's lock; the system gives it back when the process ends, however it ends.

    Raises:
        Busy: Another process holds it.
    """
    try:
        lock = FileLock(folder / LOCK).acquire(blocking=False)
    except Timeout:
        raise Busy(str(folder)) from None
    with lock:
        yield


def start_afresh(folder: Path) -> None:
    """Removes what an earlier attempt left; half a run is no run."""
    for path in folder.iterdir():
        if path.name not in (CONFIG, LOCK, LOG):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _digest(result: dict[str, Any]) -> str:
    rest = {key: value for key, value in result.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
