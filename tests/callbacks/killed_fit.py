"""Run by test_faults.py as a script: fits for 3 epochs, and optionally kills itself or resumes."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import TinyLM, seeded, texts

from depthcb import DepthProfile, EqualStep, UpdateRatioMonitor


class Stop(pl.Callback):
    """Sends a signal to the process in the middle of the third epoch."""

    def __init__(self, number: int) -> None:
        self.number = number

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.current_epoch == 2 and trainer.global_step == 10:
            os.kill(os.getpid(), self.number)


def main(folder: Path, stop: str, resume: str, shuffled: str) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
    module = seeded(lambda: TinyLM(lambda p: torch.optim.AdamW(p, lr=1e-2)))
    if not shuffled:
        module.eval()  # no dropout: without random numbers, Lightning resumes exactly
    control, watch = EqualStep(), DepthProfile()
    callbacks: list[pl.Callback] = [control, UpdateRatioMonitor(), watch]
    callbacks += [ModelCheckpoint(folder, "last", save_on_train_epoch_end=True, enable_version_counter=False)]
    if stop:
        callbacks.append(Stop(getattr(signal, stop)))
    trainer = pl.Trainer(
        max_epochs=3, accelerator="cpu", logger=CSVLogger(folder, name="", version=""), callbacks=callbacks,
        log_every_n_steps=1, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    try:
        data = DataLoader(texts(), batch_size=8, shuffle=bool(shuffled))
        trainer.fit(module, data, DataLoader(texts(16, seed=1), batch_size=8), ckpt_path=resume or None)
    finally:
        left = [h for o in trainer.optimizers for h in (*o._optimizer_step_pre_hooks, *o._optimizer_step_post_hooks)]
        seen = {
            "weights": torch.cat([p.detach().flatten() for p in module.parameters()]).tolist(),
            "profiles": [p.to_dict() for p in watch.profiles],
            "steps": control.mean_realised.counts,
            "hooks": len(left) + sum(len(m._forward_hooks) for m in module.modules()),
        }
        (folder / "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:5])
