"""Runs on the nodes of a Ray cluster; each task starts the same subprocess as `Pool` does."""

from __future__ import annotations

import logging
import os
import platform
import socket
import threading
from pathlib import Path
from typing import Any

from depthcb_recipes.studies.grid import RunConfig
from depthcb_recipes.studies.process import RUNNER, RunProcess, choose_precision
from depthcb_recipes.studies.result import CONFIG

try:
    import ray
except ImportError as error:
    raise ValueError("--engine ray needs Ray: run `pip install 'depthcb[ray]'`.") from error


#: Seconds to wait for a cluster at a given address.
PATIENCE = 25.0


class RayEngine:
    """Runs a study on the nodes of a cluster, all of which must see the study's folder.

    Ray schedules the runs by their threads and GPUs and has no other state: when a node or this process dies, only the
    runs that it executed are lost.

    Args:
        jobs: Maximum number of simultaneous runs; None for as many as the nodes have room for at the moment. With a
            number the cluster may scale up to fit it.
        runner: The module that executes a run.

    Raises:
        ValueError: Ray is not installed, or no cluster answers at ``RAY_ADDRESS``.
    """

    def __init__(self, jobs: int | None = None, runner: str = RUNNER) -> None:
        self._jobs, self._runner = jobs, runner
        self._running: list[RayRun] = []
        _connect(os.environ.get("RAY_ADDRESS", ""))

    @property
    def place(self) -> str:
        return f"any node of the Ray cluster, which are {_nodes()}"

    def precision(self, config: RunConfig) -> dict[str, str]:
        choose = ray.remote(num_cpus=config.threads, num_gpus=config.gpus)(choose_precision)
        found: dict[str, str] = ray.get(choose.remote(config.device, config.threads))
        return found

    def fits(self, config: RunConfig) -> bool:
        return self._jobs is not None or self._slots(config) > 0

    def has_room(self, config: RunConfig) -> bool:
        self._running = [run for run in self._running if run.poll() is None]
        return len(self._running) < (self._jobs or self._slots(config))

    def start(self, config: RunConfig, folder: Path, wait: bool) -> RayRun:
        self._running.append(RayRun(folder, config, wait, self._runner))
        return self._running[-1]

    def _slots(self, config: RunConfig) -> int:
        """Returns how many such runs fit on the idle nodes."""
        needs = {"CPU": config.threads, "GPU": config.gpus}
        return sum(min(node[kind] // n for kind, n in needs.items() if n) for node in _nodes())


def _nodes() -> list[dict[str, int]]:
    """Returns the CPUs and GPUs of each live node."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [{kind: int(node.get(kind, 0)) for kind in ("CPU", "GPU")} for node in alive]


def _connect(address: str) -> None:
    """Connects to the cluster at an address, else to one that runs on this machine, else to a new local one.

    Raises:
        ValueError: No cluster answers at the address within 25 s; Ray itself would try for minutes.
    """
    options: dict[str, Any] = {"log_to_driver": False, "include_dashboard": False, "logging_level": logging.ERROR}
    if not address:
        ray.init(**options)
        return
    problem: list[str] = []

    def connect() -> None:
        host, _, port = address.rpartition(":")
        try:
            if port.isdigit() and "/" not in host:  # refused at once; Ray would try again
                socket.create_connection((host, int(port)), timeout=PATIENCE).close()
            ray.init(**options)
        except BaseException as error:  # Ray raises many kinds, and exits in some cases
            problem.append(str(error).strip().partition("\n")[0] or type(error).__name__)

    attempt = threading.Thread(target=connect, daemon=True)
    attempt.start()
    attempt.join(PATIENCE)
    if attempt.is_alive():
        problem.append(f"no answer in {PATIENCE:g} s")
    if problem:
        raise ValueError(
            f"No Ray cluster answers at RAY_ADDRESS={address} ({problem[0]}): start one there with "
            "`ray start --head`, or unset RAY_ADDRESS to use this machine."
        )


class RayRun:
    """A run that a task executes on some node."""

    def __init__(self, folder: Path, config: RunConfig, wait: bool, runner: str) -> None:
        # A task that dies with its node is repeated by the study, not by Ray.
        task = ray.remote(num_cpus=config.threads, num_gpus=config.gpus, max_retries=0)(execute)
        self._task = task.remote(str(folder.resolve()), config, wait, runner)
        self._status: int | None = None

    def poll(self) -> int | None:
        """Returns the exit status; 1 if the node or the task's process died.

        Raises:
            ValueError: The node does not see the study's folder.
        """
        if self._status is None and ray.wait([self._task], timeout=0)[0]:
            try:
                self._status = ray.get(self._task)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except ray.exceptions.RayError:
                self._status = 1
        return self._status

    def kill(self) -> None:
        """Kills the task, and the run with it."""
        ray.cancel(self._task, force=True)


def execute(folder: str, config: RunConfig, wait: bool, runner: str) -> int:
    """Executes a run on the node of a task; returns its exit status."""
    path = Path(folder)
    if not (path / CONFIG).is_file():
        raise ValueError(
            f"The node {platform.node()} does not see {folder}: choose a folder (--out) on a file system that "
            "all nodes of the cluster share."
        )
    gpus: list[Any] = ray.get_gpu_ids()
    return RunProcess(path, config, list(map(str, gpus)), wait, runner).wait()
