"""Run by test_split.py as a script, once per process: fits an objective of the recipes, sharded or not, and computes its null.

The data do not depend on the number of processes, so both must end with the same weights.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import transformers as hf
from datasets import Dataset
from lightning.pytorch.strategies import ModelParallelStrategy
from recipes_families import tiny
from shrunk import write_tokenizer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler

from depthcb import DepthProfile, EqualStep
from depthcb_recipes import DPO, CausalLM, MaskedLM, PreferencePairs


def loader(ranks: int, rank: int) -> DataLoader[Any]:
    rows = torch.randint(1, 50, (32, 12), generator=torch.Generator().manual_seed(1))
    data = Dataset.from_dict({"input_ids": rows.tolist()}).with_format("torch")

    def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        ids = torch.stack([row["input_ids"] for row in rows])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    sampler = DistributedSampler(data, num_replicas=ranks, rank=rank, shuffle=False)  # type: ignore[arg-type]
    return DataLoader(data, 8 // ranks, sampler=sampler, collate_fn=collate)  # type: ignore[arg-type]


class Pairs(PreferencePairs):
    """The same pairs on both sides, shared out to the processes in a fixed order."""

    def __init__(self, folder: Path, ranks: int, rank: int) -> None:
        write_tokenizer(folder)
        super().__init__(hf.AutoTokenizer.from_pretrained(folder), batch_size=8 // ranks)
        self.of = {"num_replicas": ranks, "rank": rank, "shuffle": False}
        ids = torch.randint(5, 50, (2, 32, 12), generator=torch.Generator().manual_seed(1)).tolist()
        columns = {"input_ids": ids[0], "labels": ids[0], "rejected_input_ids": ids[1], "rejected_labels": ids[1]}
        self.train_data = self.val_data = Dataset.from_dict(columns)

    def _loader(self, data: Dataset, shuffle: bool) -> DataLoader[Any]:
        sampler = DistributedSampler(data, **self.of)  # type: ignore[arg-type]
        return DataLoader(data, self.batch_size, sampler=sampler, collate_fn=self.collate)  # type: ignore[arg-type]


def objective(name: str) -> Any:
    if name == "dpo":
        return DPO(tiny("gpt2", "ForCausalLM"), optimizer="sgd", lr=0.1, warmup_steps=0)
    if name == "masked_lm":
        return MaskedLM(tiny("bert", "ForMaskedLM"), optimizer="sgd", lr=0.1, warmup_steps=0)
    return CausalLM(tiny("gpt2", "ForCausalLM"), optimizer="sgd", lr=0.1, warmup_steps=0)


def main(folder: Path, name: str, ranks: int, tensor_parallel: int) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    watch = DepthProfile(next(iter(loader(1, 0))), pretrained="cpu", null_draws=2)
    strategy: Any = "auto"
    if ranks > 1:
        strategy = ModelParallelStrategy(ranks // tensor_parallel, tensor_parallel)
    trainer = pl.Trainer(
        accelerator="cpu", devices=ranks, strategy=strategy, max_steps=4, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        callbacks=[EqualStep(), watch], num_sanity_val_steps=0, gradient_clip_val=1.0,
    )  # fmt: skip
    module = objective(name)
    if name == "dpo":
        trainer.fit(module, datamodule=Pairs(folder / f"tokenizer{rank}", ranks, rank))
    else:
        trainer.fit(module, loader(ranks, rank), loader(ranks, rank))
    null = watch.recorder.measure_null()
    assert null is not None
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in module.parameters()]
    seen = {
        "weights": [value for p in whole for value in p.detach().double().flatten().tolist()],
        "pieces": sum(isinstance(p, DTensor) for p in module.parameters()),
        "loss": float(trainer.callback_metrics["val/loss"]),
        "change": watch.profiles[-1].change,
        "null": [draw["cka"].change for draw in null.draws],
        "matched_null": [draw["cka"].change for draw in null.matched],
        "net_change": watch.recorder.net_change,
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
