"""The mini zoo: models are pretrained once and atomically, and beat the unigram baseline."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from depthcb.cli import main
from depthcb_recipes.backbones.catalogue import describe
from depthcb_recipes.backbones.loading import BackboneNotFoundError, load_backbone, load_config, load_tokenizer
from depthcb_recipes.backbones.pretraining import pretrain, unigram_loss
from depthcb_recipes.backbones.zoo import MINI_ZOO, MiniModel
from depthcb_recipes.cache import cache_folder

SMALL = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128, "vocab_size": 8192, "bos_token_id": 0,
         "eos_token_id": 0, "pad_token_id": 1}  # fmt: skip
TINY = MiniModel("gpt2", SMALL, lr=3e-3, steps=40, warmup_steps=5, batch_size=4)


def zoo_of(folder: Path) -> list[Path]:
    """Files of the mini zoo in a cache, without locks."""
    return [path for path in (folder / "depthcb" / "mini-zoo").iterdir() if path.suffix != ".lock"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, except for the corpus that has already been read."""
    shared = cache_folder() / "corpus"
    (tmp_path / "depthcb").mkdir()
    if shared.is_dir():
        (tmp_path / "depthcb" / "corpus").symlink_to(shared)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.slow
def test_pretraining_learns_is_recorded_and_happens_once(cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    folder = pretrain("tiny", TINY)
    assert torch.equal(torch.get_rng_state(), state)
    said = capfd.readouterr()
    assert "Pretraining tiny once (40 steps) and saving it to" in said.out
    assert "GPU available" not in said.out + said.err
    report = json.loads((folder / "pretraining.json").read_text())
    assert report["held_out_loss"] < report["held_out_loss_before"] - 0.5
    assert report["held_out_loss_before"] == pytest.approx(math.log(8192), abs=0.2)
    assert len(report["text_sha256"]) == 64
    model, tokenizer = load_backbone(str(folder))
    assert len(tokenizer) == 8192
    assert tokenizer.decode(tokenizer.encode("def f(x):\n    return 'é'")) == "def f(x):\n    return 'é'"
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, model.config.pad_token_id) == (1, 0, 1)
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert pretrain("tiny", TINY) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert capfd.readouterr().out == ""


@pytest.mark.slow
def test_killed_in_the_middle_it_starts_afresh(cache: Path) -> None:
    """A killed process leaves no incomplete model, and the next one removes its temporary files."""
    code = (
        "from test_mini_zoo import *; import dataclasses; "
        "print(pretrain('tiny', dataclasses.replace(TINY, steps=100_000)), flush=True)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "Pretraining tiny" in process.stdout.readline()
        time.sleep(5)
        process.send_signal(signal.SIGKILL)
    assert all(path.name.startswith(".") for path in zoo_of(cache))
    scratch = zoo_of(cache)[0] if zoo_of(cache) else cache / "depthcb" / "mini-zoo" / ".none"
    folder = pretrain("tiny", TINY)
    left = folder.with_name(f".{folder.name}")
    left.mkdir()
    (left / "half.safetensors").write_bytes(b"half")
    (folder / "model.safetensors").unlink()
    assert pretrain("tiny", TINY) == folder
    assert (folder / "model.safetensors").is_file()
    assert set(zoo_of(cache)) - {scratch} == {folder}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_a_fit_that_asks_for_a_missing_model_makes_it_first(cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Inside another Trainer's fit."""
    options = ["--trainer.max_steps=2", "--trainer.val_check_interval=1", "--data.val_rows=64", "--data.batch_size=8",
               "--trainer.accelerator=cpu", f"--trainer.logger.init_args.save_dir={cache}"]  # fmt: skip
    assert main(["fit", "--config=causal_lm", "--model.backbone=gpt2-tiny", *options]) == 0
    assert capfd.readouterr().out.count("Pretraining gpt2-tiny") == 1
    (metrics,) = cache.glob("causal_lm/*/metrics.csv")
    assert "depth/objective_distance" in metrics.read_text()


@pytest.mark.slow
def test_what_made_a_model_is_in_the_name_of_its_folder(cache: Path) -> None:
    one = MiniModel("gpt2", SMALL, steps=1, batch_size=1)
    assert pretrain("tiny", one) != pretrain("tiny", MiniModel("gpt2", SMALL, steps=2, batch_size=1))


def test_an_unknown_model_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--model", "gpt5-mini"]) == 2
    assert "'gpt5-mini' is not in the mini zoo: use one of bert-mini, gpt2-mini" in capsys.readouterr().err


def test_reading_never_trains(cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Loading a tokenizer, configuration or weights fails with instructions, without pretraining."""
    for read in (load_tokenizer, load_config, load_backbone):
        with pytest.raises(BackboneNotFoundError, match="not pretrained on this machine yet: run `depthcb pretrain --"):
            read("gpt2-tiny")
    assert describe("gpt2-tiny").layers == 4
    assert capfd.readouterr().out == ""
    assert not (cache / "depthcb" / "mini-zoo").exists()


def test_the_unigram_loss_is_what_counting_gives() -> None:
    shares = {0: 4 / 8, 1: 2 / 8, 2: 1 / 8, 3: 1 / 8}
    expected = -sum(math.log(shares[token]) for token in (0, 3, 1, 1)) / 4
    assert unigram_loss([[0, 0], [0, 1]], [[0, 3], [1, 1]]) == pytest.approx(expected)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", MINI_ZOO)
def test_each_model_of_the_zoo_has_learnt(name: str) -> None:
    """The loss is well below the unigram baseline."""
    report = json.loads((pretrain(name, MINI_ZOO[name]) / "pretraining.json").read_text())
    assert report["held_out_loss"] < report["held_out_unigram_loss"] - 0.5
    assert report["parameters"] < 8e6
