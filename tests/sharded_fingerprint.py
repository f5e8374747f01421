"""Two processes: weights that are sharded, replicated or partly both have the fingerprint of whole ones."""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from depthcb.fingerprint import weights_fingerprint


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.LayerNorm(3))


def main(rank: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    dist.init_process_group("gloo")
    whole = weights_fingerprint(model())
    sharded = model()
    for layer in sharded:
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
    assert weights_fingerprint(sharded) == whole
    sharded(torch.ones(2, 5))  # gathers parameters
    assert weights_fingerprint(sharded) == whole
    with torch.no_grad():
        if rank == 1:
            sharded[2].bias.to_local().add_(1e-3)
    assert weights_fingerprint(sharded) != whole
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(main, nprocs=2)
    sys.exit(0)
