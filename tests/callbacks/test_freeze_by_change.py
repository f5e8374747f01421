"""FreezeByChange: what has stopped moving is frozen, nothing else changes, and a resumed run is the same run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from suite import assert_same
from support import Rows, TinyLM, fit, run_script, seeded, texts
from torch.utils.data import DataLoader

from depthcb import DepthProfile, EqualStep, FreezeByChange, LayerStack, UpdateRatioMonitor
from depthcb.report.groups import groups
from depthcb.run import read_runs

OPTIMIZERS: dict[str, Any] = {
    "AdamW with decay": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.5),
    "one by one": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.5, foreach=False),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "Adam with L2": lambda p: torch.optim.Adam(p, lr=1e-3, weight_decay=0.1, amsgrad=True),
    "two groups": lambda p: torch.optim.AdamW([{"params": p[:20]}, {"params": p[20:], "weight_decay": 0.3}], lr=1e-3),
}  # fmt: skip


def ordered() -> tuple[DataLoader[Any], DataLoader[Any]]:
    """The same batches in the same order, so that a resumed run can be the same run."""
    return DataLoader(texts(), batch_size=8), DataLoader(texts(16, seed=1), batch_size=8)


class Watched(pl.Callback):
    """Copies of all parameters at the start of each epoch."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.weights.append({n: p.detach().clone() for n, p in pl_module.named_parameters()})


def frozen_fit(optimizer: Any = OPTIMIZERS["AdamW with decay"], below: float = 0.4, **options: Any) -> Any:
    module = seeded(lambda: TinyLM(optimizer))
    watch, freeze, weights = DepthProfile(), FreezeByChange(below=below), Watched()
    callbacks = [weights, *options.pop("before", []), watch, freeze, *options.pop("after", [])]
    options = {"max_steps": -1, "max_epochs": 6} | options
    trainer = fit(module, callbacks, ordered(), **options)
    return trainer, module, watch, freeze, weights


def expected(watch: DepthProfile, below: float, layers: int = 4) -> dict[int, int]:
    """The step at which each layer is to be frozen, by the profiles."""
    change = np.array([p.change for p in watch.profiles])
    found: dict[int, int] = {}
    for i in range(1, len(change)):
        moved = np.abs(change[i] - change[i - 1]) / change[i]
        training = [k for k in range(layers) if k not in found]
        chosen = [k for k in training if moved[k] < below]
        if len(chosen) == len(training):
            chosen.remove(max(training, key=lambda k: moved[k]))
        found |= dict.fromkeys(chosen, watch.profiles[i].step)
    return found


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_layers_that_stopped_moving_are_frozen_and_no_optimizer_moves_them(name: str) -> None:
    _, module, watch, freeze, weights = frozen_fit(OPTIMIZERS[name])
    stack = LayerStack.find(module)
    due = expected(watch, 0.4)
    assert due, "the test has something to freeze"
    assert freeze.frozen == {stack.names[i]: step for i, step in due.items()}
    for epoch, (before, after) in enumerate(zip(weights.weights, weights.weights[1:], strict=False)):
        for i, layer in enumerate(stack.names):
            still = i in due and due[i] < 4 * epoch  # a check at step 3 holds from epoch 1 on
            for key in (key for key in before if key.startswith(f"{layer}.") and before[key].dim() > 1):
                assert torch.equal(before[key], after[key]) == still, (layer, epoch)
    assert all(p.requires_grad for p in module.parameters()), "as it was before the fit"
    assert 0 < len(due) < 4


def test_it_does_nothing_where_all_layers_move() -> None:
    trainer, *_ = frozen_fit(below=1e-9)
    assert_same(
        trainer, fit(seeded(lambda: TinyLM(OPTIMIZERS["AdamW with decay"])), [], ordered(), max_steps=-1, max_epochs=6)
    )


def test_one_layer_always_trains() -> None:
    *_, freeze, _ = frozen_fit(below=1e9)
    assert len(freeze.frozen) == 3


def test_every_counts_measurements() -> None:
    module = seeded(lambda: TinyLM(OPTIMIZERS["AdamW with decay"]))
    watch, freeze, rows = DepthProfile(every_n_validations=2), FreezeByChange(every=2, below=1e9), Rows()
    fit(module, [watch, freeze], ordered(), max_steps=-1, max_epochs=9, logger=rows)
    assert [p.step for p in watch.profiles] == [7, 15, 23, 31]
    assert set(freeze.frozen.values()) == {31}, "the second check is the first that has something to compare with"
    assert [row["freeze/layers"] for row in rows.rows if "freeze/layers" in row] == [0.0] * 7 + [3.0] * 2


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("epoch", [0, 1, 2, 4])
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(epoch: int, tmp_path: Path) -> None:
    class NoDropout(TinyLM):
        def on_train_start(self) -> None:
            self.model.eval()

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.model.eval()

    def run(folder: Path, **options: Any) -> tuple[pl.Trainer, FreezeByChange, DepthProfile]:
        module = seeded(lambda: NoDropout(OPTIMIZERS["AdamW with decay"]))
        watch, freeze = DepthProfile(), FreezeByChange(below=0.4)
        saved = ModelCheckpoint(folder / "saved", "{epoch}", monitor="val/loss", save_top_k=-1)
        trainer = pl.Trainer(
            max_epochs=6, accelerator="cpu", callbacks=[watch, freeze, saved], logger=CSVLogger(folder, "log", "v"),
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, log_every_n_steps=1,
        )  # fmt: skip
        trainer.fit(module, *ordered(), **options)
        return trainer, freeze, watch

    whole, freeze, watch = run(tmp_path / "whole")
    assert freeze.frozen
    resumed, again, other = run(tmp_path / "resumed", ckpt_path=tmp_path / "whole" / "saved" / f"epoch={epoch}.ckpt")
    assert_same(whole, resumed)
    assert again.frozen == freeze.frozen
    assert [p.change for p in other.profiles] == [p.change for p in watch.profiles]
    (record,) = (r for r in read_runs(tmp_path / "resumed")[0].records.values() if r.callback == "FreezeByChange")
    rows = {row["step"]: dict(row) for row in read_runs(tmp_path / "whole")[0].records["freeze"].rows}
    assert [dict(row) for row in record.rows] == [rows[step] for step in sorted(rows) if step >= 4 * (epoch + 1)]


