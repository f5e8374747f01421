"""How time and memory grow with the size of the model, the probe and the fit: exponents fitted over a wide range."""

from __future__ import annotations

import functools
import io
import time
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from benchmarking import alternate, note
from dispatched import Dispatched
from torch import nn

from depthcb.engine import ProfileRecorder, StepEqualizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
Cost = tuple[float, float]  # seconds and bytes


def cost(run: Callable[[], object], repeats: int = 3) -> Cost:
    """Returns the least seconds that a call takes, and the most memory that tensors need in it at once."""
    with Dispatched() as counting:
        run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds), float(counting.peak)


def exponents(costs: Mapping[int, Cost]) -> tuple[float, float]:
    """Returns the exponents of time and memory in a size, fitted to the logarithms."""
    sizes = np.log(list(costs))
    seconds, memory = (np.polyfit(sizes, np.log(values), 1)[0] for values in zip(*costs.values(), strict=True))
    return float(seconds), float(memory)


def measuring(layers: int = 12, rows: int = 256, width: int = 256) -> Callable[[], object]:
    """One measurement of a model of single matrices."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)])
    recorder = ProfileRecorder(torch.randn(rows, width))
    recorder.prepare(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1e-3 * torch.randn_like(p))
    return lambda: recorder.measure(0)


@pytest.mark.parametrize(
    ("name", "sizes", "limits"),
    [
        ("layers", (6, 12, 24, 48), (1.1, 1.1)),
        ("rows", (128, 256, 512, 1024, 2048), (2.2, 2.2)),  # the Gram matrices have n x n numbers
        ("width", (512, 1024, 2048, 4096), (2.1, 2.1)),  # the matrices of the model have d x d
    ],
)
def test_a_measurement_grows_as_its_matrices(name: str, sizes: tuple[int, ...], limits: tuple[float, float]) -> None:
    found = exponents({size: cost(measuring(**{name: size})) for size in sizes})
    for what, exponent, limit in zip(("time", "memory"), found, limits, strict=True):
        note(f"exponent of a measurement's {what} in {name}", exponent, limit)
        assert exponent < limit


def check_no_growth(what: str, runs: Mapping[int, Callable[[], object]], states: Mapping[int, object]) -> None:
    """Checks the time of a call, in turns, and the size of the state by the number of calls before."""
    times = alternate({str(before): run for before, run in runs.items()}, rounds=250)
    costs = {before: (float(np.median(times[str(before)])), _bytes(states[before])) for before in runs}
    for kind, exponent in zip(("time", "size of its state"), exponents(costs), strict=True):
        note(f"exponent of {what}'s {kind} in those before", exponent, 0.1)
        assert exponent < 0.1


def _bytes(state: object) -> float:
    file = io.BytesIO()
    torch.save(state, file)
    return float(file.tell())


def test_a_measurement_does_not_grow_with_those_before() -> None:
    def measured(times: int) -> ProfileRecorder:
        torch.manual_seed(0)
        recorder = ProfileRecorder(torch.randn(64, 32))
        model = nn.Sequential(*[nn.Linear(32, 32) for _ in range(6)])
        for layer in model:
            nn.init.orthogonal_(layer.weight)
        recorder.prepare(model)
        for number in range(times):
            recorder.measure(number)
        return recorder

    recorders = {before: measured(before) for before in (500, 1000, 2000)}
    states = {before: recorder.state_dict() for before, recorder in recorders.items()}
    runs = {before: functools.partial(recorder.measure, before) for before, recorder in recorders.items()}
    check_no_growth("a measurement", runs, states)


def test_a_logged_step_does_not_grow_with_those_before() -> None:
    controls, runs = {}, {}
    for before in (2_000, 10_000, 50_000):
        model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(6)])
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        controls[before] = StepEqualizer().attach(model, [optimizer], log=lambda row, step: None)
        runs[before] = optimizer.step
        for _ in range(before):
            optimizer.step()
    check_no_growth("a logged step", runs, {before: control.state_dict() for before, control in controls.items()})
    for control in controls.values():
        control.detach()


@pytest.mark.parametrize("width", [768, 4096])
def test_the_reference_of_a_large_model(width: int) -> None:
    """48 layers and 1,024 rows: its size does not depend on the width."""
    torch.manual_seed(0)
    recorder = ProfileRecorder(torch.randn(1024, width))
    recorder.prepare(nn.Sequential(*[nn.Linear(width, width) for _ in range(48)]))
    file = io.BytesIO()
    torch.save(recorder.state_dict(), file)
    file.seek(0)
    start = time.perf_counter()
    resumed = ProfileRecorder(torch.randn(1024, width))
    resumed.load_state_dict(torch.load(file, weights_only=True))
    note(f"seconds to load the state of 48 layers of width {width}, 1,024 rows", time.perf_counter() - start, 10)
    size = file.getbuffer().nbytes / (48 * 1024**2 * 8)
    note(f"size of the state of 48 layers of width {width}, in 48 n x n matrices of float64", size, 1.02)
    assert size < 1.02
