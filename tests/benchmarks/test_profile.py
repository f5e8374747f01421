"""What `DepthProfile` adds to a validation: in plain forwards of the probe, and beside other packages for CKA."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from benchmarking import alternate, median_ratio, note
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

from depthcb import depth_profile
from depthcb.engine import ProfileRecorder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, TOKENS = 256, 32
#: Limits of one measurement by model, in forwards; of the intervals by measure, in parts of a forward.
LIMITS = {"encoder_6": 1.15, "encoder_30": 1.15, "smollm2": 1.05}
INTERVALS = {"cka": 0.03, "cka_normalized": 0.1}
#: A shared machine gives such ratios no closer than this.
NOISE = 0.05


def make(name: str) -> nn.Module:
    """6 or 30 encoder layers of width 384, or SmolLM2's 30 decoder layers of width 576; random weights, no head."""
    torch.manual_seed(0)
    if name == "smollm2":
        shape = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
        return LlamaModel(LlamaConfig(**shape, num_attention_heads=9, num_key_value_heads=3)).to(DEVICE).eval()
    shape = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}
    config = BertConfig(**shape, num_hidden_layers=int(name.rpartition("_")[2]))
    return BertModel(config, add_pooling_layer=False).to(DEVICE).eval()


def texts() -> list[dict[str, torch.Tensor]]:
    """256 texts of 32 tokens, in batches of 32."""
    ids = torch.randint(0, 30_000, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(32)]


@torch.no_grad()
def moved(model: nn.Module) -> nn.Module:
    """A copy with other weights."""
    other = copy.deepcopy(model)
    for p in other.parameters():
        p.add_(1e-3 * p.std() * torch.randn_like(p) if p.numel() > 1 else 0)
    return other


def recorder(model: nn.Module, measures: tuple[str, ...]) -> ProfileRecorder:
    """A recorder whose reference is the model and which measures a moved copy."""
    found = ProfileRecorder(texts(), measures=measures)
    found.prepare(model)
    found.prepare(moved(model))
    return found


@pytest.mark.parametrize("name", LIMITS)
def test_a_measurement_costs_little_more_than_a_forward(name: str) -> None:
    model, batches = make(name), [{k: v.to(DEVICE) for k, v in batch.items()} for batch in texts()]

    @torch.no_grad()
    def forward() -> None:
        for batch in batches:
            model(**batch)

    watch = recorder(model, ("cka", "cka_normalized"))
    times = alternate({"measure": lambda: watch.measure(0), "forward": forward}, 5)
    cost = median_ratio(times, "measure", "forward")
    note(f"{name}: one measurement by both measures, in forwards of the probe", cost, LIMITS[name])
    assert cost < LIMITS[name] + NOISE


@pytest.mark.parametrize("measure", ["cka", "cka_normalized", "procrustes", "cosine", "relative_l2"])
def test_what_the_intervals_of_each_measure_cost(measure: str) -> None:
    watch = recorder(make("encoder_6"), (measure,))
    reference, probe = watch.reference, watch.fixed_probe
    assert reference is not None
    assert probe is not None

    def record() -> Any:
        return probe.record(watch._module, watch._stack, reference.layout)

    recording = record()
    work = {
        "with": lambda: reference.profiles(recording, watch.measures, 0, 0),
        "without": lambda: reference.profiles(recording, watch.measures, 0, 0, intervals=False),
        "forward": record,
    }
    share = median_ratio(alternate(work, 5), "with", "forward", minus="without")
    note(f"intervals of {measure}, in forwards of the probe", share, INTERVALS.get(measure, float("inf")))
    assert share < INTERVALS.get(measure, float("inf"))


