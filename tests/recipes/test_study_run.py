"""A real study of one pair: two processes, fits of a tiny network, and their results."""

from __future__ import annotations

import re
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from recipes_families import tiny
from studies import alive, command, drive, figures, gone, smoke

from depthcb.cli import main
from depthcb.profile import Profile
from depthcb.run import read_runs
from depthcb_recipes.backbones.loading import load_tokenizer
from depthcb_recipes.fit import fit_cli
from depthcb_recipes.studies.grid import RunConfig, read_study
from depthcb_recipes.studies.runner import configuration, fit
from depthcb_recipes.studies.store import Store

OPTIONS = {
    "trainer.max_steps": 4, "trainer.val_check_interval": 2, "trainer.log_every_n_steps": 1, "trainer.accelerator": "cpu",
    "trainer.limit_val_batches": 8, "trainer.precision": "32-true", "data.batch_size": 8, "data.val_rows": 64,
    "data.block_size": 32, "model.lr": 0.1,
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The study's file, and its folder after the run; one model does not exist."""
    folder = tmp_path_factory.mktemp("study")
    tokenizer = load_tokenizer("minilm")
    tiny("neox", "ForCausalLM", vocab_size=len(tokenizer), max_position_embeddings=128).save_pretrained(folder / "neox")
    tokenizer.save_pretrained(folder / "neox")
    grid = {
        "model": [str(folder / "neox"), "./nowhere"], "objective": ["causal_lm"], "optimizer": ["sgd"],
        "control": ["standard", "equal-step"], "seed": [0],
    }  # fmt: skip
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({"grid": grid, "options": OPTIONS}))
    assert main(["study", "run", str(path), "--out", str(folder / "out"), "--jobs", "2"]) == 1, "a model is missing"
    return path, folder / "out"


def test_a_pair_shares_its_start_and_differs_in_the_control(made: tuple[Path, Path]) -> None:
    path, out = made
    *pair, one, other = [Store(out).result(config) for config in read_study(path)]
    standard, equal = (result.figures for result in pair if result and result.figures)
    assert equal.realised_spread is not None
    assert equal.wanted_spread is not None
    for fact in ("initial_weights", "data_order", "pair", "objective_distance"):
        assert getattr(standard, fact) == getattr(equal, fact), fact
    assert equal.realised_spread < 1.001 < equal.wanted_spread
    assert standard.slope != equal.slope
    assert standard.backbone["block"] == "parallel"
    assert [len(standard.null[m]) for m in ("cka", "cka_normalized")] == [8, 8]
    assert [len(standard.matched_null[m]) for m in ("cka", "cka_normalized")] == [8, 8]
    mean, *matched = [Profile.from_dict(p).mean for p in (standard.profiles["cka"], *standard.matched_null["cka"])]
    assert matched[0] == pytest.approx(mean, rel=0.1)
    run = next(r for r in read_runs(out) if r.control == "equal-step")
    assert run.profiles["cka"][-1].slope == equal.slope
    for result in (one, other):
        assert result is not None
        assert result.status == "missing model"
        assert "./nowhere" in result.message


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # jsonargparse's own
@pytest.mark.parametrize("name", ["a: b", "a #b", "1", "null", "[x", "x: |", "{a: 1}", "'q"])
def test_any_name_of_a_folder_reaches_the_logger(name: str) -> None:
    config = RunConfig("minilm", "causal_lm", "sgd", "standard", 0, options={"trainer.precision": "32-true"})
    cli = fit_cli(configuration(config, Path(name)), run=False, exit_on_error=False)
    assert cli.trainer.logger is not None
    assert cli.trainer.logger.save_dir == name


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # jsonargparse's own
def test_options_reach_the_fit_as_they_are(made: tuple[Path, Path], tmp_path: Path) -> None:
    """A null was once parsed as the word "None"; names of a class's options go without ``init_args``."""
    path, _ = made
    standard, equal, *_ = read_study(path)
    options = dict(standard.options) | {"trainer.check_val_every_n_epoch": None, "model.betas": [0.8, 0.9]}
    cli = fit_cli(configuration(replace(standard, options=options), tmp_path), run=False, exit_on_error=False)
    assert cli.trainer.check_val_every_n_epoch is None
    assert (cli.model.hparams["lr"], tuple(cli.model.hparams["betas"])) == (0.1, (0.8, 0.9))
    assert cli.datamodule.batch_size == 8
    assert cli.trainer.loggers[0].log_dir.rstrip("/") == str(tmp_path)
    names = [callback["class_path"] for callback in configuration(equal, tmp_path)["trainer"]["callbacks"]]
    assert names == [
        "depthcb.EqualStep",
        *(c["class_path"] for c in configuration(standard, tmp_path)["trainer"]["callbacks"]),
    ]
    with pytest.raises(ValueError, match=r"trainer\.callbacks has no DepthProfile"):
        fit(replace(standard, options=options | {"trainer.callbacks": None}), tmp_path)
    with pytest.raises(ValueError, match="max_stepz"):
        fit(replace(standard, options=options | {"trainer.max_stepz": 3}), tmp_path)


