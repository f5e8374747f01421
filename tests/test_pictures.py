"""The committed picture is what its committed data give, number by number and pixel by pixel."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from packaging.version import Version
from pictures import DATA, PICTURE, draw, kept
from PIL import Image
from runs import changed, make_runs

from depthcb import report
from depthcb.run import Run


def test_the_numbers_are_written_again_from_its_data(tmp_path: Path) -> None:
    beside = draw(DATA, tmp_path / PICTURE.name)
    assert beside.read_text(encoding="utf-8") == PICTURE.with_suffix(".csv").read_text(encoding="utf-8")


@pytest.mark.skipif(
    Version(matplotlib.__version__) < Version("3.11"), reason="its letters have other widths before 3.11"
)
def test_the_picture_is_drawn_again_from_its_data(tmp_path: Path) -> None:
    draw(DATA, tmp_path / PICTURE.name)
    drawn, committed = (np.asarray(Image.open(p).convert("RGB"), float) for p in (tmp_path / PICTURE.name, PICTURE))
    assert drawn.shape == committed.shape
    differs = np.abs(drawn - committed).max(axis=2) > 32
    assert differs.mean() < 0.01, "other versions of matplotlib may move a letter's edge"
    assert (committed.min(axis=2) < 128).mean() > 0.005, "it is not empty"
    assert PICTURE.stat().st_size < 150_000


def test_the_data_are_those_of_the_demos_runs() -> None:
    runs = [Run.from_dict(fields) for fields in json.loads(DATA.read_text(encoding="utf-8"))]
    assert [run.name for run in runs] == ["sgd-equal-step", "sgd-standard"]
    assert all(run.finished and not run.unpaired for run in runs)
    assert {len(run.matched_null["cka"]) for run in runs} == {8}


def test_nothing_that_is_drawn_is_left_out(tmp_path: Path) -> None:
    def matched(record: dict[str, Any]) -> None:
        record["callback"] = "matched_null_profiles"

    runs = [changed(run, "null_profiles", matched) for run in make_runs(6, (8, 8), arms=2)]
    runs = [dataclasses.replace(run, name=f"demo/{run.name}") for run in runs]
    full, lean = (
        report.write_figure(given, "pair", tmp_path / f"{name}.png")
        for name, given in (("full", runs), ("lean", [kept(run) for run in runs]))
    )
    assert full.read_text() == lean.read_text()
