"""The checkpoints of runs already over, compared as if the runs had been watched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import transformers as hf
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file, save_file
from shrunk import write_tokenizer

from depthcb import DepthProfile
from depthcb.cli import main
from depthcb.run import read_runs
from depthcb_recipes import CausalLM, load_backbone
from depthcb_recipes.compare_backbones import LENGTH, ROWS
from depthcb_recipes.data.packed_text import PackedText


@pytest.fixture(scope="module")
def base(tmp_path_factory: Any) -> Path:
    folder: Path = tmp_path_factory.mktemp("gpt2")
    sizes = {"n_layer": 3, "n_embd": 32, "n_head": 4, "n_positions": 64, "vocab_size": write_tokenizer(folder)}
    torch.manual_seed(0)
    hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, bos_token_id=1, eos_token_id=1)).save_pretrained(folder)
    return folder


class Run:
    """A watched Lightning fit that saved a checkpoint at each validation."""

    def __init__(self, base: Path, folder: Path) -> None:
        data = PackedText(str(base), block_size=LENGTH, batch_size=4, train_rows=24, val_rows=ROWS)
        self.watch = DepthProfile(probe=data.probe_batches(ROWS, 16))
        self.checkpoints = folder / "checkpoints"
        keep = ModelCheckpoint(self.checkpoints, save_top_k=-1, every_n_train_steps=2, save_last=True)
        pl.seed_everything(0)
        trainer = pl.Trainer(
            max_steps=6, val_check_interval=2, callbacks=[self.watch, keep], logger=False, enable_progress_bar=False,
            enable_model_summary=False, accelerator="cpu", default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(CausalLM(str(base), lr=1e-3), data)


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: Any) -> Run:
    return Run(base, tmp_path_factory.mktemp("run"))


def compared(*arguments: object) -> Any:
    """Runs the command and returns its JSON."""
    found = Path(str(arguments[1])).parent / "profiles.json"
    assert main(["compare", *map(str, arguments), "--json", str(found)]) == 0
    return json.loads(found.read_text())


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["compare", *map(str, arguments)]) != 0
    return " ".join(capsys.readouterr().err.split())


def test_a_series_is_what_the_watched_run_saw(
    base: Path, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder has last.ckpt too, which is the last step once more. Lightning logs the first step as step 0."""
    found = compared(base, run.checkpoints, "--out", tmp_path / "after")
    for measure, watched in run.watch.profiles_by_measure.items():
        assert [p["step"] for p in found[measure]] == [p.step + 1 for p in watched] == [2, 4, 6]
        for after, during in zip(found[measure], watched, strict=True):
            assert after["change"] == pytest.approx(during.change, rel=1e-6, abs=1e-12)
            assert min(after["change"]) > 0
    (record,) = read_runs(tmp_path / "after")
    assert [p.step for p in record.profiles["cka"]] == [2, 4, 6]
    capsys.readouterr()
    assert main(["show", str(tmp_path / "after")]) == 0
    assert "step 6" in " ".join(capsys.readouterr().out.split())
    assert main(["report", str(tmp_path / "after"), "--out", str(tmp_path / "page.html")]) == 0
    assert "a record already" in refused(capsys, base, run.checkpoints, "--out", tmp_path / "after")


