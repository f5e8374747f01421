"""Run by test_ddp.py as a script, once a process: fits under DDP and writes what this rank saw."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, DistributedSampler

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import TinyLM, seeded, texts

from depthcb import DepthProfile, EqualStep, UpdateRatioMonitor


def main(folder: Path, world: int) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    module = seeded(lambda: TinyLM(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))).eval()  # no dropout
    control, watch = EqualStep(), DepthProfile()
    data = texts(32)
    sampler = DistributedSampler(data, num_replicas=world, rank=rank, shuffle=False)  # type: ignore[arg-type]
    trainer = pl.Trainer(
        max_epochs=1, devices=world, accelerator="cpu", strategy="ddp" if world > 1 else "auto",
        callbacks=[control, UpdateRatioMonitor(), watch], logger=CSVLogger(folder, name="", version=""),
        log_every_n_steps=1, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, 8 // world, sampler=sampler), DataLoader(texts(16, seed=1), batch_size=8))
    seen = {
        "weights": torch.cat([p.detach().flatten() for p in module.parameters()]).tolist(),
        "change": watch.profiles[-1].change,
        "realised": control.mean_realised.values(),
        "monitored": float(trainer.callback_metrics["depth/cka/slope"]),
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
