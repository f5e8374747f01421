"""The demo as a user runs it: real weights, real text, four real fits, offline W&B runs, and an interrupt."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from depthcb import Profile
from depthcb.report import read_summary
from recipes.demo import QUICK, Settings, run_demo

ARMS = ["adamw-standard", "adamw-equal-step", "sgd-standard", "sgd-equal-step"]


def wandb_run(folder: Path) -> dict[str, Any]:
    """Config and summary of the offline run in a folder, read by W&B's own tool."""
    (path,) = folder.glob("wandb/offline-run-*")
    wandb = Path(sys.executable).with_name("wandb")
    command = [str(wandb), "leet", "inspect", "--json", "--summary", str(path)]
    run: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return run


def check_outcome(out: Path, settings: Settings) -> dict[str, Any]:
    """Everything that a finished demo must have left."""
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert [arm["name"] for arm in summary["arms"]] == ARMS
    assert all(arm["finished"] for arm in summary["arms"])
    validations = settings.steps // settings.validate_every
    layers = len(summary["layers"])
    for arm in summary["arms"]:
        for measure in ("cka", "cka_normalized"):
            profiles = [Profile.from_dict(p) for p in arm["profiles"][measure]]
            assert len(profiles) == validations
            assert profiles[-1].step == settings.steps - 1
            assert min(profiles[-1].change) > 0
            assert profiles[-1].slope_interval is not None
            assert len(arm["null"][measure]) == settings.null_seeds
        ratios = np.array(arm["step_ratio"])
        assert ratios.shape == (layers,)
        if arm["control"] == "equal_step":
            assert ratios.max() / ratios.min() < 1 + 1e-3
        assert len(arm["val_loss"]) == validations
        assert 0 < arm["probe_seconds"] < arm["seconds"]
        with open(out / arm["run_dir"] / "metrics.csv", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["depth/cka/slope"]]
        assert [float(row["depth/cka/slope"]) for row in rows] == pytest.approx(
            [p["slope"] for p in arm["profiles"]["cka"]], rel=1e-5
        )
        run = wandb_run(out / arm["run_dir"])
        assert run["summary"]["depth/cka/slope"] == pytest.approx(arm["profiles"]["cka"][-1]["slope"], rel=1e-5)
        assert run["config"]["control"] == arm["control"]
    assert [v["optimizer"] for v in summary["verdicts"]] == ["adamw", "sgd"]
    for verdict in summary["verdicts"]:
        assert verdict["verdict"] in ("none", "collapses", "reverses", "weakens", "persists")
        assert verdict["spread"] > 1
        assert all(math.isfinite(s) for s in verdict["null_relative_slope"].values())
    with Image.open(out / "profiles.png") as picture:
        assert min(picture.size) > 500
    assert read_summary(out / "report.html") == summary
    return summary


@pytest.mark.filterwarnings("ignore:.*fewer than 5 directions.*")
def test_a_short_quick_demo(tmp_path: Path) -> None:
    settings = dataclasses.replace(QUICK, steps=4, validate_every=2, probe_rows=16, probe_length=32, val_blocks=8)
    with open(tmp_path / "screen.txt", "w", encoding="utf-8") as screen:
        run_demo(settings, tmp_path / "out", Console(file=screen, width=80))
    summary = check_outcome(tmp_path / "out", settings)
    assert "SmolLM2" not in summary["backbone"]
    text = (tmp_path / "screen.txt").read_text(encoding="utf-8")
    for verdict in summary["verdicts"]:
        assert verdict["verdict"] in text
        assert f"{verdict['spread']:.3g}x" in text
    for file in ("profiles.png", "report.html", "summary.json", "wandb sync"):
        assert file in text
    # A demo that cannot start leaves the earlier one as it is, and a folder with something else is left alone.
    with pytest.raises(ValueError, match="no-such-model"):
        run_demo(dataclasses.replace(settings, backbone="./no-such-model"), tmp_path / "out", Console(quiet=True))
    assert check_outcome(tmp_path / "out", settings) == summary
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("keep me")
    with pytest.raises(ValueError, match="holds no earlier demo: choose another"):
        run_demo(settings, tmp_path / "mine", Console(quiet=True))
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "keep me"


def test_an_interrupted_demo_leaves_what_it_measured(tmp_path: Path) -> None:
    """Ctrl-C in the second arm: the first arm's profiles, picture and page are there."""
    out = tmp_path / "out"
    # A background job of a shell starts with Ctrl-C ignored.
    handle = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    script = f"{handle}; from depthcb.cli import main; import sys; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", script, "demo", "--quick", "--steps", "6", "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as demo:
        deadline = time.monotonic() + 300
        while not (out / ARMS[1] / "metrics.csv").exists():
            assert demo.poll() is None, demo.stdout and demo.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        demo.send_signal(signal.SIGINT)
        text, _ = demo.communicate(timeout=120)
    assert demo.returncode == 130, text
    assert "Interrupted: what was measured so far follows." in text
    assert "Traceback" not in text
    summary = read_summary(out / "report.html")
    assert summary == json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert [arm["finished"] for arm in summary["arms"]] == [True, False]
    assert min(summary["arms"][0]["profiles"]["cka"][-1]["change"]) > 0
    assert summary["verdicts"] == []
    assert (out / "profiles.png").stat().st_size > 10_000


@pytest.mark.parametrize(("steps", "every"), [(0, 1), (4, 5), (4, 0)])
def test_settings_that_cannot_be_run_are_refused(tmp_path: Path, steps: int, every: int) -> None:
    settings = dataclasses.replace(QUICK, steps=steps, validate_every=every)
    with pytest.raises(ValueError, match="at least one step and one validation"):
        run_demo(settings, tmp_path / "out", Console(quiet=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_demo(tmp_path: Path) -> None:
    """In a process of its own, as a user runs it, with all cores."""
    command = [str(Path(sys.executable).with_name("depthcb")), "demo", "--out", str(tmp_path / "out")]
    subprocess.run(command, check=True)
    summary = check_outcome(tmp_path / "out", Settings())
    assert len(summary["layers"]) == 30
    spreads = {v["optimizer"]: v["spread"] for v in summary["verdicts"]}
    assert spreads["sgd"] > 2 > spreads["adamw"], "with SGD the control bites, with AdamW it has little to do"
    probing = sum(arm["probe_seconds"] + arm["null_seconds"] for arm in summary["arms"])
    assert probing < sum(arm["seconds"] + arm["null_seconds"] for arm in summary["arms"]) / 4
    for arm in summary["arms"]:
        losses = [loss for _, loss in arm["val_loss"]]
        assert losses[-1] < losses[0], "a fit that does not learn says nothing about fine-tuning"
