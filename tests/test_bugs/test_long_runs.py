"""Pages of long runs had hundreds of megabytes, and every checkpoint serialised all profiles so far again."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from runs import make_profile, make_run

from depthcb import DepthProfile, report
from depthcb.run import FOLDER, read_runs, write_header, write_row


def long_run(folder: Path, rows: int, validations: int) -> None:
    run = make_run(0, "SGD", "standard", 6, 1)
    depth, names = run.records["depth"], run.layers
    write_header(folder, "depth", depth.callback, 0, depth.settings, depth.fit)
    row = json.loads(json.dumps(depth.rows[0]))
    for step in range(validations):
        profiles = {m: p | {"step": step, "half_relative_slopes": None} for m, p in row["profiles"].items()}
        write_row(folder, "depth", {**row, "step": step, "profiles": profiles})
    write_header(folder, "update_ratio", "UpdateRatioMonitor", 0, {"layers": names})
    rng = np.random.default_rng(0)
    with open(folder / FOLDER / "update_ratio.jsonl", "a", encoding="utf-8") as file:
        for step, ratios in enumerate(rng.random((rows, len(names))).tolist()):
            file.write(json.dumps({"step": step} | {f"update_ratio/L{i:02d}": r for i, r in enumerate(ratios)}) + "\n")


@pytest.mark.parametrize(
    ("rows", "validations"), [(5_000, 1_000), pytest.param(100_000, 10_000, marks=pytest.mark.slow)]
)
def test_the_page_of_a_long_run_is_thinned_and_says_so(rows: int, validations: int, tmp_path: Path) -> None:
    long_run(tmp_path, rows, validations)
    runs = read_runs(tmp_path)
    report.write_html(runs, tmp_path / "a.html")
    assert (tmp_path / "a.html").stat().st_size < 10_000_000
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert f"the slider has 100 of {validations:,} validations" in page
    assert f"Thinned evenly: 300 of {rows:,} logged steps." in page
    assert (f"evenly spaced rows of each record, of up to {rows:,}." in page) == (rows > 10_000)
    (kept,) = report.read_html(tmp_path / "a.html")
    steps = kept.step_ratio.steps
    assert (steps[0], steps[-1]) == (0, rows - 1)
    assert len(steps) == rows if rows < 10_000 else len(steps) <= 10_000
    assert kept.profiles["cka"][-1] == runs[0].profiles["cka"][-1]


def test_checkpoints_serialise_each_profile_once() -> None:
    watch, rng = DepthProfile(), np.random.default_rng(0)
    for measure, profiles in watch.profiles_by_measure.items():
        profiles.extend(make_profile(rng, [f"h.{i}" for i in range(12)], measure, 0.1, step) for step in range(300))
    times = []
    for _ in range(2):
        start = time.process_time()
        state = watch.state_dict()
        times.append(time.process_time() - start)
    assert times[1] < times[0] / 10
    again = DepthProfile()
    again.load_state_dict(state | {"reference": None})
    assert again.profiles_by_measure == watch.profiles_by_measure
