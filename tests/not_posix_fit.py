"""Run by test_platforms.py as a script: a fit with its record and progress bars, without POSIX-only features."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

# Imported first: on a POSIX system, these packages use such modules themselves.
import lightning.pytorch  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import pandas  # noqa: F401
import torch  # noqa: F401
import wandb  # noqa: F401
from lightning.pytorch.trainer.connectors import signal_connector
from transformers import GPT2LMHeadModel, Trainer  # noqa: F401

#: Modules that do not exist on Windows, and `ctypes`, which gives access to the C library.
MODULES = ("ctypes", "fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty")
#: POSIX-only names in modules that exist on every system.
NAMES = {
    "os": ("fork", "forkpty", "getgid", "getpgid", "getpgrp", "getuid", "killpg", "nice", "sched_getaffinity",
           "sched_setaffinity", "setpgid", "setsid", "wait3", "wait4"),
    "signal": ("SIGALRM", "SIGCHLD", "SIGHUP", "SIGKILL", "SIGQUIT", "SIGSTOP", "SIGUSR1", "SIGUSR2", "alarm",
               "pthread_kill", "pthread_sigmask", "setitimer", "sigwait"),
}  # fmt: skip


def take_away() -> None:
    """Removes them from this process."""
    for name in MODULES:
        sys.modules[name] = None  # type: ignore[assignment]  # importing it fails now
    for module in (os, signal):
        for name in NAMES[module.__name__]:
            if hasattr(module, name):
                delattr(module, name)
    left = {signal.SIGABRT, signal.SIGFPE, signal.SIGILL, signal.SIGINT, signal.SIGSEGV, signal.SIGTERM}
    signal.valid_signals = lambda: left
    signal_connector._IS_WINDOWS = True  # by default, Lightning itself uses SIGKILL


def main(folder: Path) -> None:
    import importlib
    import pkgutil

    import depthcb

    everything = pkgutil.walk_packages(depthcb.__path__, "depthcb.")
    for name in [module.name for module in everything]:
        if name != "depthcb.__main__":
            importlib.import_module(name)

    from lightning.pytorch.loggers import CSVLogger

    sys.path.insert(0, str(Path(__file__).parent))
    from support import TinyLM, fit, seeded

    from depthcb import DepthProfile, EqualStep, UpdateRatioMonitor
    from depthcb.cli import main as command
    from depthcb.run import read_runs

    callbacks = [UpdateRatioMonitor(), EqualStep(), DepthProfile()]
    fit(seeded(TinyLM), callbacks, logger=CSVLogger(folder), val_check_interval=2)
    assert command(["show", str(folder)]) == 0
    (run,) = read_runs(folder)
    print(json.dumps({"control": run.control, "records": sorted(run.records), "finished": run.finished,
                      "changes": [list(profile.change) for profile in run.profiles["cka"]],
                      "steps": len(run.step_ratio.steps), "loaded": sorted(sys.modules)}))  # fmt: skip


if __name__ == "__main__":
    take_away()
    main(Path(sys.argv[1]))
