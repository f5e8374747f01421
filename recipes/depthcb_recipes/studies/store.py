"""The folders of a study's runs: the only state there is.

``<study>/runs/<hash>/`` holds ``run.yaml``, the run's record and log while it runs, and ``result.json`` from its end
on: written last, beside its place, and moved there, so that a reader finds all of it or none. A run is locked by
the process that makes it: by a lease, which holds between machines that share the folder, and which is void once its
process is dead or, seen from another machine, has not renewed it for a minute.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import SoftFileLease, Timeout

from depthcb.errors import chain
from depthcb_recipes.publish import write_whole
from depthcb_recipes.studies.grid import PRECISION, RunConfig, digest

RESULT, CONFIG, LOCK, LOG = "result.json", "run.yaml", "lock", "log.txt"
#: Seconds without a sign of life after which another machine takes a run over.
LEASE = 60.0


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
        """The folder of a run, with its configuration in it, in the precision that this study has settled."""
        folder, fields = self.folder(config), config.to_dict()
        folder.mkdir(parents=True, exist_ok=True)
        if config.precision == "auto" and (kept := self.precision(config.device)):
            fields["options"][PRECISION] = kept["precision"]
        write_whole(folder / CONFIG, yaml.safe_dump(fields, sort_keys=False))
        return folder

    def precision(self, device: str) -> dict[str, str] | None:
        """The precision of this study's runs on a kind of device, with its reason; None before it is settled."""
        try:
            found: dict[str, str] = json.loads(self._precision(device).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise ValueError(f"{self._precision(device)} cannot be read ({error}): remove it.") from error
        return found

    def settle_precision(self, device: str, choice: dict[str, str]) -> dict[str, str]:
        """Keeps a precision for all runs on a kind of device, and returns what is kept: another's, if it came first."""
        self.root.mkdir(parents=True, exist_ok=True)
        path = self._precision(device)
        fresh = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.mine")
        write_whole(fresh, json.dumps(choice, indent=1) + "\n")
        with contextlib.suppress(FileExistsError):
            os.link(fresh, path)
        fresh.unlink()
        kept = self.precision(device)
        assert kept is not None
        return kept

    def _precision(self, device: str) -> Path:
        return self.root / f"precision-{device}.json"

    def forget_failures(self, configs: Sequence[RunConfig]) -> None:
        """Removes the results of runs that ended without figures, so that they are run again."""
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


@contextlib.contextmanager
def locked(folder: Path, patience: float = 0, lease: float = LEASE) -> Iterator[None]:
    """Holds a run's lock.

    A holder whose lease was taken over (it was halted for longer than that) ends at once: the run is another's now.

    Args:
        folder: The run's folder.
        patience: Seconds to wait for another holder.
        lease: Seconds without a sign of life after which the lock is free: the same for all.

    Raises:
        Busy: Another process holds it.
    """
    lock = SoftFileLease(folder / LOCK, lease_duration=lease, on_compromise=lambda _: os._exit(1))
    try:
        held = lock.acquire(timeout=patience)
    except Timeout:
        raise Busy(str(folder)) from None
    with held:
        yield


def seems_running(folder: Path) -> bool:
    """Whether a process of this machine holds a run's lock, or another machine did less than a minute ago."""
    owner = SoftFileLease(folder / LOCK, lease_duration=LEASE).owner
    with contextlib.suppress(OSError):
        if owner is not None and owner.hostname != socket.gethostname():
            return time.time() - (folder / LOCK).stat().st_mtime < LEASE
        if owner is not None:
            os.kill(owner.pid, 0)  # no signal: only whether it is there
            return True
    return False


def full_disk(error: BaseException) -> bool:
    """Whether an error, or what led to it, is a disk or a quota that is full."""
    return any(isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT) for e in chain(error))


def start_afresh(folder: Path) -> None:
    """Removes what an earlier attempt left; half a run is no run."""
    for path in folder.iterdir():
        # Another driver may be writing the configuration anew at this moment, which is the same for all.
        if path.name not in (CONFIG, LOG) and not path.name.startswith((LOCK, f".{CONFIG}.")):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _digest(result: dict[str, Any]) -> str:
    return digest({key: value for key, value in result.items() if key != "sha256"})
