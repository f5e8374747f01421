"""`depthcb advise MODEL --config ...`: rules that need no finished run, on a real network and its data."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from depthcb.advice import LAST, RANDOM, RULES
from depthcb.advice import RUN as FINISHED_RUN
from depthcb.cli import main
from depthcb_recipes import CONFIGS
from depthcb_recipes.advice.source import training_named
from depthcb_recipes.backbones.loading import load_backbone

OPTIONS = ["--model.lr=1e-3", "--data.max_length", "32", "--data.batch_size", "8"]
MODEL = ["advise", "bert-tiny", "--config", "sequence_classification", *OPTIONS, "--budget", "50%"]


def chosen(path: str) -> dict[str, list[list[int]]]:
    """Returns the layers that each rule chooses."""
    return {r["rule"]: [own["layers"] for own in r["sets"]] for r in json.loads(Path(path).read_text())["rules"]}


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a folder that is both the current one and the one of temporary files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.filterwarnings("ignore")
def test_a_model_is_advised_on_without_a_run_and_nothing_is_left(
    empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*MODEL, "--rules", "change,step ratio,gradient norm,first k", "--json", "a.json"]) == 0
    out = capsys.readouterr().out
    fit = "depthcb fit --config sequence_classification --model.backbone bert-tiny --model.lr=1e-3 --data.max_length 32"
    assert f"change: needs a finished run: `{fit}" in out
    found = chosen("a.json")
    assert found["change"] == []
    assert [len(sets) for rule, sets in found.items() if rule not in ("change", RANDOM)] == [1] * 4
    assert {len(own) for sets in found.values() for own in sets} == {2}, "half of four equal layers"
    assert found[LAST] == [[2, 3]]
    assert "objective distance" not in found, "the only rule that is not cheap is left out unless asked for"
    assert [path.name for path in empty.iterdir()] == ["a.json"]


@pytest.mark.filterwarnings("ignore")
def test_without_a_known_pretraining_objective_the_other_rules_are_named(
    empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = load_backbone("bert-tiny", head=None)
    for part in (model, tokenizer):
        part.save_pretrained(empty / "bare")
    command = ["advise", str(empty / "bare"), *MODEL[2:]]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "pretraining objective is unknown. Name the rules to ask with --rules, without objective distance." in error
    assert main([*command, "--rules", "gradient norm"]) == 0
    assert {path.name for path in empty.iterdir()} == {"bare"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_proposals_are_those_of_a_finished_run_which_the_printed_command_makes(
    empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["advise", "bert-mini", "--config", "masked_lm", "--data.batch_size", "4", "--data.block_size", "32"]
    assert main([*model, "--json", "model.json"]) == 0
    assert {p.name for p in empty.iterdir()} == {"model.json"}
    command = capsys.readouterr().out.partition("worth: needs a finished run: `")[2].partition("`")[0]
    steps = ["--trainer.max_steps", "12", "--trainer.val_check_interval", "12", "--trainer.limit_val_batches", "8"]
    quiet = ["--trainer.enable_progress_bar", "false"]
    assert main([*shlex.split(command)[1:], *steps, *quiet]) == 0
    (config,) = empty.rglob("config.yaml")
    assert main(["advise", str(config.parent), "--json", "run.json"]) == 0
    of_model, of_run = chosen("model.json"), chosen("run.json")
    for rule in RULES.values():
        if rule.cost == FINISHED_RUN:
            assert of_model[rule.name] == []
            assert len(of_run[rule.name]) == 1
        elif rule.name != "gradient norm":  # which that fit does not record
            assert of_model[rule.name] == of_run[rule.name] != []
    assert len(of_model["gradient norm"]) == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_proposals_are_tested_and_a_second_command_trains_nothing(
    empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = yaml.safe_load((CONFIGS / "sequence_classification.yaml").read_text(encoding="utf-8"))
    own["trainer"] = {"limit_val_batches": 8}
    Path("mine.yaml").write_text(yaml.safe_dump(own))
    command = [
        "advise",
        "bert-tiny",
        "--config",
        "mine.yaml",
        *OPTIONS,
        "--rules",
        "change,gradient norm",
        "--steps",
        "4",
    ]
    command += ["--test", "--seeds", "1", "--draws", "1", "--jobs", "2"]
    assert main([*command, "--json", "a.json"]) == 0
    assert "Undecided: 1 of 4 seeds." in capsys.readouterr().out
    results = sorted(Path("depthcb-advice/bert-tiny-mine/runs").glob("*/result.json"))
    trained = [json.loads(path.read_text())["config"] for path in results]
    assert {t["options"]["trainer.max_steps"] for t in trained} == {4}
    assert {t["options"]["model.lr"] for t in trained} == {1e-3, 1e-2}, "of adapters ten times"
    assert {row["rule"] for row in json.loads(Path("a.json").read_text())["tested"][0]["rows"]} == {
        "all layers", "gradient norm", LAST, RANDOM,
    }, "a rule that needs a finished run is not tested"  # fmt: skip
    stamps = [path.stat().st_mtime_ns for path in results]
    assert main(command) == 0
    assert [path.stat().st_mtime_ns for path in results] == stamps


@pytest.mark.slow
def test_a_stop_leaves_nothing(tmp_path: Path) -> None:
    here = {"cwd": tmp_path, "env": os.environ | {"TMPDIR": str(tmp_path)}}
    command = [sys.executable, "-m", "depthcb", "advise", "bert-mini", "--config", "masked_lm"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **here) as process:  # type: ignore[call-overload]
        while not list(tmp_path.glob("depthcb-advise-*/config.yaml")):
            assert process.poll() is None
            time.sleep(0.1)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        out = process.communicate()[0]
    assert time.monotonic() - began < 5
    assert process.returncode == 128 + signal.SIGTERM
    assert "Stopped: nothing is left of it." in out
    assert not list(tmp_path.glob("depthcb*"))


def test_options_of_the_command_line_are_those_of_the_training(tmp_path: Path) -> None:
    options = ["--model.optimizer", "sgd", "--seed_everything=3", "--data.batch_size", "2"]
    found = training_named("minilm", "contrastive", options)
    assert (found.model, found.objective, found.optimizer, found.seed) == ("minilm", "contrastive", "sgd", 3)
    assert dict(found.options) == {"data.batch_size": 2}
    assert found.recipe == {}
    own: dict[str, Any] = {"model": {"class_path": "CausalLM", "init_args": {"optimizer": "sgd"}}, "data": {}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(own))
    found = training_named("minilm", str(tmp_path / "mine.yaml"), [])
    assert (found.objective, found.optimizer, found.recipe) == ("mine", "sgd", own)


def test_wrong_arguments_are_one_sentence(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("no-data.yaml").write_text("model: {}")
    for arguments, told in {
        ("bert-tiny",): "bert-tiny is not the folder of a run; for a model, name what it would be trained on: --config",
        ("bert-tiny", "--config", "nonsense"): "There is no configuration 'nonsense'",
        ("bert-tiny", "--config", "no-data.yaml"): "must have 'model:' and 'data:'",
        ("bert-tiny", "--config", "causal_lm", "--bugdet", "3%"): "unrecognized arguments: --bugdet",
        ("bert-tiny", "--config", "causal_lm", "--data.batch_size"): "unrecognized arguments: --data.batch_size",
        (str(empty), "--data.batch_size", "3"): "unrecognized arguments: --data.batch_size 3",
    }.items():
        assert main(["advise", *arguments]) == 2
        error = capsys.readouterr().err
        assert told in error
        assert error.count("\n") == 1
