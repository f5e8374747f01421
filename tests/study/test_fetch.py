"""Downloading beforehand: what runs need and no more, resumed, checked against the disk; runs then use no network."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub import hub
from shrunk import paper_in_small, write_model, write_text
from studies import command

from depthcb.cli import main
from depthcb_recipes.studies import fetch as module
from depthcb_recipes.studies.fetch import FETCHED, Repository, is_fetched, repositories
from depthcb_recipes.studies.grid import read_study

STUDIES = Path(__file__).parents[2] / "recipes" / "depthcb_recipes" / "studies"


def study(folder: Path, model: str, text: Path) -> Path:
    """One standard run of a model by its name, on local text."""
    grid = {"objective": ["causal_lm"], "control": ["standard"], "seed": [0]}
    path = paper_in_small(folder, {"-": Path(model)}, text, grid)
    whole = yaml.safe_load(path.read_text())
    del whole["by"]["family"]  # that of an unknown model is asked of the hub when the file is read
    path.write_text(yaml.safe_dump(whole))
    return path


def test_the_papers_study_needs_its_15_models_and_its_texts() -> None:
    found = repositories(read_study(STUDIES / "paper.yaml"))
    assert len([each for each in found if each.kind == "model"]) == 15
    assert [each for each in found if each.kind == "dataset"] == [
        Repository("Salesforce/wikitext", "dataset", "wikitext-2-raw-v1"),
        Repository("fancyzhx/dbpedia_14", "dataset"),
        Repository("unimelb-nlp/wikiann", "dataset", "en"),
    ]
    assert repositories(read_study(STUDIES / "mini.yaml")) == []


def test_what_is_here_needs_no_download(tmp_path: Path, capsys: Any) -> None:
    path = study(tmp_path, str(write_model("gpt2", tmp_path / "gpt2")), write_text(tmp_path / "text"))
    (config,) = read_study(path)
    assert not is_fetched(config, tmp_path / "out")
    assert main(["study", "fetch", str(path), "--out", str(tmp_path / "out")]) == 0
    assert "All that the 1 runs read is on this machine" in capsys.readouterr().out
    assert is_fetched(config, tmp_path / "out")


@pytest.mark.slow
def test_without_a_network_one_sentence_says_what_and_how(tmp_path: Path) -> None:
    path = study(tmp_path, "some/model", write_text(tmp_path / "text"))
    env = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command("fetch", path, tmp_path / "out"), env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert "The model 'some/model' cannot be fetched (" in done.stderr
    assert "name a local folder in the study's file instead" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / FETCHED).exists()


@pytest.mark.slow
def test_a_hub_gives_what_is_missing_and_the_run_does_without_it(tmp_path: Path) -> None:
    """huggingface_hub's own client against a server: one kind of weights, once; then the run is offline."""
    origin = write_model("gpt2", tmp_path / "origin")
    shutil.copy(origin / "model.safetensors", origin / "pytorch_model.bin")  # a second kind, which nothing needs
    path = study(tmp_path, "some/model", write_text(tmp_path / "text"))
    (config,) = read_study(path)
    out, home = tmp_path / "out", tmp_path / "home"
    with hub({"some/model": origin}) as (address, served):
        env = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        first = subprocess.run(command("fetch", path, out), env=env, capture_output=True, text=True)
        assert first.returncode == 0, first.stderr
        assert "model some/model: " in first.stdout
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(served)
        assert "pytorch_model.bin" not in served
        downloaded = list(served)
        blob = max((home / "hub").rglob("blobs/*"), key=lambda p: p.stat().st_size)
        blob.unlink()  # as if it had been interrupted
        again = subprocess.run(command("fetch", path, out), env=env, capture_output=True, text=True)
        assert again.returncode == 0, again.stderr
        assert served[len(downloaded) :] == ["model.safetensors"]
    assert is_fetched(config, out)
    env["HF_ENDPOINT"] = address  # nobody answers there any more
    done = subprocess.run(command("run", path, out, "--jobs", "1"), env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.rmtree(home)
    assert not is_fetched(config, out), "what was fetched is gone"


def test_a_disk_that_is_too_small_is_seen_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage(0, 0, 10**9))
    download = module.Download(Repository("some/model", "model"), "main", (), 2 * 10**9)
    with pytest.raises(
        ValueError, match=r"need 2\.0 GB of disk and 1\.0 GB are free in .*: free some space, or set HF_HOME"
    ):
        module._check_disk([download])
    module._check_disk([module.Download(Repository("some/model", "model"), "main", (), 10**9)])
