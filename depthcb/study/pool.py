"""Runs what a study lacks: one subprocess a run, several at once. The pool holds nothing that the disk does not say."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from depthcb.study.grid import RunConfig
from depthcb.study.store import LOG, Store, write_result

#: What makes one run, given its folder: a module that is run with ``python -m``.
MAKER = "recipes.study_run"
#: Exit status of a run that another process makes already.
BUSY = 75
#: A run whose process was killed this often is recorded as killed.
MOST_KILLS = 3
_PR_SET_PDEATHSIG = 1
#: Seconds between looks at the subprocesses.
_LOOK = 0.05


@dataclass
class Progress:
    """How a study stands.

    Args:
        total: Its runs.
        done: Those with figures.
        failed: Those that ended without: out of memory, NaN, an error.
        running: Those that are made now, here or elsewhere.
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


def run_pool(
    configs: Sequence[RunConfig],
    store: Store,
    jobs: int,
    report: Callable[[Progress], None] = lambda progress: None,
    maker: str = MAKER,
) -> Progress:
    """Makes the runs that have no result yet.

    Args:
        configs: The runs of the study.
        store: Where they are.
        jobs: How many at once.
        report: Called whenever something changes.
        maker: The module that makes a run.

    Returns:
        How the study stands at the end.
    """
    waiting, progress = [], Progress(len(configs))
    for config in configs:
        result = store.result(config)
        if result is None:
            waiting.append(config)
        else:
            _count(progress, result)
    running: dict[RunHandle, RunConfig] = {}
    kills: dict[str, int] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                config = waiting.pop(0)
                running[RunHandle(store.prepare(config), config, maker)] = config
            progress.running = len(running)
            report(progress)
            ended = [handle for handle in running if handle.poll() is not None]
            for handle in ended:
                config = running.pop(handle)
                _take(handle, config, store, progress, waiting, kills)
            if not ended:
                time.sleep(_LOOK)
    finally:
        for handle in running:
            handle.kill()
    progress.running = 0
    report(progress)
    return progress


def _take(
    handle: RunHandle,
    config: RunConfig,
    store: Store,
    progress: Progress,
    waiting: list[RunConfig],
    kills: dict[str, int],
) -> None:
    """What became of a run: a result, or another attempt."""
    result = store.result(config)
    if result is None and handle.poll() == BUSY:
        time.sleep(_LOOK)  # made by another driver: looked at again when its turn comes
        waiting.append(config)
        return
    if result is None:
        kills[config.hash] = kills.get(config.hash, 0) + 1
        if kills[config.hash] < MOST_KILLS:
            waiting.insert(0, config)
            return
        result = handle.give_up(kills[config.hash])
    _count(progress, result)
    progress.made += 1
    progress.last = f"{config.name}: {told(result)}"


def _count(progress: Progress, result: dict[str, Any]) -> None:
    progress.done += result["status"] == "finished"
    progress.failed += result["status"] != "finished"


def told(result: dict[str, Any]) -> str:
    """A result in a few words."""
    if result["status"] != "finished":
        return f"{result['status']}: {result['message']}"
    return f"slope {result['slope']:+.3g}"


class RunHandle:
    """A subprocess that makes one run, its output in the run's log.

    Args:
        folder: The run's folder, with its configuration.
        config: The run.
        maker: The module that makes it.
    """

    def __init__(self, folder: Path, config: RunConfig, maker: str = MAKER) -> None:
        self.folder = folder
        self._log: IO[bytes] = open(folder / LOG, "ab")  # noqa: SIM115  # closed when the run has ended
        self._process = subprocess.Popen(
            [sys.executable, "-m", maker, str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env=environment(config.threads, os.getpid()),
            start_new_session=True,  # so that its own children can be ended with it
        )

    def poll(self) -> int | None:
        """The exit status, or None while it runs."""
        status = self._process.poll()
        if status is not None:
            self._log.close()
        return status

    def kill(self) -> None:
        """Ends the run at once."""
        self._process.kill()
        self._process.wait()
        self._log.close()

    def give_up(self, kills: int) -> dict[str, Any]:
        """Records that the run does not come to an end."""
        status = self._process.returncode
        how = f"by signal {-status}" if status < 0 else f"with status {status}"
        message = f"ended {how} {kills} times; last lines: {last_lines(self.folder)}"
        result = {"status": "killed", "message": message}
        write_result(self.folder, result)
        return result


def environment(threads: int, driver: int) -> dict[str, str]:
    """A run's environment: its threads, whom it dies with, and nothing of a batch job that would confuse Lightning."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "PL_", "WANDB_"))}
    count = str(threads)
    return kept | {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "DEPTHCB_DRIVER": str(driver)}


def last_lines(folder: Path, count: int = 5) -> str:
    """The end of a run's log."""
    lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
    return " | ".join(line.strip() for line in lines[-count:] if line.strip())


def die_with_the_driver() -> None:
    """Has the system end this process when the driver that started it ends, however it ends (Linux)."""
    driver = os.environ.get("DEPTHCB_DRIVER")
    if driver and sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(driver):  # it ended before we asked
            os._exit(1)
