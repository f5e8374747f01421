"""The process of one run, for every engine: ``python -m depthcb_recipes.studies.worker FOLDER MODULE``."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import traceback
from pathlib import Path

import yaml

from depthcb_recipes.studies.grid import RunConfig
from depthcb_recipes.studies.result import CONFIG, read_result, write_result
from depthcb_recipes.studies.store import LEASE, Busy, cache_error, full_disk, locked, start_afresh

#: Exit statuses: another process has this run; the disk is full; the cache cannot be written (see the log's last line).
BUSY, FULL, NO_CACHE = 75, 74, 73
_PR_SET_PDEATHSIG = 1


def main(folder: Path, module: str) -> int:
    """Makes the run by ``module.run(config, folder)``, unless it has a result or another process makes it.

    Returns:
        The exit status: 0 with a result on disk, `BUSY`, `FULL`, `NO_CACHE`, or 1 if the module itself failed.
    """
    die_with_the_parent()
    config = RunConfig(**yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8")))
    patience = 1.5 * LEASE if os.environ.get("DEPTHCB_WAIT") else 0
    try:
        if int(os.environ.get("LOCAL_RANK", 0)):  # a further process of a distributed run; the first one holds the lock
            importlib.import_module(module).run(config, folder)
            return 0
        with locked(folder, patience) as check:
            if read_result(folder) is None:
                if not config.resumes:
                    start_afresh(folder)
                write_result(folder, importlib.import_module(module).run(config, folder), check)
    except Busy:
        return BUSY
    except Exception as error:
        traceback.print_exc()
        if cause := cache_error(error):
            print(cause, file=sys.stderr)
            return NO_CACHE
        return FULL if full_disk(error) else 1
    return 0


def die_with_the_parent() -> None:
    """Has the kernel kill this process when its parent dies (Linux only)."""
    parent = os.environ.get("DEPTHCB_PARENT")
    if parent and sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(parent):  # the parent died first
            os._exit(1)
    os.environ["DEPTHCB_PARENT"] = str(os.getpid())  # for the further processes of a distributed run


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