def test_the_record_says_what_moved_and_what_was_frozen_when(tmp_path: Path) -> None:
    *_, watch, freeze, _ = frozen_fit(logger=CSVLogger(tmp_path))
    (run,) = read_runs(tmp_path)
    record = run.records["freeze"]
    for i, row in enumerate(record.rows, start=1):
        a, b = (np.array(watch.profiles[k].change) for k in (i - 1, i))
        assert row["moved"] == pytest.approx(np.abs(b - a) / b)
        assert row["froze"] == [name for name, step in freeze.frozen.items() if step == row["step"]]
    assert record.end is not None
    assert record.end["frozen"] == freeze.frozen
    assert record.end["saved_seconds"] == pytest.approx(freeze.saved_seconds)
    batches = sum(count for count, _ in freeze.times.values())
    assert batches == 24 - 1 - len({step for step in freeze.frozen.values() if step < 23}), "without the first of each"


def test_a_frozen_run_is_no_twin_of_a_run_without(tmp_path: Path) -> None:
    for name, more in {"frozen": [FreezeByChange()], "equal": [], "standard": []}.items():
        control = [EqualStep()] if name == "equal" else []
        callbacks = [*control, UpdateRatioMonitor(name="ratios"), DepthProfile(), *more]
        fit(seeded(TinyLM), callbacks, ordered(), logger=CSVLogger(tmp_path, name))
    runs = {run.name.partition("/")[0]: run for run in read_runs(tmp_path)}
    assert [group.paired for group in groups([runs["frozen"], runs["equal"]])] == [False]
    assert groups([runs["frozen"], runs["equal"], runs["standard"]])[0].runs == (runs["standard"], runs["equal"])


def test_equal_steps_of_the_layers_that_train() -> None:
    *_, watch, freeze, _ = frozen_fit(before=[EqualStep()])
    assert freeze.frozen
    assert len(watch.profiles) == 6


@pytest.mark.filterwarnings("ignore:.*plain CKA sees fewer.*")
def test_a_refit_starts_with_no_layer_frozen() -> None:
    _, module, watch, freeze, _ = frozen_fit()
    before = dict(freeze.frozen)
    watch.reset()
    fit(module, [watch, freeze], ordered(), max_steps=4)
    assert before
    assert not freeze.frozen


class Breaks(pl.Callback):
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 4:
            raise RuntimeError("on purpose")


def test_after_an_error_all_parameters_train_again() -> None:
    module = seeded(TinyLM)
    freeze = FreezeByChange(below=1e9)
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(module, [DepthProfile(), freeze, Breaks()], ordered(), max_steps=-1, max_epochs=6)
    assert freeze.frozen
    assert all(p.requires_grad for p in module.parameters())


def test_parameters_that_were_frozen_before_stay_so() -> None:
    module = seeded(TinyLM)
    layer = LayerStack.find(module).modules[1].requires_grad_(False)
    before = copy.deepcopy(layer.state_dict())
    freeze = FreezeByChange(below=1e9)
    fit(module, [DepthProfile(), freeze], ordered(), max_steps=-1, max_epochs=3)
    assert len(freeze.frozen) == 2, "one of the three that train is left"
    assert not any(p.requires_grad for p in layer.parameters())
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


def test_what_cannot_work_is_refused_before_the_first_step() -> None:
    for arguments in ({"every": 0}, {"below": 0.0}, {"below": float("nan")}, {"below": float("inf")}):
        with pytest.raises(ValueError, match="FreezeByChange"):
            FreezeByChange(**arguments)  # type: ignore[arg-type]
    for callbacks in ([FreezeByChange()], [FreezeByChange(), DepthProfile()]):
        with pytest.raises(ValueError, match="put one before it"):
            fit(seeded(TinyLM), callbacks, ordered())
    with pytest.raises(ValueError, match="LBFGS"):
        fit(seeded(lambda: TinyLM(torch.optim.LBFGS)), [DepthProfile(), FreezeByChange()], ordered())
    freeze = FreezeByChange()
    trainer = pl.Trainer(callbacks=[DepthProfile(), freeze], strategy="ddp", devices=1, accelerator="cpu", logger=False)
    with pytest.raises(ValueError, match="ddp_find_unused_parameters_true"):
        freeze.setup(trainer, seeded(TinyLM), "fit")
    damaged = FreezeByChange()
    with pytest.raises(ValueError, match="FreezeByChange 'freeze'"):
        damaged.load_state_dict({"frozen": {}})


@pytest.mark.slow
def test_two_processes_freeze_the_same_layers_as_one(tmp_path: Path) -> None:
    done = [run_script("callbacks/freeze_fit.py", tmp_path / str(world), world) for world in (1, 2)]
    assert [d.returncode for d in done] == [0, 0], done[1].stderr
    one, first, second = (torch.load(tmp_path / name) for name in ("1.0", "2.0", "2.1"))
    assert one["frozen"] == first["frozen"] == second["frozen"]
    assert one["frozen"]
    for key, tensor in first["weights"].items():
        assert torch.equal(tensor, second["weights"][key])
        torch.testing.assert_close(tensor, one["weights"][key], rtol=1e-4, atol=1e-5)
