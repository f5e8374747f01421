"""A run's subprocess: how it is started, looked at and ended. Every engine starts the same one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from depthcb_recipes.studies.grid import RunConfig
from depthcb_recipes.studies.store import LOG

#: What makes one run: a module with ``make(config, folder)``.
MAKER = "depthcb_recipes.studies.run"
#: What chooses the precision for a kind of device: a program that prints it as JSON.
CHOOSER = "depthcb_recipes.precision"


#: Beginnings of variables that the driver's own job may have set, and that would pass for a run's.
_FOREIGN = ("SLURM_", "PL_", "DEPTHCB_", "WANDB_RUN", "WANDB_RESUME", "RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK",
            "WORLD_SIZE", "MASTER_")  # fmt: skip


class RunProcess:
    """A subprocess that makes one run, its output in the run's log.

    Args:
        folder: The run's folder, with its configuration.
        config: The run.
        gpus: The devices it may see, as ``CUDA_VISIBLE_DEVICES`` names them.
        wait: Whether to wait for another process that makes this run.
        maker: The module that makes it.
    """

    def __init__(
        self, folder: Path, config: RunConfig, gpus: Sequence[str] = (), wait: bool = False, maker: str = MAKER
    ) -> None:
        self._log: IO[bytes] = open(folder / LOG, "ab")  # noqa: SIM115  # closed when the run has ended
        self._process = subprocess.Popen(
            [sys.executable, "-m", "depthcb_recipes.studies.worker", str(folder), maker],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env=environment(config.threads, gpus, wait),
            start_new_session=True,  # a group of its own, so that its own children can be ended with it
        )

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        if self._process.poll() is not None:
            self._end()
        return self._process.returncode

    def wait(self) -> int:
        """Waits for the end; returns the exit status."""
        self._process.wait()
        self._end()
        return self._process.returncode

    def kill(self) -> None:
        """Ends the run at once."""
        self._end()
        self._process.wait()

    def _end(self) -> None:
        """Ends what is left of the process's group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._log.close()


def environment(threads: int, gpus: Sequence[str] | None, wait: bool) -> dict[str, str]:
    """A run's environment: its threads and devices, whom it dies with, and nothing of a batch job around it.

    Args:
        threads: CPU threads.
        gpus: The devices it may see; None for all that this process sees.
        wait: Whether it waits for another process that makes the same run.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith(_FOREIGN)}
    kept |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "DEPTHCB_PARENT": str(os.getpid())}
    kept |= {"PYTHONSAFEPATH": "1"}  # no module of the current folder's
    kept.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see depthcb_recipes.machine.use_threads_politely
    if gpus is not None:
        kept["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    return kept | ({"DEPTHCB_WAIT": "1"} if wait else {})


def choose_precision(device: str, threads: int) -> dict[str, str]:
    """The precision that suits a kind of device of this machine, with its reason.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        threads: Of the process that finds out, which leaves this one free of torch.

    Raises:
        ValueError: That process failed.
    """
    gpus = [os.environ["CUDA_VISIBLE_DEVICES"]] if "CUDA_VISIBLE_DEVICES" in os.environ else None
    done = subprocess.run(
        [sys.executable, "-m", CHOOSER, device],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=environment(threads, gpus, wait=False),
    )
    if done.returncode:
        raise ValueError(f"The precision could not be chosen: {done.stderr.strip().rpartition(chr(10))[2]}")
    choice: dict[str, str] = json.loads(done.stdout)
    return choice


def last_lines(folder: Path, count: int = 5) -> str:
    """The end of a run's log."""
    lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
    return " | ".join(line.strip() for line in lines[-count:] if line.strip())
