"""The folders of a study's runs, which are its only state.

``<study>/runs/<hash>/`` holds ``run.yaml``, the run's record and log, and, once the run has ended, ``result.json``,
which is written last and atomically. A process locks the run that it executes with a lease, which works between
machines that share the folder. A lease expires when its process is dead or, seen from another machine, has not been
renewed for a minute.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import SoftFileLease, Timeout

from depthcb.errors import chain
from depthcb_recipes.cache import CacheError
from depthcb_recipes.publish import temporary, write_whole
from depthcb_recipes.studies.grid import AXES, PRECISION, VERSION, RunConfig
from depthcb_recipes.studies.result import CONFIG, RESULT, Result, read_result

LOCK, LOG = "lock", "log.txt"
#: Seconds without renewal after which another machine may take over a run.
LEASE = 60.0


class Busy(Exception):
    """Another process has this run."""


@dataclass(frozen=True)
class Store:
    """A study's folder.

    Args:
        root: The folder; created when the first run starts.
    """

    root: Path

    def folder(self, config: RunConfig) -> Path:
        """Returns the folder of a run, which need not exist."""
        return self.root / "runs" / config.hash

    def prepare(self, config: RunConfig) -> Path:
        """Creates a run's folder and writes its configuration there, with the study's precision."""
        folder, fields = self.folder(config), config.to_dict()
        folder.mkdir(parents=True, exist_ok=True)
        if config.precision == "auto" and (settled := self.precision(config.device)):
            fields["options"][PRECISION] = settled["precision"]
        write_whole(folder / CONFIG, yaml.safe_dump(fields, sort_keys=False))
        return folder

    def precision(self, device: str) -> dict[str, str] | None:
        """Returns the study's precision on a kind of device, with the reason; None before it is chosen."""
        try:
            found: dict[str, str] = json.loads(self._precision(device).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise ValueError(f"{self._precision(device)} cannot be read ({error}): remove it.") from error
        return found

    def settle_precision(self, device: str, choice: dict[str, str]) -> dict[str, str]:
        """Stores the precision for all runs on a kind of device, unless there is one; returns the stored one."""
        self.root.mkdir(parents=True, exist_ok=True)
        path = self._precision(device)
        fresh = temporary(path)
        write_whole(fresh, json.dumps(choice, indent=1) + "\n")
        with contextlib.suppress(FileExistsError):
            os.link(fresh, path)
        fresh.unlink()
        settled = self.precision(device)
        assert settled is not None
        return settled

    def _precision(self, device: str) -> Path:
        return self.root / f"precision-{device}.json"

    def forget_failures(self, configs: Sequence[RunConfig]) -> None:
        """Removes the results of failed runs, so that they are run again."""
        for config in configs:
            result = self.result(config)
            if result is not None and not result.finished:
                (self.folder(config) / RESULT).unlink()

    def result(self, config: RunConfig) -> Result | None:
        """A run's result: None while it has none, or where the file is damaged (then it is run again)."""
        return read_result(self.folder(config))

    def older(self, configs: Sequence[RunConfig]) -> list[Result]:
        """Finished runs of an earlier version, under hashes that no configuration has today, and not yet rerun.

        Args:
            configs: The runs of the study; results of other values of its axes are none of its own.
        """
        current = {config.hash for config in configs}
        folders = sorted(path.parent for path in self.root.glob(f"runs/*/{RESULT}") if path.parent.name not in current)
        results = [result for folder in folders if (result := read_result(folder)) is not None]
        older = [result for result in results if result.finished and result.version < VERSION]
        points = {_point(result.config) for result in older}  # mostly none: then no current result is read again
        missing = {_point(c) for c in configs if _point(c) in points and self.result(c) is None}
        return [result for result in older if _point(result.config) in missing]


@contextlib.contextmanager
def locked(folder: Path, patience: float = 0, lease: float = LEASE) -> Iterator[Callable[[], None]]:
    """Holds a run's lock, and yields a function that raises `Busy` if another process has it by now.

    A process whose lease was taken over, because it was suspended for too long or seemed dead from another container,
    exits as soon as it finds out; before it writes a result it must ask.

    Args:
        folder: The run's folder.
        patience: Seconds to wait for another process that holds the lock.
        lease: Seconds without renewal after which the lock expires; must be the same for all processes.

    Raises:
        Busy: Another process holds it.
    """
    lock = SoftFileLease(folder / LOCK, lease_duration=lease, on_compromise=lambda _: os._exit(1))
    try:
        held = lock.acquire(timeout=patience)
    except Timeout:
        raise Busy(str(folder)) from None

    def check() -> None:
        owner = lock.owner
        if owner is None or owner.token != lock.token:
            raise Busy(f"{folder} was taken over by another process")

    with held:
        yield check


def _point(config: RunConfig) -> tuple[Any, ...]:
    """Returns the run's coordinates in the study's grid."""
    return tuple(getattr(config, axis) for axis in AXES)


def seems_running(folder: Path) -> bool:
    """Returns whether a local process holds the lock, or another machine renewed it less than a minute ago."""
    owner = SoftFileLease(folder / LOCK, lease_duration=LEASE).owner
    with contextlib.suppress(OSError):
        if owner is not None and owner.hostname != socket.gethostname():
            return abs(time.time() - (folder / LOCK).stat().st_mtime) < LEASE  # a clock may have jumped back
        if owner is not None:
            os.kill(owner.pid, 0)  # sends no signal, only checks that the process exists
            return True
    return False


def full_disk(error: BaseException) -> bool:
    """Returns whether an error, or one that led to it, is a full disk or an exceeded quota."""
    return any(isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT) for e in chain(error))


def cache_error(error: BaseException) -> CacheError | None:
    """Returns the error of writing to the cache, if an error is one or was caused by one."""
    return next((e for e in chain(error) if isinstance(e, CacheError)), None)


def start_afresh(folder: Path) -> None:
    """Removes the files of an earlier attempt."""
    for path in folder.iterdir():
        # Another driver, which has no lock, may be rewriting the configuration, or recording the run as killed.
        if path.name not in (CONFIG, LOG) and not path.name.startswith((LOCK, f".{CONFIG}.", f".{RESULT}.")):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
