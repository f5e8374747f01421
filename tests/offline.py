"""Reads offline W&B runs with W&B's own reader."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

#: The command that prints a run's records as JSON, which W&B has since 0.31; tests of older versions name another one.
WANDB = os.environ.get("WANDB_READER", str(Path(sys.executable).with_name("wandb")))


def records(folder: Path) -> list[dict[str, Any]]:
    """Returns all records of the runs in a folder, oldest run first; every run must have finished."""
    found = []
    for run in sorted(folder.glob("**/offline-run-*")):
        deadline = time.monotonic() + 30
        while True:
            done = subprocess.run(
                [WANDB, "leet", "inspect", "--json", str(run)], capture_output=True, text=True, check=True
            )
            lines = [json.loads(line) for line in done.stdout.splitlines()]
            if lines and lines[-1]["type"] == "exit":
                break
            assert time.monotonic() < deadline, f"{run} did not come to its end"
            time.sleep(0.05)  # finish() may return shortly before the file is complete
        found += lines
    return found


def history(folder: Path) -> list[dict[str, Any]]:
    """The logged rows, oldest first."""
    return [r["history"]["item"] for r in records(folder) if r["type"] == "history"]


def summary(run: Path) -> dict[str, Any]:
    """Configuration and summary of one run."""
    command = [WANDB, "leet", "inspect", "--json", "--summary", str(run)]
    found: dict[str, Any] = json.loads(
        subprocess.run(command, capture_output=True, text=True, check=True, cwd=run).stdout
    )
    return found
