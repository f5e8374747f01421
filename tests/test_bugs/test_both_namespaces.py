"""With ``import pytorch_lightning`` pictures were missing, FSDP1 was accepted, and a fast_dev_run left records behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import lightning.pytorch
import pytest

pytest.importorskip("pytorch_lightning")

FIT = """
import sys, warnings
import torch, pytorch_lightning as pl
from pathlib import Path
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from depthcb import DepthProfile, EqualStep, UpdateRatioMonitor
from depthcb.callbacks.step_events import refuse_sharding
from depthcb.run import read_runs
from types import SimpleNamespace

class Lit(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)])
    def forward(self, x): return self.net(x)
    def training_step(self, batch, i): return (self(batch[0]) - 1).square().mean()
    def validation_step(self, batch, i): self.log("val/loss", (self(batch[0]) - 1).square().mean())
    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), 0.5)

data = DataLoader(TensorDataset(torch.randn(64, 8)), batch_size=16)
out = Path(sys.argv[1])
watch = DepthProfile()
def fit(**options):
    callbacks = [EqualStep(), UpdateRatioMonitor(), watch]
    trainer = pl.Trainer(callbacks=callbacks, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
                         log_every_n_steps=1, default_root_dir=out, **options)
    trainer.fit(Lit(), data, data)

fit(fast_dev_run=2)
assert list(out.iterdir()) == [], list(out.iterdir())
watch.reset()
logger = pl.loggers.TensorBoardLogger(out)
fit(max_epochs=2, logger=logger)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(logger.log_dir)
events.Reload()
assert set(events.Tags()["images"]) == {"depth/heatmap", "depth/curves"}
(run,) = read_runs(out)
assert run.profiles == watch.profiles_by_measure and len(watch.profiles) == 2
try:
    refuse_sharding(EqualStep(), SimpleNamespace(strategy=pl.strategies.FSDPStrategy()))
except ValueError as error:
    assert "does not support FSDPStrategy" in str(error)
else:
    raise AssertionError("FSDP1 was accepted")
"""


@pytest.mark.slow
def test_everything_works_with_pytorch_lightning(tmp_path: Path) -> None:
    assert lightning.pytorch.Trainer.__module__.startswith("lightning.pytorch")
    command = [sys.executable, "-W", "ignore", "-c", FIT, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