@pytest.mark.slow
def test_what_keeps_a_run_from_its_figures_is_recorded_as_that(tmp_path: Path) -> None:
    """A learning rate that diverges, and a batch that exceeds this process's memory limit."""
    path, out = smoke(tmp_path, "gpt2-tiny"), tmp_path / "out"
    study = yaml.safe_load(path.read_text())
    study["grid"] |= {"objective": ["causal_lm"], "seed": [0, 1]}
    large = {"data.batch_size": 32, "data.block_size": 512, "data.val_rows": 256}
    study["by"] = {"seed": {0: {"model.lr": 1e30}, 1: large}}
    path.write_text(yaml.safe_dump(study))
    limited = ["sh", "-c", 'ulimit -v 4000000; "$@"', "sh", *command("run", path, out, "--jobs", "1")]
    assert subprocess.run(limited, capture_output=True).returncode == 1
    for config in read_study(path):
        result = Store(out).result(config)
        assert result is not None
        assert result.status == ("out of memory" if config.seed else "not finite"), result
        assert result.figures is None


@pytest.mark.slow
def test_a_run_on_two_processes_starts_alike_and_dies_whole(tmp_path: Path) -> None:
    """Sharded parameters on two CPU processes, the setup for the paper's largest model."""
    one = smoke(tmp_path, "gpt2-tiny")
    two = yaml.safe_load(one.read_text())
    strategy = "lightning.pytorch.strategies.ModelParallelStrategy"
    sizes = {"data_parallel_size": 2, "tensor_parallel_size": 1}
    two["options"] |= {"trainer.devices": 2, "trainer.strategy": {"class_path": strategy, "init_args": sizes}}
    path, out = tmp_path / "two.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(two))
    driver = drive(path, out, "--jobs", "1")
    while not list(out.glob("runs/*/depthcb/depth.jsonl")):
        assert driver.poll() is None
        time.sleep(0.02)
    assert len(alive(out)) == 3, "a driver and two processes of a run"
    driver.kill()
    driver.wait()
    assert gone(out, within=2)
    assert drive(path, out, "--jobs", "1").wait() == 0
    found = figures(path, out)
    assert drive(one, tmp_path / "whole").wait() == 0
    for name, whole in figures(one, tmp_path / "whole").items():
        assert found[name]["initial_weights"] == whole["initial_weights"]
        assert found[name]["objective_distance"] is None, "not measured on sharded parameters"
        assert all(len(found[name]["null"][m]) == 8 for m in ("cka", "cka_normalized"))
        if "equal-step" in name:
            assert found[name]["realised_spread"] < 1.001


def test_what_a_user_reads(made: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
    path, out = made
    study = [str(path), "--out", str(out)]
    assert main(["study", "status", *study]) == 0
    assert capsys.readouterr().out == "2 finished, 2 missing model of 4 runs\n"
    exports = [tmp_path / "pairs.csv", tmp_path / "pairs.parquet"]
    assert main(["study", "table", *study, *(f"--export={export}" for export in exports)]) == 0
    assert "parallel" in capsys.readouterr().out
    csv, parquet = pd.read_csv(exports[0]), pd.read_parquet(exports[1])
    assert len(csv) == len(parquet) == 1
    assert csv["slope_equal"][0] == pytest.approx(parquet["slope_equal"][0], rel=1e-12)
    assert main(["study", "claims", *study]) == 0
    claims = capsys.readouterr().out
    verdicts = {line.split()[0]: line.split()[1] for line in claims.splitlines() if line.startswith("C")}
    assert set(verdicts) >= {"C1", "C2", "C3", "C4", "C5"}
    assert set(verdicts.values()) == {"not"}, "not enough"
    assert main(["study", "report", *study]) == 0
    page = (out / "report.html").read_text()
    assert "not enough cells (1 of 11)" in page
    assert "1 of 4 seeds" in page
    assert re.search(r"default-src 'none'", page)
    assert main(["study", "table", *study, "--export", "pairs.xls"]) == 2
    assert "name a .csv or a .parquet file" in capsys.readouterr().err
