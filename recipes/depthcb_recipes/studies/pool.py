"""Runs what a study lacks, several runs at once. All state is on disk."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from depthcb_recipes.cache import CacheError
from depthcb_recipes.studies.grid import RunConfig
from depthcb_recipes.studies.process import RUNNER, RunProcess, choose_precision, last_lines
from depthcb_recipes.studies.result import Result, write_result
from depthcb_recipes.studies.store import LOG, Busy, Store
from depthcb_recipes.studies.worker import BUSY, FULL, NO_CACHE

#: Number of times that a run's process may die before the run is recorded as killed.
MOST_KILLS = 3
#: Seconds between polls of the subprocesses.
_LOOK = 0.05


class Handle(Protocol):
    """A run that an engine started."""

    def poll(self) -> int | None:
        """Returns the exit status, negative for a signal; None while the run is going on."""

    def kill(self) -> None:
        """Kills the run."""


class Engine(Protocol):
    """Where the runs of a study run."""

    @property
    def place(self) -> str:
        """A phrase for messages, with what the engine has."""

    def precision(self, config: RunConfig) -> dict[str, str]:
        """Returns the precision that suits the device of such a run, with the reason."""

    def fits(self, config: RunConfig) -> bool:
        """Returns whether this run could run here if nothing else did."""

    def has_room(self, config: RunConfig) -> bool:
        """Returns whether this run can be started now."""

    def start(self, config: RunConfig, folder: Path, wait: bool) -> Handle:
        """Starts a run; with ``wait`` it first waits for another process that has the same run."""


class Pool:
    """The default engine: subprocesses on this machine.

    Args:
        jobs: Maximum number of simultaneous runs.
        gpus: Devices for the runs, named as in ``CUDA_VISIBLE_DEVICES``; no two runs share one.
        runner: The module that executes a run.
    """

    def __init__(self, jobs: int, gpus: Sequence[str] = (), runner: str = RUNNER) -> None:
        self._jobs, self._gpus, self._runner = jobs, list(gpus), runner
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
        process = RunProcess(folder, config, gpus, wait, self._runner)
        self._running.append((process, gpus))
        return process

    @property
    def _free(self) -> list[str]:
        taken = {gpu for _, gpus in self._running for gpu in gpus}
        return [gpu for gpu in self._gpus if gpu not in taken]


@dataclass
class Progress:
    """The progress of a study.

    Args:
        total: Number of runs.
        done: Runs with figures.
        failed: Runs that ended without figures: out of memory, NaN, an error.
        running: Runs that this driver has going.
        last: Name of the run that ended last, with its slope or failure.
        started: Start time, in seconds of `time.monotonic`.
        completed: Runs that this driver has completed since then.
        logs: The logs of the runs going on.
    """

    total: int
    done: int = 0
    failed: int = 0
    running: int = 0
    last: str = ""
    started: float = field(default_factory=time.monotonic)
    completed: int = 0
    logs: Sequence[Path] = ()

    @property
    def doing(self) -> str:
        """What a run has said last, such as how far it has pretrained its model; empty if none has said anything."""
        latest = max((log for log in self.logs if log.exists()), key=lambda log: log.stat().st_mtime, default=None)
        return "" if latest is None else last_lines(latest.parent, 1)

    @property
    def seconds_left(self) -> float | None:
        """Estimated from the pace so far; None before the first run has ended."""
        left = self.total - self.done - self.failed
        return (time.monotonic() - self.started) / self.completed * left if self.completed else None


def run_study(
    configs: Sequence[RunConfig],
    store: Store,
    engine: Engine,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Runs all runs that have no result yet.

    Args:
        configs: The runs of the study.
        store: The study's folder.
        engine: What runs them.
        report: Called about 20 times per second with the progress.

    Returns:
        The progress at the end.

    Raises:
        OSError: The disk is full. Finished runs are kept, unfinished ones are killed.
        CacheError: The cache cannot be written; likewise.
    """
    return _Driver(configs, store, engine, report).drive()


class _Driver:
    """One of the processes that run a study; there may be others on the same folder."""

    def __init__(
        self, configs: Sequence[RunConfig], store: Store, engine: Engine, report: Callable[[Progress], None]
    ) -> None:
        self._store, self._engine, self._report = store, engine, report
        self._progress = Progress(len(configs))
        self._waiting: list[RunConfig] = []
        self._running: dict[Handle, RunConfig] = {}
        self._kills: dict[str, int] = {}
        self._busy: set[str] = set()  # hashes of runs that another process was found to have
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
                self._progress.logs = [self._store.folder(config) / LOG for config in self._running.values()]
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
            # Runs that another process has come last, when nothing is left to do but wait.
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
        """Handles the runs that have ended."""
        ended = [(handle, status) for handle in self._running if (status := handle.poll()) is not None]
        for handle, status in ended:
            self._take(self._running.pop(handle), status)
        return bool(ended)

    def _take(self, config: RunConfig, status: int) -> None:
        """Counts an ended run, or schedules another attempt."""
        result = self._store.result(config)
        if result is None:
            if status == FULL:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._store.root))
            if status == NO_CACHE:
                raise CacheError(last_lines(self._store.folder(config), 1))
            if status == BUSY:  # another process has it
                self._busy.add(config.hash)
                self._waiting.append(config)
                return
            self._kills[config.hash] = self._kills.get(config.hash, 0) + 1
            if self._kills[config.hash] < MOST_KILLS:
                if status:
                    self._waiting.insert(0, config)
                else:  # a shared file system may show the result later, or the training ended without one
                    self._busy.add(config.hash)
                    self._waiting.append(config)
                return
            result = self._give_up(config, status)
        self._count(result)
        self._progress.completed += 1
        self._progress.last = f"{config.name}: {result.summary}"

    def _give_up(self, config: RunConfig, status: int) -> Result:
        """Records a run whose process was killed each time, unless another driver has its result by now."""
        folder = self._store.folder(config)
        how = f"by signal {-status}" if status < 0 else f"with status {status}" + " and no result" * (not status)
        also = " (as the system does where memory runs out)" if status == -9 else ""
        message = f"ended {how}{also} {MOST_KILLS} times; last lines: {last_lines(folder)}"
        result = Result("killed", config, message=message)

        def check() -> None:
            if self._store.result(config) is not None:
                raise Busy(str(folder))

        with contextlib.suppress(Busy):
            write_result(folder, result, check)
        return self._store.result(config) or result

    def _count(self, result: Result) -> None:
        self._progress.done += result.finished
        self._progress.failed += not result.finished