#: By package, code that defines `compare`, which compares two models on the probe.
PEERS = {
    "depthcb": """
watch = recorder(model, ("cka",))
compare = lambda: watch.measure(0)
""",
    "pytorch-cka": """
from cka import compute_cka
other, loader = moved(model), torch.utils.data.DataLoader(ids, ROWS)
compare = lambda: compute_cka(model, other, loader, layers=NAMES, device=DEVICE, progress=False)
""",
    "torch-cka": """
from torch_cka import CKA
other, loader = moved(model), torch.utils.data.DataLoader(torch.utils.data.TensorDataset(ids), ROWS)
cka = CKA(model, other, "a", "b", NAMES, NAMES, DEVICE)
compare = torch.no_grad()(lambda: cka.compare(loader, loader))
""",
}
NAMES = [f"encoder.layer.{i}.output.LayerNorm" for i in range(6)]
#: Prints the seconds of one comparison, and how many bytes it needs at its peak beside the first model.
TIMED = """
import time
from depthcb_recipes.machine import peak_memory
from test_profile import *
model = make("encoder_6")
ids = torch.cat([batch["input_ids"] for batch in texts()])
before = peak_memory()
{setup}
compare()
start = time.perf_counter()
compare()
print(time.perf_counter() - start, peak_memory() - before)
"""


def test_it_is_faster_and_smaller_than_other_packages() -> None:
    """Which compare two models, with their vectors at all positions as one row; on a CPU."""
    pytest.importorskip("cka")
    pytest.importorskip("torch_cka")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path]),
        "CUDA_VISIBLE_DEVICES": "",
    }
    seconds: dict[str, list[float]] = {name: [] for name in PEERS}
    memory: dict[str, list[float]] = {name: [] for name in PEERS}
    for _ in range(5):
        for name, setup in PEERS.items():
            command = [sys.executable, "-W", "ignore", "-c", TIMED.format(setup=setup)]
            ran = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            for found, of_package in zip(map(float, ran.stdout.split()[-2:]), (seconds, memory), strict=True):
                of_package[name].append(found)
    for name in ("pytorch-cka", "torch-cka"):
        faster = median_ratio(seconds, name, "depthcb")
        note(f"one comparison by {name}, in measurements of depthcb", faster, 2.0)
        larger = median_ratio(memory, name, "depthcb")
        note(f"memory of {name}, in that of depthcb", larger, 2.0)
        assert faster > 2.0
        assert larger > 2.0


def test_it_is_right_where_other_packages_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    """Beside the definition in extended precision, on the same activations."""
    peer, old = pytest.importorskip("cka"), pytest.importorskip("torch_cka")
    torch.manual_seed(0)
    x, lines = torch.randn(ROWS, 64), []
    for exponent in range(1, 13):
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        other = copy.deepcopy(model)
        with torch.no_grad():
            other[0].weight += 10 ** (-exponent / 2) * other[0].weight.std() * torch.randn(64, 64)
            truth = exact(model[0](x), other[0](x))
        ours = depth_profile(model, other, x, measures=("cka",))["cka"].change[0]
        loader = DataLoader(TensorDataset(x), ROWS)
        theirs = 1 - float(peer.compute_cka(model, other, loader, layers=["0"], device="cpu", progress=False)[0])
        cka = old.CKA(model, other, "a", "b", ["0"], ["0"], "cpu")
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            cka.compare(loader, loader)
        lines.append(f"{truth:.3e} | {ours:.3e} | {theirs:.3e} | {1 - float(cka.hsic_matrix):.3e}")
        assert ours == pytest.approx(truth, rel=1e-4)
    with capsys.disabled():
        print("\n   exact   |  depthcb  | pytorch-cka | torch-cka", *lines, sep="\n")


def exact(a: torch.Tensor, b: torch.Tensor) -> float:
    """1 - debiased linear CKA, as defined, in extended precision."""

    def centred(rows: torch.Tensor) -> Any:
        x = rows.double().numpy().astype(np.longdouble)
        k = x @ x.T
        np.fill_diagonal(k, 0)
        n, sums = len(k), k.sum(axis=0)
        k = k - (sums[:, None] + sums) / (n - 2) + sums.sum() / ((n - 1) * (n - 2))
        np.fill_diagonal(k, 0)
        return k

    k, other = centred(a), centred(b)
    return float(1 - (k * other).sum() / np.sqrt((k * k).sum() * (other * other).sum()))
