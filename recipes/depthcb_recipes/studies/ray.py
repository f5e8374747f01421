"""Runs on the nodes of a Ray cluster: each task starts the same subprocess as the embedded pool."""

from __future__ import annotations

import logging
import os
import platform
import socket
from pathlib import Path
from typing import Any

from depthcb_recipes.studies.grid import RunConfig
from depthcb_recipes.studies.process import MAKER, RunProcess, choose_precision
from depthcb_recipes.studies.store import CONFIG

try:
    import ray
except ImportError as error:
    raise ValueError("--engine ray needs Ray: run `pip install 'depthcb[ray]'`.") from error


class RayEngine:
    """The nodes of a cluster as an engine; all of them must see the study's folder.

    Ray places the runs by their threads and GPUs, and holds nothing else: a node that dies, or this process, costs
    the runs that it made, no other.

    Args:
        jobs: Most runs to ask for at once; None for as many as the nodes have room for, now and as nodes come and go.
            With a number the cluster may grow to fit it.
        maker: The module that does a run.

    Raises:
        ValueError: Ray is not installed, or a cluster that is named by ``RAY_ADDRESS`` is not there.
    """

    def __init__(self, jobs: int | None = None, maker: str = MAKER) -> None:
        self._jobs, self._maker = jobs, maker
        self._running: list[RayRun] = []
        _check_address(os.environ.get("RAY_ADDRESS", ""))
        # The cluster of RAY_ADDRESS, else one that runs on this machine, else this machine.
        ray.init(log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)

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
        self._running.append(RayRun(folder, config, wait, self._maker))
        return self._running[-1]

    def _slots(self, config: RunConfig) -> int:
        """How many runs like this one the nodes have room for when nothing else runs."""
        needs = {"CPU": config.threads, "GPU": config.gpus}
        return sum(min(node[kind] // n for kind, n in needs.items() if n) for node in _nodes())


def _nodes() -> list[dict[str, int]]:
    """The CPUs and GPUs of each node that is alive."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [{kind: int(node.get(kind, 0)) for kind in ("CPU", "GPU")} for node in alive]


def _check_address(address: str) -> None:
    """Ray itself would try for minutes."""
    host, colon, port = address.rpartition(":")
    if not (colon and port.isdigit()):  # none, or "auto"
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise ValueError(
            f"No Ray cluster answers at RAY_ADDRESS={address} ({error.strerror or error}): start one there with "
            "`ray start --head`, or unset RAY_ADDRESS to use this machine."
        ) from error


class RayRun:
    """A run that a task makes somewhere in the cluster."""

    def __init__(self, folder: Path, config: RunConfig, wait: bool, maker: str) -> None:
        # A task that its node takes down with it is the study's to repeat, not Ray's.
        task = ray.remote(num_cpus=config.threads, num_gpus=config.gpus, max_retries=0)(make_run)
        self._task = task.remote(str(folder.resolve()), config, wait, maker)
        self._status: int | None = None

    def poll(self) -> int | None:
        """The exit status; 1 where the node or the task's own process went down.

        Raises:
            ValueError: The node doesn't see the study's folder.
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
        """Ends the task, and with it the run."""
        ray.cancel(self._task, force=True)


def make_run(folder: str, config: RunConfig, wait: bool, maker: str) -> int:
    """What a task does on its node; returns the run's exit status."""
    path = Path(folder)
    if not (path / CONFIG).is_file():
        raise ValueError(
            f"The node {platform.node()} doesn't see {folder}: give the study a folder (--out) on a file system that "
            "all nodes of the cluster share."
        )
    gpus: list[Any] = ray.get_gpu_ids()
    return RunProcess(path, config, list(map(str, gpus)), wait, maker).wait()