def test_checkpoints_of_transformers(base: Path, run: Run, tmp_path: Path) -> None:
    """Step folders without a tokenizer, in the order of steps although step 10 comes before step 9 by name."""
    model = hf.AutoModelForCausalLM.from_pretrained(base)
    batch = {"input_ids": torch.arange(2, 14)}
    arguments = hf.TrainingArguments(
        str(tmp_path), max_steps=10, save_steps=1, save_total_limit=2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    hf.Trainer(model, arguments, train_dataset=[{**batch, "labels": batch["input_ids"]}] * 16).train()
    found = compared(base, tmp_path)["cka"]
    assert [p["step"] for p in found] == [9, 10]
    single = [compared(base, tmp_path / f"checkpoint-{step}")["cka"] for step in (9, 10)]
    assert found == single
    assert compared(base, *sorted(tmp_path.glob("checkpoint-*"), reverse=True))["cka"] == found


def test_files_and_classes_give_what_the_model_folder_gives(base: Path, run: Run, tmp_path: Path) -> None:
    (path,) = run.checkpoints.glob("*step=6.ckpt")
    state = torch.load(path, weights_only=True)["state_dict"]
    model, _ = load_backbone(str(base))
    model.load_state_dict({key.removeprefix("model."): value for key, value in state.items() if "model." in key})
    model.save_pretrained(tmp_path / "folder")
    shutil.copy(tmp_path / "folder" / "model.safetensors", tmp_path / "step=6.safetensors")
    (tmp_path / "mine.py").write_text(
        "import torch, transformers as hf\n"
        "class Mine(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        f"        self.net = hf.AutoModelForCausalLM.from_config(hf.AutoConfig.from_pretrained({str(base)!r}))\n"
        "    def forward(self, input_ids, attention_mask=None):\n"
        "        return self.net(input_ids=input_ids, attention_mask=attention_mask)\n"
    )
    torch.save({"state_dict": {f"net.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "mine.ckpt")
    expected = compared(base, tmp_path / "folder")["cka"]["change"]
    assert compared(base, path)["cka"]["change"] == expected
    assert compared(base, path, "--module", "depthcb_recipes:CausalLM")["cka"]["change"] == expected
    assert compared(base, tmp_path / "step=6.safetensors", "--backbone", base)["cka"]["change"] == expected
    assert compared(base, tmp_path / "mine.ckpt", "--module", f"{tmp_path}/mine.py:Mine")["cka"]["change"] == expected
    assert compared(path, tmp_path / "folder", "--backbone", base)["cka"]["change"] == [0.0] * 3


@pytest.mark.slow
def test_what_does_not_fit_is_one_sentence(
    base: Path, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = next(run.checkpoints.glob("*step=6.ckpt"))
    state = torch.load(path, weights_only=True)["state_dict"]
    assert "is not a checkpoint of a BertModel: it lacks embeddings" in refused(
        capsys, "minilm", path, "--backbone", "minilm"
    )
    assert "is a GPT2Model, minilm a BertModel" in refused(capsys, "minilm", base)
    assert "does not tell its network: say with --backbone" in refused(capsys, path, base, "--tokenizer", base)

    def saved(name: str, content: Any) -> Path:
        torch.save(content, tmp_path / name)
        return tmp_path / name

    double = {f"ema.{key}": value for key, value in state.items()} | state
    told = refused(capsys, base, saved("double.ckpt", {"state_dict": double}))
    assert "several sets of weights of a GPT2Model (keys that start with 'ema.model.transformer.'" in told
    more = {key.replace("h.0.", "h.3."): value for key, value in state.items()} | state
    told = refused(capsys, base, saved("more.ckpt", {"state_dict": more}))
    assert "has weights that a GPT2Model has no place for: model.transformer.h.3." in told
    cut = {key: value[:-1] if key.endswith("wte.weight") else value for key, value in state.items()}
    assert "of shape" in refused(capsys, base, saved("cut.ckpt", {"state_dict": cut}))
    assert "it holds a pathlib" in refused(capsys, base, saved("object.ckpt", {"state_dict": state, "x": Path("a")}))
    assert "has no state_dict" in refused(capsys, base, saved("none.ckpt", state))
    (tmp_path / "torn.ckpt").write_bytes(path.read_bytes()[:1000])
    assert "it is damaged" in refused(capsys, base, tmp_path / "torn.ckpt")
    assert "There is no checkpoint" in refused(capsys, base, tmp_path / "nowhere.ckpt")
    shutil.copytree(base, tmp_path / "other")
    weights = load_file(base / "model.safetensors")
    save_file({f"x.{key}": value for key, value in weights.items()}, tmp_path / "other" / "model.safetensors")
    assert "lacks weights of a GPT2Model" in refused(capsys, base, tmp_path / "other")
    assert "Nothing tells the training step of" in refused(capsys, base, path, base)
    assert "are both of step 6" in refused(capsys, base, path, path)
    assert "--module nowhere:Class cannot be imported" in refused(capsys, base, path, "--module", "nowhere:Class")


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama"])
def test_a_missing_tokenizer_is_an_error(
    name: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers would invent one that knows no word."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config: Any = {
        "gpt2": hf.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=500),
        "bert": hf.BertConfig(**sizes, vocab_size=500),
        "llama": hf.LlamaConfig(**sizes, vocab_size=500),
    }[name]
    hf.AutoModel.from_config(config).save_pretrained(tmp_path / "a")
    told = refused(capsys, tmp_path / "a", tmp_path / "a")
    assert "has no tokenizer" in told
    assert "--tokenizer NAME" in told
    assert compared(tmp_path / "a", tmp_path / "a", "--tokenizer", base)["cka"]["change"] == [0.0, 0.0]


def test_a_tokenizer_of_another_model_is_an_error(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{base} only 320" in refused(capsys, base, base, "--tokenizer", "minilm")
