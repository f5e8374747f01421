"""Run by test_ddp.py as a script, once per process: fits with DDP and writes what this rank saw."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import wandb
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from torch.utils.data import DataLoader, DistributedSampler

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import TinyLM, seeded, texts

from depthcb import DepthProfile, EqualStep, UpdateRatioMonitor


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


class Fed(TinyLM):
    """Returns the shard of each batch that belongs to this process."""

    metrics: dict[str, float]

    def train_dataloader(self) -> Any:
        data, ranks = texts(32), self.trainer.world_size
        sampler = DistributedSampler(data, num_replicas=ranks, rank=self.trainer.global_rank, shuffle=False)  # type: ignore[arg-type]
        return DataLoader(data, 8 // ranks, sampler=sampler)

    def val_dataloader(self) -> Any:
        return DataLoader(texts(16, seed=1), batch_size=8)


def fit(world: int, strategy: str, callbacks: list[pl.Callback], logger: Any) -> Fed:
    module = seeded(lambda: Fed(sgd)).eval()  # no dropout
    trainer = pl.Trainer(
        max_epochs=1, devices=world, accelerator="cpu", strategy=strategy, callbacks=callbacks, logger=logger,
        log_every_n_steps=1, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module)
    module.metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
    return module  # type: ignore[return-value]


def flat(module: pl.LightningModule) -> list[float]:
    return torch.cat([p.detach().flatten() for p in module.parameters()]).tolist()  # type: ignore[no-any-return]


def main(folder: Path, world: int, strategy: str) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    control, watch = EqualStep(), DepthProfile()
    loggers: list[Any] = [CSVLogger(folder, name="", version="")]
    if strategy == "ddp":
        silent = wandb.Settings(silent=True, console="off", mode="offline")
        loggers += [WandbLogger(save_dir=folder, settings=silent)]
    module = fit(world, strategy, [control, UpdateRatioMonitor(), watch], loggers)
    if strategy == "ddp":
        loggers[1].experiment.finish()
    matrices = EqualStep(unit="matrix")
    seen = {
        "weights": flat(module),
        "unwatched": flat(fit(world, strategy, [EqualStep()], False)),
        "by_matrix": flat(fit(world, strategy, [matrices], False)),
        "realised_by_matrix": matrices.mean_realised.values(),
        "change": watch.profiles[-1].change if watch.profiles else None,  # spawned processes keep theirs
        "realised": control.mean_realised.values(),
        "monitored": module.metrics["depth/cka/slope"],
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
