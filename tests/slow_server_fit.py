"""Run by test_wandb.py as a script: fits against a backend that is slow, or dies after the first validation."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas  # noqa: F401  # W&B imports it with the first picture, whatever the server
import wandb
from lightning.pytorch.loggers import WandbLogger

sys.path.insert(0, str(Path(__file__).parent))
from support import TinyLM, fit, seeded
from wandb_server import backend

from depthcb import DepthProfile


class Timed(WandbLogger):
    """Records how long the client delayed each row."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.seconds: dict[int, float] = {}
        self.rows = 0

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        start = time.perf_counter()
        super().log_metrics(metrics, step)
        if any(key.startswith("depth/") for key in metrics):
            self.rows += 1
            self.seconds[step or 0] = self.seconds.get(step or 0, 0.0) + time.perf_counter() - start


class Kills(pl.Callback):
    """Stops the backend after the first validation."""

    def __init__(self, life: contextlib.ExitStack) -> None:
        self.life = life

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            self.life.close()


def main(server: str, folder: Path) -> None:
    life = contextlib.ExitStack()
    kept = life.enter_context(backend())
    settings = wandb.Settings(base_url=kept.url, api_key="0" * 40, silent=True, console="off", init_timeout=30)
    logger = Timed(project="p", save_dir=folder, settings=settings)
    assert logger.experiment
    kept.delay = 3.0 if server == "slow" else 0.0
    watch = DepthProfile()
    callbacks = [watch, *([Kills(life)] if server == "dead" else [])]
    fit(seeded(TinyLM), callbacks, logger=logger, max_steps=12, val_check_interval=2)
    seen = {"validations": len(watch.profiles), "rows": logger.rows, "seconds": list(logger.seconds.values())}
    (folder / "seen.json").write_text(json.dumps(seen))
    sys.stdout.flush()
    os._exit(0)  # not through wandb.finish(), which waits for the server


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
