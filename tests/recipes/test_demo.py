"""The demo as a user runs it: real weights, real text, four real fits, offline W&B runs, and an interrupt."""

from __future__ import annotations

import csv
import dataclasses
import gc
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from offline import summary as summary_of
from PIL import Image
from rich.console import Console

from depthcb.cli import main
from depthcb.report import read_html
from depthcb.report.groups import groups
from depthcb.run import Run, read_runs
from depthcb_recipes.demo import demo
from depthcb_recipes.demo import plan as demo_plan
from depthcb_recipes.demo.demo import arms, run_demo
from depthcb_recipes.demo.sizes import QUICK, Settings, chosen
from depthcb_recipes.fit import PrecisionTrainer
from depthcb_recipes.machine import release_memory
from depthcb_recipes.studies.result import read_result

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Lightning's own use of jsonargparse
ARMS = ["sgd-standard", "sgd-equal-step"]  # of the smaller backbone


def settings_of(summary: dict[str, Any]) -> Settings:
    fields = summary["settings"]
    return Settings(**fields | {"optimizers": tuple(fields["optimizers"])})


def check_outcome(out: Path, settings: Settings) -> list[Run]:
    """Checks all outputs of a finished demo."""
    runs = {run.name: run for run in read_runs(out)}
    names = list(arms(settings))
    assert sorted(runs) == sorted(names)
    assert all(run.finished for run in runs.values())
    validations = settings.steps // settings.validate_every
    for name, run in runs.items():
        for measure in ("cka", "cka_normalized"):
            profiles = run.profiles[measure]
            assert len(profiles) == validations
            assert profiles[-1].step == settings.steps - 1
            assert min(profiles[-1].change) > 0
            assert profiles[-1].slope_interval is not None
            assert len(run.null[measure]) == settings.null_seeds
            assert len(run.matched_null[measure]) == settings.null_seeds
        assert len(run.step_ratio.mean) == len(run.layers)
        assert len(run.step_ratio.steps) == settings.steps
        if run.control == "equal-step":
            assert run.step_ratio.spread < 1 + 1e-3
        assert len(run.validation_loss) == validations
        end = run.records["depth"].end
        assert 0 < end["probe_seconds"] < end["seconds"]
        with open(out / name / "metrics.csv", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["depth/cka/slope"]]
        assert [float(row["depth/cka/slope"]) for row in rows] == pytest.approx(
            [p.slope for p in run.profiles["cka"]], rel=1e-5
        )
        (offline,) = (out / name).glob("wandb/offline-run-*")
        logged = summary_of(offline)
        assert logged["summary"]["depth/cka/slope"] == pytest.approx(run.profiles["cka"][-1].slope, rel=1e-5)
        assert logged["config"]["depthcb_control"] == run.control == name.partition("-")[2].partition("-seed")[0]
    results = [read_result(out / name) for name in names]
    for standard, equal in ((a.figures, b.figures) for a, b in zip(results[::2], results[1::2], strict=True)):
        assert standard.pair == equal.pair
        assert standard.initial_weights == equal.initial_weights
        assert standard.data_order == equal.data_order
    pairs = groups(list(runs.values()))
    assert len(pairs) == len(names) / 2
    assert {group.title.partition(",")[0] for group in pairs} == {
        {"adamw": "AdamW", "sgd": "SGD"}[optimizer] for optimizer in settings.optimizers
    }
    assert all(group.spread > 1 for group in pairs)
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert [Run.from_dict(fields) for fields in summary["runs"]] == list(runs.values())
    assert [pair["difference"]["value"] for pair in summary["pairs"]] == [g.comparison.difference.value for g in pairs]
    assert len(summary["verdicts"]) == (len(settings.optimizers) if settings.seeds > 1 else 0)
    with Image.open(out / "profiles.png") as picture:
        assert min(picture.size) > 500
    assert read_html(out / "report.html") == list(runs.values())
    return list(runs.values())


