"""CKAChange over two real processes is CKA over all rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from depthcb.similarity import CKAChange, cka_change

ROWS = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
MOVED = ROWS + 0.5 * torch.randn(24, 6, generator=torch.Generator().manual_seed(1))


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    metric = CKAChange()
    mine = slice(0, 10) if rank == 0 else slice(10, 24)  # uneven on purpose
    metric.update(ROWS[mine], MOVED[mine])
    torch.save(metric.compute(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    mp.spawn(work, args=(str(tmp_path),), nprocs=2)
    for rank in range(2):
        value = torch.load(tmp_path / f"{rank}.pt", weights_only=True).item()
        assert value == pytest.approx(cka_change(ROWS, MOVED).item(), rel=1e-9)
