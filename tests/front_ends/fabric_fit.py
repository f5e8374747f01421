"""Run by test_fabric.py as a script, once per process: trains under DDP or FSDP2 and writes what this rank saw."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers import CSVLogger
from lightning.fabric.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler

sys.path.insert(0, str(Path(__file__).parents[1]))
from front_ends.same import MEASURES, data, fabric_loop, model, optimizer, probe

from depthcb.fabric import DepthProfile, EqualStep, UpdateRatioMonitor


def sharded(net: Any, mesh: Any) -> nn.Module:
    for block in net.gpt2.h:
        fully_shard(block, mesh=mesh["data_parallel"])
    fully_shard(net, mesh=mesh["data_parallel"])
    return net  # type: ignore[no-any-return]


def fit(folder: Path, strategy: str, world: int, watched: bool) -> tuple[Any, list[float]]:
    watch = DepthProfile(probe(), measures=MEASURES)
    callbacks = [EqualStep(every=1), *([UpdateRatioMonitor(every=1), watch] if watched else [])]
    plan: Any = ModelParallelStrategy(sharded, world, 1) if strategy == "fsdp2" else strategy
    loggers = [CSVLogger(folder, name="", version="")] if watched else []
    fabric = Fabric(accelerator="cpu", devices=world, strategy=plan, callbacks=callbacks, loggers=loggers)
    fabric.launch()
    if strategy == "fsdp2":
        net = fabric.setup_module(model())
        sgd = fabric.setup_optimizers(optimizer(net))
        fabric.call("on_after_setup", fabric=fabric, module=net, optimizers=[sgd])
    else:
        net, sgd = fabric.setup(inner := model(), optimizer(inner))
    items: Any = data()
    sampler: Any = DistributedSampler(items, num_replicas=world, rank=fabric.global_rank, shuffle=False)
    fabric_loop(fabric, net, sgd, DataLoader(items, 8 // world, sampler=sampler))
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in net.parameters()]
    return watch, torch.cat([p.detach().flatten() for p in whole]).tolist()


def main(folder: Path, world: int, strategy: str) -> None:
    torch.set_num_threads(1)
    watch, weights = fit(folder, strategy, world, watched=True)
    _, unwatched = fit(folder, strategy, world, watched=False)
    seen = {
        "weights": weights,
        "unwatched": unwatched,
        "change": [p.change for p in watch.recorder.profiles],
    }
    (folder / f"rank{torch.distributed.get_rank()}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
