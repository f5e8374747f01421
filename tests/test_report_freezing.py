"""What a report says of frozen layers: real fits with and without FreezeByChange, their losses computed again by hand."""

from __future__ import annotations

import re
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from runs import make_run
from scipy import stats
from support import TinyLM, loaders

from depthcb import DepthProfile, FreezeByChange
from depthcb.report import write_html
from depthcb.report.freezing import OF_ONE_SEED, freezing_lines, frozen_runs
from depthcb.run import Run, read_runs

TITLE = "Layers frozen during the fit"
SEEDS = (3, 4)


def train(folder: Path, seed: int, freezing: bool, lr: float = 1e-3) -> float:
    """Trains, and returns the validation loss of the weights that came out."""
    pl.seed_everything(seed, verbose=False)
    module, (batches, held_out) = TinyLM(lambda p: torch.optim.AdamW(p, lr=lr)), loaders()
    callbacks = [DepthProfile(), *([FreezeByChange(below=0.4)] if freezing else [])]
    trainer = pl.Trainer(
        max_epochs=5, accelerator="cpu", callbacks=callbacks, num_sanity_val_steps=0, log_every_n_steps=1,
        logger=CSVLogger(folder, name="freezing" if freezing else "usual", version=f"{seed}-{lr}"),
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, batches, held_out)
    module.eval()
    with torch.no_grad():
        return float(torch.stack([module.loss(batch) for batch in held_out]).mean())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[int, bool], float]]:
    folder = tmp_path_factory.mktemp("fits")
    return folder, {(seed, freezing): train(folder, seed, freezing) for seed in SEEDS for freezing in (True, False)}


def named(runs: list[Run], start: str) -> list[Run]:
    return [run for run in runs if run.name.startswith(start)]


def test_each_run_is_compared_with_the_one_that_differs_in_nothing_else(
    trained: tuple[Path, dict[tuple[int, bool], float]], tmp_path: Path
) -> None:
    folder, losses = trained
    runs = read_runs(folder)
    first, second, over = freezing_lines(runs)
    for line, seed in ((first, SEEDS[0]), (second, SEEDS[1])):
        own, usual = losses[seed, True], losses[seed, False]
        assert own != usual
        numbers = re.search(r"validation loss ([\d.]+), and ([\d.]+) without freezing \((\S+)\): ([+-][\d.]+);", line)
        assert numbers, line
        assert [float(numbers[i]) for i in (1, 2, 4)] == pytest.approx([own, usual, own - usual], abs=6e-5)
        assert numbers[3] == f"usual/{seed}-0.001"
        assert line.endswith(f"({OF_ONE_SEED})")
        (run,) = named(runs, f"freezing/{seed}")
        seconds = [r.record("DepthProfile").end["seconds"] for r in (run, *named(runs, f"usual/{seed}"))]  # type: ignore[union-attr,index]
        assert "the fits took {:.1f} s and {:.1f} s".format(*seconds) in line
        assert line.startswith(f"{run.name} froze {len(run.records['freeze'].end['frozen'])} of 4 layers")  # type: ignore[index]
    differences = [losses[seed, True] - losses[seed, False] for seed in SEEDS]
    reference = stats.ttest_1samp(differences, 0).confidence_interval()
    mean, low, high = (float(n) for n in re.findall(r"without: (\S+) \[(\S+), (\S+)\]", over)[0])
    assert (low, high) == pytest.approx((reference.low, reference.high), rel=6e-3)
    assert mean == pytest.approx(sum(differences) / 2, rel=6e-3)
    assert over.startswith("over 2 seeds")
    write_html(runs, tmp_path / "a.html")
    assert TITLE in (tmp_path / "a.html").read_text(encoding="utf-8")


def test_another_seed_or_another_learning_rate_is_no_twin(
    trained: tuple[Path, dict[tuple[int, bool], float]], tmp_path: Path
) -> None:
    runs = read_runs(trained[0])
    (own,) = named(runs, "freezing/3")
    assert frozen_runs([own, *named(runs, "usual/4")])[0].twin is None
    assert frozen_runs([own, *named(runs, "freezing/4")])[0].twin is None
    train(tmp_path, SEEDS[0], freezing=False, lr=2e-3)
    (line,) = freezing_lines([own, *read_runs(tmp_path)])
    assert line.endswith("not known: no run here differs from it in FreezeByChange alone")
    assert "validation loss" not in line


def test_runs_that_freeze_nothing_have_no_such_section(tmp_path: Path) -> None:
    runs = [make_run(0, "SGD", control, 6, 4) for control in ("standard", "equal-step")]
    assert freezing_lines(runs) == []
    write_html(runs, tmp_path / "a.html")
    assert TITLE not in (tmp_path / "a.html").read_text(encoding="utf-8")
