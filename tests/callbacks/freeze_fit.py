"""Run by test_freeze_by_change.py as a script, once per process: freezes under DDP and saves what this rank has."""

from __future__ import annotations

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from callbacks.ddp_fit import Fed, sgd
from support import seeded

from depthcb import DepthProfile, FreezeByChange


def main(path: str, world: int) -> None:
    torch.set_num_threads(1)
    freeze = FreezeByChange(below=0.4)
    module = seeded(lambda: Fed(sgd)).eval()  # no dropout
    trainer = pl.Trainer(
        max_epochs=6, devices=world, accelerator="cpu", callbacks=[DepthProfile(), freeze], logger=False,
        strategy="ddp_find_unused_parameters_true" if world > 1 else "auto", enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module)
    torch.save({"frozen": freeze.frozen, "weights": module.state_dict()}, f"{path}.{trainer.global_rank}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
