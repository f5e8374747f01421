"""The precision is chosen by timing unless it is requested, and both runs of a pair share it."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import planted
import pytest
import torch
import yaml
from recipes_families import tiny
from studies import FIGURES, drive, smoke

from depthcb.cli import main
from depthcb.run import read_runs
from depthcb_recipes import CONFIGS, precision
from depthcb_recipes.backbones.loading import load_tokenizer
from depthcb_recipes.demo.sizes import Settings
from depthcb_recipes.precision import Product, choose, device_of, product, settle, speedup
from depthcb_recipes.studies.commands import settle_precision
from depthcb_recipes.studies.grid import read_study
from depthcb_recipes.studies.pool import Pool
from depthcb_recipes.studies.result import Result, write_result
from depthcb_recipes.studies.store import Store
from depthcb_recipes.studies.tables import pairs_table, runs_table

CPU = torch.device("cpu")


def busy(milliseconds: float) -> Product:
    """A product that takes a fixed amount of CPU time, independent of the machine."""

    def compute() -> None:
        end = time.thread_time() + milliseconds / 1e3
        while time.thread_time() < end:
            pass

    return compute


@pytest.mark.parametrize(
    ("float32", "bfloat16", "chosen", "told"),
    [
        (3, 1, "bf16-mixed", "3.0 times as fast as"),
        (3, 2.6, "32-true", "1.2 times as fast as"),  # below the threshold
        (2, 6, "32-true", "3.0 times slower than"),
        (1, 50, "32-true", "times slower than"),
    ],
)
def test_a_cpu_is_timed(float32: float, bfloat16: float, chosen: str, told: str) -> None:
    def products(device: torch.device, dtype: torch.dtype) -> Product:
        return busy(bfloat16 if dtype == torch.bfloat16 else float32)

    choice = choose(CPU, products)
    assert choice.precision == chosen
    assert told in choice.reason


def test_a_hopeless_dtype_is_not_timed_long() -> None:
    calls = []
    start = time.thread_time()
    assert speedup(lambda: calls.append(busy(100)()), busy(1)) == pytest.approx(1 / 100, rel=0.5)
    assert len(calls) == 2, "one to warm up, one timed"
    assert time.thread_time() - start < 0.3


def test_real_products_decide_on_this_machine_in_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    choose(CPU)
    start = time.thread_time()
    choice = choose(CPU)
    assert time.thread_time() - start < 1
    again = speedup(product(CPU, torch.bfloat16), product(CPU, torch.float32))
    if not 0.8 * precision.WORTH_IT < again < 1.25 * precision.WORTH_IT:  # near the threshold, either is correct
        assert (choice.precision == "bf16-mixed") == (again > precision.WORTH_IT)
    assert torch.get_num_threads() == 1, "as conftest.py set it"


@pytest.mark.skipif(sys.platform != "linux", reason="the variables are those of x86 builds of torch")
def test_a_cpu_without_bfloat16_trains_in_float32() -> None:
    """Hides the bfloat16 instructions of this machine from the libraries, as on most laptops."""
    hidden = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    command = [sys.executable, "-m", "depthcb_recipes.precision", "cpu"]
    found = json.loads(subprocess.run(command, env=hidden, capture_output=True, text=True, check=True).stdout)
    assert found["precision"] == "32-true"
    assert "times slower than a float32 one" in found["reason"]


@pytest.mark.parametrize(
    ("capabilities", "chosen"), [([(8, 0)], "bf16-mixed"), ([(9, 0), (7, 5)], "32-true"), ([(7, 0)], "32-true")]
)
def test_a_gpu_is_asked_for_its_capability(
    capabilities: list[tuple[int, int]], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`is_bf16_supported` includes emulation; of several devices, the oldest decides."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    choice = choose(torch.device("cuda", 0))
    assert choice.precision == chosen
    major, minor = min(capabilities)
    assert f"compute capability {major}.{minor}" in choice.reason


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_real_gpu_is_used() -> None:
    assert device_of("auto").type == "cuda"
    major, _ = torch.cuda.get_device_capability()
    assert choose(device_of("auto")).precision == ("bf16-mixed" if major >= 8 else "32-true")


def test_elsewhere_it_is_float32() -> None:
    assert choose(torch.device("mps")).precision == choose(device_of("tpu")).precision == "32-true"


def test_a_named_precision_is_used_and_warned_about_once_where_it_is_slow(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    times = {torch.float32: 2.0, torch.bfloat16: 5.0}
    monkeypatch.setattr(precision, "product", lambda device, dtype: busy(times[dtype]))
    with pytest.warns(UserWarning, match=r"precision=bf16-mixed was requested, .* take 2\.\d times as long") as told:
        assert settle("bf16-mixed", CPU).precision == "bf16-mixed"
    assert len(told) == 1
    times[torch.bfloat16] = 3.0  # slower, but by less than a factor of 2
    assert settle("bf16-mixed", CPU).to_dict() == {"precision": "bf16-mixed", "reason": "requested"}
    assert settle("32-true", CPU).precision == settle(None, CPU).precision == "32-true"
    assert not recwarn.list


def test_further_processes_of_a_fit_use_what_the_first_one_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Near the threshold, two measurements may differ, but all ranks must make the same choice."""
    monkeypatch.setenv("DEPTHCB_PRECISION", json.dumps({"precision": "bf16-mixed", "reason": "the first one's"}))
    monkeypatch.setattr(precision, "choose", lambda device: precision.Precision("32-true", "its own"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert settle("auto", CPU).reason == "the first one's"
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert settle("auto", CPU).reason == "its own"


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # jsonargparse's own
def test_a_fit_prints_records_and_keeps_what_was_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = load_tokenizer("minilm")
    tiny("gpt2", "ForCausalLM", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    options = ["--trainer.max_steps=2", "--trainer.val_check_interval=1", "--trainer.accelerator=cpu"]
    options += ["--data.block_size=32", "--data.val_rows=64", "--data.batch_size=8"]
    logger = [f"--trainer.logger.init_args.{k}={v}" for k, v in (("save_dir", tmp_path), ("name", ""), ("version", ""))]
    assert main(["fit", "--config=causal_lm", f"--model.backbone={tmp_path / 'model'}", *options, *logger]) == 0
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if line.startswith("Precision ")]
    (run,) = read_runs(tmp_path)
    written = run.records["precision"].settings
    assert line == f"Precision {written['precision']}: {written['reason']}."
    assert "matrix product" in written["reason"]
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["trainer"]["precision"] == written["precision"]
    assert run.records["depth"].fit["precision"] == written["precision"]
    assert "fit: training starts; 0/2 steps" in said, "pytest's output is no terminal"


def test_nothing_that_is_bundled_names_a_precision() -> None:
    for path in [*CONFIGS.glob("*.yaml"), *(CONFIGS.parent / "studies").glob("*.yaml")]:
        config = yaml.safe_load(path.read_text())
        assert config.get("trainer", {}).get("precision", "auto") == "auto", path
        assert "trainer.precision" not in config.get("options", {}), path
    assert Settings().precision == "auto"


def one_pair(folder: Path) -> Path:
    """A study of two runs."""
    path = smoke(folder, "gpt2-tiny")
    study = yaml.safe_load(path.read_text())
    study["grid"]["objective"] = ["causal_lm"]
    del study["by"]["objective"]["contrastive"]
    path.write_text(yaml.safe_dump(study))
    return path


def test_a_study_settles_it_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, store = one_pair(tmp_path), Store(tmp_path / "out")
    configs, kept = read_study(path), {}
    for _ in range(2):
        settle_precision(configs, store, Pool(1))
        said = capsys.readouterr().out
        if not kept:
            assert said.startswith("Precision ")
            assert said.count("for the runs on cpu: a bfloat16 matrix product") == 1
            kept = store.precision("cpu")
    assert store.precision("cpu") == kept
    assert store.precision("cuda") is None
    assert "Precision" not in said, "it is said once"
    run = yaml.safe_load((store.prepare(configs[0]) / "run.yaml").read_text())
    assert run["options"]["trainer.precision"] == kept["precision"], "what the run's own process reads"
    named = dataclasses.replace(configs[0], options={"trainer.precision": "64-true"})
    assert yaml.safe_load((store.prepare(named) / "run.yaml").read_text())["options"] == named.options


@pytest.mark.slow
def test_a_study_keeps_its_precision_and_says_where_a_machine_would_choose_otherwise(tmp_path: Path) -> None:
    path, out = one_pair(tmp_path), tmp_path / "out"
    store = Store(out)
    # Another machine made the opposite choice.
    here = choose(CPU).precision
    other = {"bf16-mixed": "32-true", "32-true": "bf16-mixed"}[here]
    assert store.settle_precision("cpu", {"precision": other, "reason": "elsewhere"})["precision"] == other
    assert store.settle_precision("cpu", {"precision": here, "reason": "too late"})["reason"] == "elsewhere"
    command = [sys.executable, "-m", "depthcb", "study", "run", str(path), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"This study uses precision {other} for all its runs on cpu") == 1
    assert f"would choose {here}: a bfloat16 matrix product" in done.stdout
    for run in read_runs(out):
        assert run.records["depth"].fit["precision"] == other
        assert run.records["precision"].settings == {"precision": other, "reason": "elsewhere"}
    results = [store.result(config) for config in read_study(path)]
    assert {result.figures.precision for result in results if result and result.figures} == {other}
    assert main(["study", "table", str(path), "--out", str(out)]) == 0


def test_the_table_refuses_a_pair_of_different_precision() -> None:
    results = planted.study(planted.everywhere, {"model": ("sequential", 1e8)}, seeds=1)
    results = [planted.changed(result, precision="bf16-mixed") for result in results]
    assert len(pairs_table(runs_table(results))) == len(results) / 2
    results[1] = planted.changed(results[1], precision="32-true")
    with pytest.raises(ValueError, match=r"The pair model, causal_lm, sgd, 0 differs in precision, so it does not"):
        pairs_table(runs_table(results))


@pytest.mark.slow
def test_a_study_put_together_from_two_precisions_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = one_pair(tmp_path), tmp_path / "out"
    study = yaml.safe_load(path.read_text())
    both = study["grid"]["control"]
    for control, kept in zip(both, ("32-true", "bf16-mixed"), strict=True):
        # The file was removed and recreated, or the folder was merged from the runs of two machines.
        (out / "precision-cpu.json").unlink(missing_ok=True)
        Store(out).settle_precision("cpu", {"precision": kept, "reason": "planted"})
        path.write_text(yaml.safe_dump(study | {"grid": study["grid"] | {"control": [control]}}))
        assert drive(path, out).wait() == 0
    path.write_text(yaml.safe_dump(study))
    assert main(["study", "table", str(path), "--out", str(out)]) == 2
    assert "differs in precision, so it does not isolate the control" in capsys.readouterr().err


@pytest.mark.slow
def test_a_study_whose_older_runs_say_nothing_keeps_what_they_were_made_in(tmp_path: Path) -> None:
    path, out = smoke(tmp_path, "gpt2-tiny"), tmp_path / "out"
    old = read_study(path)[0]
    Store(out).prepare(old)
    write_result(Store(out).folder(old), Result("finished", old, FIGURES))
    command = [sys.executable, "-m", "depthcb", "study", "run", str(path), "--out", str(out), "--shard", "4/4"]
    said = subprocess.run(command, capture_output=True, text=True).stdout
    assert "Precision bf16-mixed for the runs on cpu: its earlier runs used it." in said


def test_options_of_one_control_alone_are_refused(tmp_path: Path) -> None:
    path = smoke(tmp_path, "gpt2-tiny")
    study = yaml.safe_load(path.read_text())
    study["by"]["control"] = {"equal-step": {"trainer.precision": "32-true"}}
    path.write_text(yaml.safe_dump(study))
    with pytest.raises(ValueError, match=r"by\.control would have the two runs of a pair differ in more than the"):
        read_study(path)
