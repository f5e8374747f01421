"""Runs of other hyperparameters, initial weights or unknown seeds were paired; hparams that JSON lacks ended fits."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from runs import changed, make_runs
from support import TinyLM, fit, run_script, seeded
from test_bugs.test_records_belong_to_a_fit import logger, pytestmark
from torch import nn

from depthcb import DepthProfile, EqualStep, UpdateRatioMonitor
from depthcb.fingerprint import weights_fingerprint
from depthcb.plain import SECRETS, UNKNOWN, dumps, loads, plain
from depthcb.report import write_html
from depthcb.report.groups import context, groups
from depthcb.run import Run, read_runs

__all__ = ["pytestmark"]


class Optimizer(enum.Enum):
    adam = 1
    sgd = 2


class Text(enum.StrEnum):
    same = "x"


@dataclasses.dataclass
class Config:
    width: int = 1
    api_key: str = "sekrit-1"


class Settings:
    def __init__(self, width: int) -> None:
        self.width = width


def scaled(factor: float) -> Callable[[float], float]:
    return lambda x: factor * x


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Optimizer.adam, Optimizer.sgd),
        (Text.same, "x"),
        (Config(1), Config(2)),
        (Path("/data/a"), Path("/data/b")),
        (Path("/data/a"), "/data/a"),
        ({1}, {2}),
        ({"a", "b"}, ["a", "b"]),
        (torch.float32, torch.bfloat16),
        (torch.device("cpu"), torch.device("cuda")),
        (argparse.Namespace(w=1), argparse.Namespace(w=2)),
        ({("a", "b"): 1}, {("a", "c"): 1}),
        ({1: "a"}, {"1": "a"}),
        ({Optimizer.adam: 1.0}, {Optimizer.sgd: 1.0}),
        (float("nan"), float("inf")),
        (torch.ones(3), torch.zeros(3)),
        (np.arange(2000), np.arange(2000)[::-1]),
        (np.float32(0.1), 0.1),
        (Settings(1), Settings(2)),
        (functools.partial(torch.optim.SGD, lr=0.1), functools.partial(torch.optim.SGD, lr=0.2)),
        (scaled(1.0), scaled(2.0)),
        (lambda x: x, lambda x: x + 1),
        (nn.Linear(2, 2), nn.Linear(2, 3)),
        ({"__type__": "set", "value": [1]}, {1}),
        (b"a", "a"),
    ],
)
def test_different_values_stay_different(one: Any, other: Any) -> None:
    texts = [json.dumps(plain(value), allow_nan=False) for value in (one, other)]
    assert texts[0] != texts[1]
    assert not any(UNKNOWN in text for text in texts)


def test_what_has_no_value_says_so_and_nothing_raises() -> None:
    circle: dict[str, Any] = {}
    circle["self"] = [circle]
    assert plain(circle)["self"][0] == {"__type__": "dict", "value": "the one 2 levels above"}

    class Angry:
        def __repr__(self) -> str:
            raise RuntimeError

    for value in (object(), Angry(), np.zeros(2_000_000)):
        assert UNKNOWN in plain(value)
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    assert UNKNOWN in json.dumps(plain(deep))
    same = [[[[0] * 50] * 50] * 50] * 50  # 6 million values, in 130,000 lists
    assert UNKNOWN in json.dumps(plain(same))


def test_numbers_that_json_lacks_are_numbers_again() -> None:
    values = {"a": float("inf"), "b": [float("nan"), 1.5]}
    text = dumps(values)
    assert "Infinity" not in text
    assert "NaN" not in text
    back = loads(text)
    assert back["a"] == float("inf")
    assert np.isnan(back["b"][0])


class Held(TinyLM):
    """A module with any hyperparameters."""

    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.save_hyperparameters()


def trained(folder: Path, given: dict[str, Any], *callbacks: pl.Callback) -> None:
    module = seeded(lambda: Held(**given))
    module._log_hyperparams = False  # Lightning's own loggers refuse some
    fit(module, list(callbacks), logger=logger(folder))


def test_pairs_share_hyperparameters_by_value(tmp_path: Path) -> None:
    circle: dict[str, Any] = {("a", 1): Optimizer.adam, Optimizer.sgd: float("nan")}
    circle["self"] = circle
    for name, width, control in (("a", 1, UpdateRatioMonitor), ("b", 1, EqualStep), ("c", 2, EqualStep)):
        trained(tmp_path / name, {"config": Config(width), "more": circle}, control(), DepthProfile())
    pair, rest = groups(read_runs(tmp_path))
    assert [run.name for run in pair.runs] == ["a", "b"]
    assert pair.paired
    assert [run.name for run in rest.runs] == ["c"]


def test_values_that_are_not_known_are_not_paired(tmp_path: Path) -> None:
    trained(tmp_path, {"thing": object()}, DepthProfile())
    (run,) = read_runs(tmp_path)
    assert run.unpaired.startswith("a hyperparameter has no value that can be compared")


def test_secrets_reach_neither_record_nor_page(tmp_path: Path) -> None:
    given = {
        "hf_token": "sekrit-2",
        "nested": {"dbPassword": "sekrit-3", "config": Config()},
        "tokenizer": "gpt2",
        "max_tokens": 5,
    }
    trained(tmp_path, given, EqualStep(), DepthProfile(redact=(*SECRETS, "my_own")))
    write_html(read_runs(tmp_path), tmp_path / "a.html")
    for path in (*tmp_path.glob("depthcb/*.jsonl"), tmp_path / "a.html"):
        assert "sekrit-" not in path.read_text()
    hparams = read_runs(tmp_path)[0].records["depth"].fit["hparams"]
    assert (hparams["hf_token"], hparams["tokenizer"], hparams["max_tokens"]) == ("(redacted)", "gpt2", 5)


def test_what_one_callback_keeps_out_is_in_no_record(tmp_path: Path) -> None:
    trained(tmp_path, {"my_own": "sekrit-4"}, EqualStep(), DepthProfile(redact=["my_own"]))
    assert len(paths := list(tmp_path.glob("depthcb/*.jsonl"))) == 2
    assert not any("sekrit-4" in path.read_text() for path in paths)
    trained(tmp_path, {"api_key": "sekrit-5"}, DepthProfile(redact=()))
    assert "sekrit-5" in (tmp_path / "depthcb" / "depth.jsonl").read_text()
    with pytest.raises(ValueError, match="redact='my_own' is text: pass a list of words"):
        trained(tmp_path, {}, DepthProfile(redact="my_own"))


def unseeded(record: dict[str, Any]) -> None:
    record["provenance"]["seed"] = None


def other_weights(record: dict[str, Any]) -> None:
    record["fit"]["initial_weights"] = "0b" * 32


def unknown_weights(record: dict[str, Any]) -> None:
    record["fit"]["initial_weights"] = None


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (unseeded, "no seed: add pl.seed_everything(0) before the model is built (depthcb.watch: pass seed=)"),
        (unknown_weights, "its initial weights are not known"),
        (other_weights, "its initial weights are not those of adamw-standard"),
    ],
)
def test_twins_need_seed_and_initial_weights(change: Callable[[dict[str, Any]], None], why: str) -> None:
    standard, equal = make_runs(arms=2)
    (group,) = groups([standard, equal])
    assert group.paired
    (group,) = groups([standard, changed(equal, "DepthProfile", change)])
    assert not group.paired
    assert f"adamw-equal-step is not paired: {why}" in " ".join(context(group))


def test_a_seed_that_does_not_decide_the_weights_makes_no_pair(tmp_path: Path) -> None:
    """The module was built before seed_everything was called."""
    runs: list[Run] = []
    for name, control in (("a", UpdateRatioMonitor), ("b", EqualStep)):
        torch.manual_seed(len(runs))
        fit(TinyLM(), [control(), DepthProfile()], logger=logger(tmp_path / name))
        runs += read_runs(tmp_path / name)
    (group,) = groups(runs)
    assert not group.paired
    assert context(group)[1].endswith("its initial weights are not those of a")


def test_every_bit_of_the_weights_counts() -> None:
    model = nn.ModuleDict(
        {"a": nn.Linear(3, 5), "b": nn.Conv2d(2, 2, 3).bfloat16(), "c": nn.Bilinear(2, 2, 2).double()}
    )
    model.register_parameter("z", nn.Parameter(torch.randn(3, dtype=torch.complex64)))
    before = weights_fingerprint(model)
    for parameter in model.parameters():
        real = torch.view_as_real(parameter.data) if parameter.is_complex() else parameter.data
        real.view(torch.uint8).view(-1)[-1] ^= 1
        assert weights_fingerprint(model) != before
        real.view(torch.uint8).view(-1)[-1] ^= 1
    assert weights_fingerprint(model.to(memory_format=torch.channels_last)) == before


@pytest.mark.slow
def test_sharded_weights_have_the_same_fingerprint() -> None:
    done = run_script("sharded_fingerprint.py")
    assert done.returncode == 0, done.stderr[-3000:]


def test_all_parameter_groups_are_recorded(tmp_path: Path) -> None:
    def optimizer(decay: float) -> Callable[[list[nn.Parameter]], Any]:
        return lambda p: torch.optim.AdamW([{"params": p[:4]}, {"params": p[4:], "weight_decay": decay}], lr=1e-3)

    for name, decay, control in (("a", 0.0, UpdateRatioMonitor), ("b", 0.1, EqualStep)):
        module = seeded(lambda decay=decay: TinyLM(optimizer(decay)))
        fit(module, [control(), DepthProfile()], logger=logger(tmp_path / name))
    first, second = read_runs(tmp_path)
    (settings,) = first.records["depth"].fit["optimizers"]
    assert settings["groups"][0]["weight_decay"] == 0.0
    assert len(groups([first, second])) == 1
