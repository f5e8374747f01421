"""Records, checkpoints and study folders of depthcb 0.1 are read, or refused with a sentence."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from depthcb import DepthProfile, UpdateRatioMonitor
from depthcb.report import read_html, write_html
from depthcb.report.groups import context, groups
from depthcb.run import read_runs
from depthcb_recipes.studies.grid import VERSION
from depthcb_recipes.studies.result import read_result

FILES = Path(__file__).parents[1] / "fixtures" / "version_0_1"
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*not empty", "ignore:Be aware", "ignore:.*fewer than", "ignore:.*only 8"
)


class Net(pl.LightningModule):
    """The module of the checkpoints."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)])
        self.head = nn.Linear(4, 1)
        self.lr = lr

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.body(x))
        return found

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", self(batch[0]).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


@pytest.mark.parametrize("state", ["first", "last"])
def test_records_are_read_and_not_paired(state: str, tmp_path: Path) -> None:
    equal, standard = runs = read_runs(FILES / state)
    assert (equal.control, standard.control) == ("equal-step", "standard")
    for run in runs:
        assert [p.step for p in run.profiles["cka"]] == [1, 3]
        assert run.step_ratio.steps == (0, 1, 2, 3)
        assert run.finished
    (group,) = groups(runs)
    assert not group.paired
    assert "its initial weights are not known (recorded, or begun, by depthcb 0.1)" in context(group)[0]
    write_html(runs, tmp_path / "a.html")
    assert read_html(tmp_path / "a.html") == runs


def resume(state: str, folder: Path) -> DepthProfile:
    pl.seed_everything(0, verbose=False)
    x = TensorDataset(torch.randn(16, 4, generator=torch.Generator().manual_seed(0)))
    watch = DepthProfile(probe_rows=8)
    trainer = pl.Trainer(
        max_steps=8, val_check_interval=2, check_val_every_n_epoch=None, log_every_n_steps=1, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=0,
        logger=CSVLogger(folder, name="", version=""), callbacks=[UpdateRatioMonitor(), watch],
    )  # fmt: skip
    checkpoint = FILES / state / "standard" / "last.ckpt"
    trainer.fit(Net(), DataLoader(x, 4), DataLoader(x, 8), ckpt_path=checkpoint, weights_only=True)
    return watch


@pytest.mark.filterwarnings("ignore:.*not resumable")
def test_a_checkpoint_of_the_last_state_is_resumed(tmp_path: Path) -> None:
    watch = resume("last", tmp_path)
    (old,) = read_runs(FILES / "last" / "standard")
    assert watch.profiles[:2] == old.profiles["cka"]
    (run,) = read_runs(tmp_path)
    assert run.profiles == watch.profiles_by_measure
    assert run.mixed == "what came before step 4 is not known"


@pytest.mark.filterwarnings("ignore:.*not resumable")
def test_a_checkpoint_of_the_first_state_is_refused(tmp_path: Path) -> None:
    """Its probe was the first items of the validation data; today's is a sample."""
    with pytest.raises(ValueError, match="its reference was recorded on another probe"):
        resume("first", tmp_path)


@pytest.mark.parametrize(("state", "version"), [("study-first", 1), ("study-last", 3)])
def test_results_of_studies_are_read(state: str, version: int) -> None:
    results = [read_result(folder) for folder in sorted((FILES / state / "runs").iterdir())]
    assert VERSION == 3
    for result in results:
        assert result is not None
        assert result.version == version
        assert result.figures is not None
        assert len(result.figures.profiles["cka"]["change"]) == 6
    assert sorted(r.config.control for r in results if r) == ["equal-step", "standard"]
