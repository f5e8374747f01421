"""Runs of tests that need no fit: follows the options and logs its actions next to the runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from studies import FIGURES

from depthcb_recipes.studies.grid import RunConfig
from depthcb_recipes.studies.result import FINISHED, Result


def run(config: RunConfig, folder: Path) -> Result:
    options, began = config.options, time.time()
    if "child" in options:
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", str(folder)])
    time.sleep(options.get("seconds", 0))
    if options.get("die") == config.model:
        print("I am about to die", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if options.get("leave") == config.model:
        raise SystemExit  # as Lightning does when it gets SIGTERM
    with open(folder.parents[1] / "made", "a") as file:
        file.write(f"{folder.name} {os.environ['CUDA_VISIBLE_DEVICES'] or '-'} {began} {time.time()}\n")
    if options.get("fail") == f"{config.model} {config.objective}":
        return Result("failed", config, message="on purpose")
    return Result(FINISHED, config, FIGURES)
