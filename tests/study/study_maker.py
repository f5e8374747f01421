"""Run by the pool in place of a fit: the same protocol (lock, result, death with the driver), no training."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import yaml

from depthcb.study.pool import BUSY, die_with_the_driver
from depthcb.study.store import CONFIG, Busy, locked, read_result, write_result


def main(folder: Path) -> int:
    die_with_the_driver()
    config = yaml.safe_load((folder / CONFIG).read_text())
    options, name = config["options"], f"{config['model']} {config['objective']}"
    try:
        with locked(folder):
            if read_result(folder) is None:
                time.sleep(options.get("seconds", 0))
                if options.get("die") == config["model"]:
                    print("I am about to die", flush=True)
                    os.kill(os.getpid(), signal.SIGKILL)
                failed = options.get("fail") == name
                ended = (
                    {"status": "failed", "message": "on purpose"} if failed else {"status": "finished", "slope": 1.0}
                )
                write_result(folder, ended)
                with open(folder / "made", "a") as file:
                    file.write(f"{folder.name}\n")
    except Busy:
        return BUSY
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
