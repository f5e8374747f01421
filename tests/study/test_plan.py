"""The plan of a study: parameters by the catalogue, memory against the measured peak, time, and runs that cannot fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from shrunk import paper_in_small, write_text, write_tokenizer

from depthcb.cli import main
from depthcb_recipes.backbones.architectures import ARCHITECTURES
from depthcb_recipes.demo.sizes import Costs
from depthcb_recipes.studies.grid import RunConfig, read_study
from depthcb_recipes.studies.plan import calibrate, needs, plan_table, seconds
from depthcb_recipes.studies.store import Store

PAPER = Path(__file__).parents[2] / "recipes" / "depthcb_recipes" / "studies" / "paper.yaml"
COSTS = Costs(step=1.0, step_twice=1.9, tokens=256, probe=1.0, tokens_probed=2048)
#: The peak of a real run / the estimate, minus a small run's on both sides: within this factor.
FACTOR = 1.35


def test_parameters_are_counted_without_a_network() -> None:
    runs = {(r.model, r.objective, r.control): r for r in read_study(PAPER)}
    found = needs(runs["EleutherAI/pythia-1.4b", "causal_lm", "equal-step"])
    assert found.parameters == ARCHITECTURES["EleutherAI/pythia-1.4b"].parameters
    assert (found.weights, found.optimizer) == (8 * found.parameters, 8 * found.parameters)
    standard = needs(runs["EleutherAI/pythia-1.4b", "causal_lm", "standard"])
    assert found.control == 2 * standard.control, "EqualStep's copy beside the monitor's"
    assert standard.device < found.device < 60e9
    large = needs(runs["EleutherAI/pythia-6.9b", "causal_lm", "standard"])
    assert large.gpus == 4
    assert large.training > 110e9 + 26e9, "fp32 AdamW is 16 bytes a parameter"


def test_time_grows_with_parameters_and_steps() -> None:
    runs = read_study(PAPER)
    decoder = next(r for r in runs if r.model == "gpt2" and r.objective == "causal_lm")
    once = seconds(decoder, 10**8, COSTS, 10**8)
    assert seconds(decoder, 2 * 10**8, COSTS, 10**8) == pytest.approx(2 * once, rel=0.01)
    longer = replace(decoder, options=dict(decoder.options) | {"trainer.max_steps": 2000})
    assert seconds(longer, 10**8, COSTS, 10**8) > 1.6 * once


@pytest.mark.slow
def test_runs_that_cannot_fit_are_named_with_what_to_do() -> None:
    runs = [r for r in read_study(PAPER) if r.model in ("gpt2", "EleutherAI/pythia-1.4b", "EleutherAI/pythia-6.9b")]
    table, problems = plan_table(runs, COSTS, 10**8, 80 * 10**9, 1, 64 * 10**9)
    assert table.row_count == 6, "a model and control a row, and the sum"
    assert [p.split()[0] for p in problems if "GPUs and there is 1" in p] == ["EleutherAI/pythia-6.9b"]
    assert all("pythia" in p for p in problems)
    _, problems = plan_table(runs, COSTS, 10**8, 10 * 10**9, 8, 10**12)
    assert {p.split()[0] for p in problems} == {"EleutherAI/pythia-1.4b", "EleutherAI/pythia-6.9b"}
    assert all("per GPU of 10.0: split it over" in " ".join(p.split()) for p in problems)
    _, none = plan_table([r for r in runs if r.model == "gpt2"], COSTS, 10**8, 80 * 10**9, 1, 64 * 10**9)
    assert not none


@pytest.mark.slow
def test_the_command_prints_the_plan(capsys: Any) -> None:
    assert main(["study", "plan", str(PAPER), "--gpu-memory", "24"]) == 0
    printed = capsys.readouterr().out
    assert "planned for one of 24.0 GB" in printed
    assert "226" in printed
    costs, parameters = calibrate()
    assert 0 < costs.step < costs.step_twice
    assert parameters > 30e6


@pytest.mark.slow
def test_memory_is_what_a_real_run_takes(tmp_path: Path) -> None:
    """Peaks of two runs in processes of their own: the larger one's excess over the smaller one's is as estimated."""
    text, found = write_text(tmp_path / "text"), {}
    for width, layers in ((32, 2), (768, 6)):
        folder = tmp_path / str(width)
        vocabulary = write_tokenizer(folder)
        sizes = {"n_embd": width, "n_layer": layers, "n_head": 4, "n_positions": 64, "vocab_size": vocabulary}
        torch.manual_seed(0)
        hf.GPT2LMHeadModel(hf.GPT2Config(**sizes)).save_pretrained(folder)
        grid = {"objective": ["causal_lm"], "control": ["equal-step"], "seed": [0]}
        (config,) = read_study(paper_in_small(tmp_path, {"-": folder}, text, grid))
        found[width] = (peak(config, tmp_path / "out"), needs(config).main)
    measured, estimated = (found[768][i] - found[32][i] for i in (0, 1))
    assert 1 / FACTOR < measured / estimated < FACTOR, (
        f"{measured / 1e9:.2f} GB measured, {estimated / 1e9:.2f} estimated"
    )
    assert 1 / FACTOR < found[768][0] / found[768][1] < FACTOR


MEASURE = """
import json, resource, sys
from pathlib import Path
from depthcb_recipes.studies.grid import RunConfig
from depthcb_recipes.studies.runner import run
result = run(RunConfig(**json.loads(sys.argv[1])), Path(sys.argv[2]))
assert result.finished, result.message
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak(config: RunConfig, root: Path) -> int:
    """Largest resident memory of a run's process, in bytes."""
    command = [sys.executable, "-c", MEASURE, json.dumps(config.to_dict()), str(Store(root).prepare(config))]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"})
    assert done.returncode == 0, done.stderr[-2000:]
    return 1024 * int(done.stdout.split()[-1])
