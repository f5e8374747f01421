"""The subprocess of a run, which every engine starts in the same way."""

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

from depthcb_recipes.studies.fetch import is_fetched
from depthcb_recipes.studies.grid import RunConfig
from depthcb_recipes.studies.store import LOG

#: The module that executes a run: it has ``run(config, folder)``, which returns a `Result`.
RUNNER = "depthcb_recipes.studies.runner"
#: The program that chooses the precision for a kind of device, and prints it as JSON.
CHOOSER = "depthcb_recipes.precision"

#: Prefixes of environment variables of the driver's own batch job, which must not reach a run.
_FOREIGN = ("SLURM_", "PL_", "DEPTHCB_", "WANDB_RUN", "WANDB_RESUME", "RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK",
            "WORLD_SIZE", "MASTER_")  # fmt: skip


class RunProcess:
    """A subprocess that executes one run, with its output in the run's log.

    Args:
        folder: The run's folder, with its configuration.
        config: The run.
        gpus: The devices it may see, named as in ``CUDA_VISIBLE_DEVICES``.
        wait: Whether to wait for another process that has this run.
        runner: The module that executes it.
    """

    def __init__(
        self, folder: Path, config: RunConfig, gpus: Sequence[str] = (), wait: bool = False, runner: str = RUNNER
    ) -> None:
        offline = {"HF_HUB_OFFLINE": "1"} if is_fetched(config, folder.parents[1]) else {}
        self._log: IO[bytes] = open(folder / LOG, "ab")  # noqa: SIM115  # closed when the run has ended
        self._process = subprocess.Popen(
            [sys.executable, "-m", "depthcb_recipes.studies.worker", str(folder), runner],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env=environment(config.threads, gpus, wait) | offline,
            start_new_session=True,  # its own process group, so that its children can be killed with it
        )

    def poll(self) -> int | None:
        """Returns the exit status, negative for a signal; None while the run is going on."""
        if self._process.poll() is not None:
            self._end()
        return self._process.returncode

    def wait(self) -> int:
        """Waits for the run and returns its exit status."""
        self._process.wait()
        self._end()
        return self._process.returncode

    def kill(self) -> None:
        """Kills the run."""
        self._end()
        self._process.wait()

    def _end(self) -> None:
        """Kills what is left of the process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._log.close()


def environment(threads: int, gpus: Sequence[str] | None, wait: bool) -> dict[str, str]:
    """Returns a run's environment: threads, devices and parent, and nothing of a surrounding batch job.

    Args:
        threads: CPU threads.
        gpus: The devices it may see; None for all that this process sees.
        wait: Whether it waits for another process that has the same run.
    """
    variables = {k: v for k, v in os.environ.items() if not k.startswith(_FOREIGN)}
    variables |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "DEPTHCB_PARENT": str(os.getpid())}
    variables |= {"PYTHONSAFEPATH": "1"}  # no imports from the current folder
    variables.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see depthcb_recipes.machine.use_threads_politely
    if gpus is not None:
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    return variables | ({"DEPTHCB_WAIT": "1"} if wait else {})


def choose_precision(device: str, threads: int) -> dict[str, str]:
    """Chooses the precision for a kind of device of this machine.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        threads: CPU threads of the subprocess that measures it, so that torch is not imported here.

    Returns:
        The precision and the reason.

    Raises:
        ValueError: That subprocess failed.
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
    """Returns the last lines of a run's log."""
    lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
    return " | ".join(line.strip() for line in lines[-count:] if line.strip())
