"""Makes the runs that a study lacks, several at once. Nothing is held that the disk does not say."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from depthcb_recipes.studies.grid import RunConfig
from depthcb_recipes.studies.process import MAKER, RunProcess, choose_precision, last_lines
from depthcb_recipes.studies.store import Store, write_result
from depthcb_recipes.studies.worker import BUSY, FULL

#: A run whose process was killed this often is recorded as killed.
MOST_KILLS = 3
#: Seconds between looks at the subprocesses.
_LOOK = 0.05


class Handle(Protocol):
    """A run that an engine has started."""

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""

    def kill(self) -> None:
        """Ends it at once."""


class Engine(Protocol):
    """Where runs are made."""

    @property
    def place(self) -> str:
        """What it is and has, in words."""

    def precision(self, config: RunConfig) -> dict[str, str]:
        """The precision that suits the device of a run like this one, with its reason."""

    def fits(self, config: RunConfig) -> bool:
        """Whether this run could be made here, if nothing else were."""

    def has_room(self, config: RunConfig) -> bool:
        """Whether this run can be started now."""

    def start(self, config: RunConfig, folder: Path, wait: bool) -> Handle:
        """Starts a run; told to wait, it waits for another process that makes it already."""


class Pool:
    """The embedded engine: subprocesses of this one.

    Args:
        jobs: Most runs at once.
        gpus: The devices that they share, as ``CUDA_VISIBLE_DEVICES`` names them; no two runs get the same.
        maker: The module that does a run.
    """

    def __init__(self, jobs: int, gpus: Sequence[str] = (), maker: str = MAKER) -> None:
        self._jobs, self._gpus, self._maker = jobs, list(gpus), maker
        self._running: list[tuple[RunProcess, list[str]]] = []

    @property
    def place(self) -> str:
        return f"this machine, which shows {len(self._gpus)} GPUs"

    def precision(self, config: RunConfig) -> dict[str, str]:
        return choose_precision(config.device, config.threads)

    def fits(self, config: RunConfig) -> bool:
        return config.gpus <= len(self._gpus)

    def has_room(self, config: RunConfig) -> bool:
        self._running = [(process, gpus) for process, gpus in self._running if process.poll() is None]
        return len(self._running) < self._jobs and len(self._free) >= config.gpus

    def start(self, config: RunConfig, folder: Path, wait: bool) -> RunProcess:
        gpus = self._free[: config.gpus]
        process = RunProcess(folder, config, gpus, wait, self._maker)
        self._running.append((process, gpus))
        return process

    @property
    def _free(self) -> list[str]:
        taken = {gpu for _, gpus in self._running for gpu in gpus}
        return [gpu for gpu in self._gpus if gpu not in taken]


@dataclass
class Progress:
    """The state of a study.

    Args:
        total: Its runs.
        done: Those with figures.
        failed: Those that ended without: out of memory, NaN, an error.
        running: Those that are made now by this driver.
        last: The last run's name and slope, or its failure.
        started: When, in seconds of `time.monotonic`.
        made: Runs that were made here since.
    """

    total: int
    done: int = 0
    failed: int = 0
    running: int = 0
    last: str = ""
    started: float = field(default_factory=time.monotonic)
    made: int = 0

    @property
    def seconds_left(self) -> float | None:
        """By the pace so far; None before the first run is made."""
        left = self.total - self.done - self.failed
        return (time.monotonic() - self.started) / self.made * left if self.made else None


def run_study(
    configs: Sequence[RunConfig],
    store: Store,
    engine: Engine,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Makes the runs that have no result yet.

    Args:
        configs: The runs of the study.
        store: Where they are.
        engine: What makes them.
        report: Called at every look at the runs, some 20 times a second.

    Returns:
        The study's state at the end.

    Raises:
        OSError: The disk is full; what is done is kept, what ran is ended.
    """
    return _Driver(configs, store, engine, report).drive()


class _Driver:
    """One process that makes a study's runs, beside any others that do."""

    def __init__(
        self, configs: Sequence[RunConfig], store: Store, engine: Engine, report: Callable[[Progress], None]
    ) -> None:
        self._store, self._engine, self._report = store, engine, report
        self._progress = Progress(len(configs))
        self._waiting: list[RunConfig] = []
        self._running: dict[Handle, RunConfig] = {}
        self._kills: dict[str, int] = {}
        self._busy: set[str] = set()  # hashes of runs that another process was found at
        for config in configs:
            result = store.result(config)
            if result is None:
                self._waiting.append(config)
            else:
                self._count(result)

    def drive(self) -> Progress:
        try:
            while self._waiting or self._running:
                changed = self._start() | self._collect()
                self._progress.running = len(self._running)
                self._report(self._progress)
                if not changed:
                    time.sleep(_LOOK)
        finally:
            for handle in self._running:
                handle.kill()
        return self._progress

    def _start(self) -> bool:
        """Starts runs while there is room."""
        before = len(self._running)
        while self._waiting:
            config = self._waiting[0]
            # What another process was found at comes last, when there is nothing better to do than to wait for it.
            wait = config.hash in self._busy
            result = self._store.result(config) if wait else None
            if result is not None:
                self._count(result)
                self._waiting.pop(0)
                continue
            if not self._engine.has_room(config):
                break
            self._running[self._engine.start(config, self._store.prepare(config), wait)] = self._waiting.pop(0)
        return len(self._running) > before

    def _collect(self) -> bool:
        """Takes what has ended."""
        ended = [(handle, status) for handle in self._running if (status := handle.poll()) is not None]
        for handle, status in ended:
            self._take(self._running.pop(handle), status)
        return bool(ended)

    def _take(self, config: RunConfig, status: int) -> None:
        """What became of a run: a result, or another attempt."""
        result = self._store.result(config)
        if result is None:
            if status == FULL:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._store.root))
            if status in (0, BUSY):  # elsewhere; or a shared file system that shows it later
                self._busy.add(config.hash)
                self._waiting.append(config)
                return
            self._kills[config.hash] = self._kills.get(config.hash, 0) + 1
            if self._kills[config.hash] < MOST_KILLS:
                self._waiting.insert(0, config)
                return
            result = self._give_up(config, status)
        self._count(result)
        self._progress.made += 1
        self._progress.last = f"{config.name}: {told(result)}"

    def _give_up(self, config: RunConfig, status: int) -> dict[str, Any]:
        """Records that a run does not come to an end."""
        folder = self._store.folder(config)
        how = f"by signal {-status}" if status < 0 else f"with status {status}"
        also = " (as the system does where memory runs out)" if status == -9 else ""
        message = f"ended {how}{also} {MOST_KILLS} times; last lines: {last_lines(folder)}"
        result = {"status": "killed", "message": message}
        write_result(folder, result)
        return result

    def _count(self, result: dict[str, Any]) -> None:
        self._progress.done += result["status"] == "finished"
        self._progress.failed += result["status"] != "finished"


def told(result: dict[str, Any]) -> str:
    """A result in a few words."""
    if result["status"] != "finished":
        return f"{result['status']}: {result['message']}"
    return f"slope {result['slope']:+.3g}"
