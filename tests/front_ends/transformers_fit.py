"""Run by test_transformers.py as a script, once per process: trains with DDP and writes what this rank saw."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from front_ends.same import model, trainer, transformers_callbacks


def fit(folder: Path, callbacks: list[Any]) -> list[float]:
    run = trainer(model(), folder, callbacks, per_device_train_batch_size=4, ddp_backend="gloo")
    run.train()
    assert run.model is not None
    return torch.cat([p.detach().flatten() for p in run.model.parameters()]).tolist()  # type: ignore[no-any-return]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    callbacks = transformers_callbacks()
    seen = {
        "weights": fit(folder, callbacks),
        "change": [p.change for p in callbacks[2].recorder.profiles],
        "unwatched": fit(folder / "unwatched", transformers_callbacks()[:1]),
    }
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
