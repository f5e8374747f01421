"""Run by test_sharded.py as a script, once per process: fits a model with parameters sharded over processes.

The data do not depend on the number of processes, so all layouts must end with the same weights as one process.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from depthcb import DepthProfile, EqualStep, UpdateRatioMonitor
from depthcb.step_extras import EXTRAS

#: Layouts by name: data parallel size and tensor parallel size.
LAYOUTS = {"one": (1, 1), "dp2": (2, 1), "dp2_root": (2, 1), "tp2": (1, 2), "dp2_tp2": (2, 2)}


class Block(nn.Module):
    """Odd sizes: half of a 13 x 8 matrix is uneven, and half of the one-number gate is empty."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, width), nn.Linear(width, 8)
        self.gate = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate * self.down(torch.tanh(self.up(self.norm(x))))


class Body(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter, self.blocks = nn.Linear(5, 8), nn.ModuleList(Block(width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return x


class Regression(pl.LightningModule):
    def __init__(self, layout: str) -> None:
        super().__init__()
        self.layout = layout
        torch.manual_seed(0)
        self.body = Body(width=12 if "tp" in layout or layout == "one_even" else 13)

    def configure_model(self) -> None:
        if self.device_mesh is None:
            return
        if self.device_mesh["tensor_parallel"].size() > 1:
            for block in self.body.blocks:
                plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
                parallelize_module(block, self.device_mesh["tensor_parallel"], plan)
        if self.device_mesh["data_parallel"].size() > 1:
            if self.layout != "dp2_root":
                for block in self.body.blocks:
                    fully_shard(block, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.body, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.body(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", nn.functional.mse_loss(self.body(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.9)


class Collectives:
    """Counts the all-reduces for step ratios."""

    def __init__(self) -> None:
        self.count, self._all_reduce = 0, dist.all_reduce
        dist.all_reduce = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.count += sys._getframe(1).f_globals["__name__"] == "depthcb.step_ratio"
        return self._all_reduce(*args, **kwargs)


def loaders(ranks: int, rank: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(32, 5, generator=generator), torch.randn(32, 8, generator=generator))
    sampler = DistributedSampler(data, num_replicas=ranks, rank=rank, shuffle=False)
    return DataLoader(data, 8 // ranks, sampler=sampler), DataLoader(data, batch_size=8)


def whole(parameter: Tensor) -> list[float]:
    tensor = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return tensor.detach().double().flatten().tolist()  # type: ignore[no-any-return]


def flat(module: nn.Module) -> list[float]:
    return [value for p in module.parameters() for value in whole(p)]


def main(folder: Path, name: str, resume: str, distributed: str, log_every: str) -> None:
    torch.set_num_threads(1)
    finer, name = name.endswith("_matrix"), name.removesuffix("_matrix")
    layout = name.removesuffix("_even")
    dp, tp = LAYOUTS[layout]
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    module, control, watch = Regression(name), EqualStep(), DepthProfile()
    monitor, bare = UpdateRatioMonitor(), EqualStep()
    if finer:
        control, bare = EqualStep(unit="matrix"), EqualStep(unit="matrix")
        monitor, watch = UpdateRatioMonitor(unit="matrix", extras=EXTRAS), DepthProfile(pretrained="cpu", null_draws=1)
    strategy: Any = "auto"
    if dp * tp > 1:
        strategy = ModelParallelStrategy(dp, tp, save_distributed_checkpoint=distributed == "distributed")
    keep = ModelCheckpoint(folder, filename="first", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True)
    trainer = pl.Trainer(
        max_epochs=2, devices=dp * tp, accelerator="cpu", strategy=strategy, logger=CSVLogger(folder, name="", version=""),
        callbacks=[control, monitor, watch, *([] if resume else [keep])], log_every_n_steps=int(log_every),
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, enable_checkpointing=not resume,
    )  # fmt: skip
    counted = Collectives()
    trainer.fit(module, *loaders(dp, rank // tp), ckpt_path=resume or None)
    collectives, unwatched = counted.count, Regression(name)
    if not resume:
        if dp * tp > 1:
            strategy = ModelParallelStrategy(dp, tp)
        trainer = pl.Trainer(
            max_epochs=2, devices=dp * tp, accelerator="cpu", strategy=strategy, callbacks=[bare], logger=False,
            enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
            enable_checkpointing=False,
        )  # fmt: skip
        trainer.fit(unwatched, *loaders(dp, rank // tp))
    seen = {
        "weights": flat(module),
        "unwatched": flat(unwatched),
        "change": watch.profiles[-1].change,
        "profiles": len(watch.profiles),
        "realised": control.mean_realised.values(),
        "collectives": collectives,
        "pieces": sorted({tuple(p.to_local().shape) for p in module.parameters() if isinstance(p, DTensor)}),
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:6])