@pytest.mark.filterwarnings("ignore:.*fewer than 5 directions.*")
def test_a_short_quick_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []

    def release() -> None:
        release_memory()
        left.append(sum(type(thing) in (pl.Trainer, PrecisionTrainer) for thing in gc.get_objects()))

    release()
    monkeypatch.setattr(demo, "release_memory", release)
    settings = dataclasses.replace(
        QUICK, steps=4, validate_every=2, batch_size=4, block_size=32, probe_rows=16, probe_length=32, val_blocks=8
    )
    with open(tmp_path / "screen.txt", "w", encoding="utf-8") as screen:
        run_demo(settings, tmp_path / "out", Console(file=screen, width=80))
    assert left[1:] == left[:1] * len(ARMS), "an arm keeps its Trainer, and with it gigabytes"
    runs = check_outcome(tmp_path / "out", settings)
    text = (tmp_path / "screen.txt").read_text(encoding="utf-8")
    for group in groups(runs):
        assert f"{group.spread:.3g}x" in text
    assert "one pair: this speaks of its probe rows, not of training" in text
    for file in ("profiles.png", "report.html", "summary.json", "wandb sync"):
        assert file in text
    # A demo that cannot start does not touch an earlier one, nor a folder with other contents.
    with pytest.raises(ValueError, match="no-such-model"):
        run_demo(dataclasses.replace(settings, backbone="./no-such-model"), tmp_path / "out", Console(quiet=True))
    assert check_outcome(tmp_path / "out", settings) == runs
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("keep me")
    with pytest.raises(ValueError, match="holds no earlier demo: choose another"):
        run_demo(settings, tmp_path / "mine", Console(quiet=True))
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "keep me"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_what_it_measured(number: signal.Signals, tmp_path: Path) -> None:
    """Ctrl-C or SIGTERM in the second arm: the first arm's profiles, picture and page exist within 5 seconds."""
    out = tmp_path / "out"
    # Background jobs of a shell ignore Ctrl-C.
    handle = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    script = f"{handle}; from depthcb.cli import main; import sys; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", script, "demo", "--sizes", "minilm-4", "--steps", "6", "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        deadline = time.monotonic() + 300
        while not (out / ARMS[1] / "metrics.csv").exists():
            assert process.poll() is None, process.stdout and process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        process.send_signal(number)
        sent = time.monotonic()
        process.wait(timeout=120)
        took = time.monotonic() - sent
        text, _ = process.communicate(timeout=120)  # W&B's process may keep the pipe open a little longer
        assert took < 5, text
    assert process.returncode == 128 + number, text
    assert f"`depthcb report {out}` shows it again." in text
    assert "Interrupted. This is what was measured so far:" in text
    assert "Traceback" not in text
    equal, standard = read_html(out / "report.html")
    assert [standard.finished, equal.finished] == [True, False]
    assert min(standard.profiles["cka"][-1].change) > 0
    assert json.loads((out / "summary.json").read_text(encoding="utf-8"))["pairs"] == []
    assert (out / "profiles.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_machine_decides_the_size_and_the_size_can_be_repeated(tmp_path: Path) -> None:
    """If no size fits the time budget, the smallest is run after printing its estimated duration."""
    out, log = tmp_path / "out", tmp_path / "log.txt"
    sizes = [dataclasses.replace(size, null_seeds=1) for size in chosen(quick=True, steps=4)[-2:]]
    with open(log, "w", encoding="utf-8") as screen:
        run_demo(sizes, out, Console(file=screen, width=80), minutes=0.01)
    text, summary = log.read_text(encoding="utf-8"), json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert text.index("This machine is slow for it: even the smallest size takes") < text.index("training starts")
    assert "Size of your own: 2 fits of 4 steps of 4 x 32 tokens, 32 probe rows; about" in text
    assert re.search(r"^\d:\d\d sgd-standard: training starts; 0/8 steps, about \d+ s left$", text, re.MULTILINE)
    settings = settings_of(summary)
    assert settings == dataclasses.replace(sizes[-1], precision=summary["precision"]["precision"])
    assert 0.2 < summary["estimated_seconds"] / summary["seconds"] < 5
    first = {run.name: run.profiles["cka"][-1].change for run in read_runs(out)}
    run_demo(settings, tmp_path / "again", Console(quiet=True))
    assert {run.name: run.profiles["cka"][-1].change for run in read_runs(tmp_path / "again")} == first


def test_bad_options_are_one_clear_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--sizes", "huge"]) == 2
    assert "--sizes huge is none of smollm2-1, smollm2-2" in capsys.readouterr().err
    for command in (["demo"], ["pretrain", "--model", "gpt2-mini"]):
        with pytest.raises(SystemExit, match="2"):
            main([*command, "--minutes", "0"])
        assert "argument --minutes: 0: must be above 0" in capsys.readouterr().err


def test_too_little_memory_is_said_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_plan, "free_memory", lambda: 10**9)
    with pytest.raises(ValueError, match=r"needs \d\.\d GB of memory on minilm and 1\.0 GB are free: end other"):
        run_demo(chosen(), tmp_path / "out", Console(quiet=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("steps", "every"), [(0, 1), (4, 5), (4, 0)])
def test_settings_that_cannot_be_run_are_refused(tmp_path: Path, steps: int, every: int) -> None:
    settings = dataclasses.replace(QUICK, steps=steps, validate_every=every)
    with pytest.raises(ValueError, match="at least one step and one validation"):
        run_demo(settings, tmp_path / "out", Console(quiet=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_demo(tmp_path: Path) -> None:
    """Runs the demo in a separate process with all cores."""
    command = [str(Path(sys.executable).with_name("depthcb")), "demo", "--out", str(tmp_path / "out")]
    own = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    subprocess.run(command, check=True, env=own)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    settings = settings_of(summary)
    (size,) = chosen(summary["sizes"], precision=summary["precision"]["precision"])
    assert size == settings
    runs = check_outcome(tmp_path / "out", settings)
    if settings.backbone == "minilm":
        pytest.skip("this machine is too slow for the larger backbone in 7 minutes")
    assert {len(run.layers) for run in runs} == {30}
    spreads = {group.title.partition(",")[0]: group.spread for group in groups(runs)}
    assert spreads["SGD"] > 2 > spreads["AdamW"], "with SGD the control has something to remove, with AdamW little"
    for run in runs:
        losses = [loss for _, loss in run.validation_loss]
        assert losses[-1] < 1.02 * losses[0], "a fit that diverges says nothing about fine-tuning"
