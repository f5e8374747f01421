"""A fit whose record reaches the largest size that a file may have: `python full_disk_fit.py FOLDER BYTES [STEP]`.

From that step on, there is no limit any more.
"""

from __future__ import annotations

import resource
import sys
import warnings
from pathlib import Path

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers.logger import Logger
from support import TinyLM, fit, seeded

from depthcb import DepthProfile, EqualStep


class Local(Logger):
    """A logger that has a folder and writes nothing to it."""

    name, version = "", "run"
    save_dir = ""

    def log_metrics(self, *args: object, **kwargs: object) -> None:
        pass

    def log_hyperparams(self, *args: object, **kwargs: object) -> None:
        pass


class MakeRoom(Callback):
    """Lifts the limit at a step, if any."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *_: object) -> None:
        if trainer.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


if __name__ == "__main__":
    Local.save_dir = sys.argv[1]
    Path(Local.save_dir).mkdir(exist_ok=True)
    room_from = int(sys.argv[3]) if len(sys.argv) > 3 else None
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(
            seeded(TinyLM),
            [EqualStep(), DepthProfile(null_draws=2), MakeRoom(room_from)],
            logger=Local(),
            max_steps=12,
            val_check_interval=2,
        )
    print("steps", trainer.global_step)
    for told in caught:
        if "depthcb" in str(told.filename) or "cannot" in str(told.message) or "incomplete" in str(told.message):
            print("warned", told.message)
