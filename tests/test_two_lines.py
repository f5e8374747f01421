"""README's two lines, ``[DepthProfile()]`` and ``[EqualStep(), DepthProfile()]``, lead to what it promises."""

from __future__ import annotations

import html
import itertools
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from support import TinyLM, loaders

from depthcb import DepthProfile, EqualStep
from depthcb.report.groups import groups
from depthcb.run import read_runs


def report_on(folder: Path, *, seeds: Sequence[int | None] = (0,), log_every_n_steps: int = 1, **options: Any) -> str:
    """Trains both runs with the Trainer's own logger, and returns the text of the page that the command writes."""
    for seed, control in itertools.product(seeds, (False, True)):
        if seed is not None:
            pl.seed_everything(seed, verbose=False)
        trainer = pl.Trainer(
            callbacks=[*([EqualStep()] if control else []), DepthProfile(**options)],
            max_steps=6,
            log_every_n_steps=log_every_n_steps,
            default_root_dir=folder,
            accelerator="cpu",
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(TinyLM(), *loaders())
    command = [sys.executable, "-m", "depthcb", "report", "lightning_logs"]
    subprocess.run(command, cwd=folder, check=True)
    return html.unescape((folder / "depthcb-report.html").read_text(encoding="utf-8"))


def test_two_runs_lead_to_two_profiles_and_the_paired_interval(tmp_path: Path) -> None:
    page = report_on(tmp_path)
    (pair,) = groups(read_runs(tmp_path))
    assert [len(run.profiles["cka"][-1].change) for run in pair.runs] == [4, 4]
    assert pair.comparison is not None
    assert f"equal-step minus standard relative slope {pair.comparison.difference}" in page
    assert f"the control removed a step-ratio spread of {pair.spread:.3g}x" in page
    assert "a word takes at least 4 seeds" in page
    assert "standard: no step ratios<br>add UpdateRatioMonitor() to the callbacks" in page.replace(
        "\\u003c", "<"
    ).replace("\\u003e", ">")
    assert (
        "null of standard: not measured: DepthProfile(pretrained='cpu') measures it, with a copy of the weights" in page
    )
    assert "In plain words: " in page


def test_one_argument_gives_the_null_too(tmp_path: Path) -> None:
    page = report_on(tmp_path, pretrained="cpu")
    assert "null of standard: relative slope " in page
    assert "at the same size of change" in page
    assert "Shape of the latest profile, with the null" in page
    assert "of the standard slope on average" in page or "can't be told from 0" in page


def test_four_seeds_of_the_two_lines_have_a_verdict(tmp_path: Path) -> None:
    page = report_on(tmp_path, seeds=range(4))
    assert "AdamW, 4 pairs (seeds 0, 1, 2, 3): persists" in page, "steps of AdamW are nearly equal anyway"
    assert "the control removed step-ratio spreads of 1.0" in page


def test_what_a_short_fit_does_not_log_is_named(tmp_path: Path) -> None:
    page = report_on(tmp_path, log_every_n_steps=50)
    assert "the spread that the control removed is not known: lower the Trainer's log_every_n_steps" in page
    assert "equal-step minus standard relative slope " in page


def test_without_a_seed_the_report_says_which_line_to_add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    page = report_on(tmp_path, seeds=[None])
    for version in (0, 1):
        line = "no seed: add pl.seed_everything(0) before the model is built"
        assert f"version_{version} is not paired: {line}" in page


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*plain CKA sees fewer than 5 directions.*")
def test_a_small_probe_is_named(tmp_path: Path) -> None:
    page = report_on(tmp_path, probe_rows=6)
    assert "no comparison (standard has no interval: it takes a probe of at least 8 different examples; " in page
