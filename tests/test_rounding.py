"""The rounding error of the probe pass, and the marks of changes that it may give."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from report_cases import printed
from runs import changed, make_runs
from support import TinyLM
from torch import Tensor, nn

from depthcb import LayerStack, report
from depthcb.layout import Layout
from depthcb.probe import Probe
from depthcb.profile import RESOLVED, Profile
from depthcb.reference import Reference
from depthcb.report.groups import UNRESOLVED_NOTE
from depthcb.rounding import rounding_floor
from depthcb.similarity import MEASURES, find_measures
from depthcb.similarity.cka import cka_change

IDS = {"input_ids": torch.randint(1, 61, (48, 12), generator=torch.Generator().manual_seed(0))}
CHOSEN = find_measures(["cka", "cka_normalized", "relative_l2"])


def reference(model: nn.Module, probe: Probe) -> Reference:
    return Reference.record(probe, model, LayerStack.find(model), CHOSEN)


class Recurrent(nn.Module):
    """Asks its weights for their dtype, and gives them to one function in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 8)
        self.layers = nn.ModuleList([nn.LSTM(8, 8, batch_first=True) for _ in range(3)])

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden: Tensor = self.embedding(input_ids)
        for layer in self.layers:
            hidden, _ = layer(hidden)
        return hidden


@pytest.mark.parametrize("make", [lambda: TinyLM().model, Recurrent])
def test_the_floor_is_the_change_between_float32_and_float64(make: Callable[[], nn.Module]) -> None:
    """Against a model that was itself turned into float64."""
    torch.manual_seed(0)
    model, probe = make(), Probe((IDS,))
    before = {name: p.clone() for name, p in model.state_dict().items()}
    found = reference(model, probe)
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    few = Probe(({"input_ids": IDS["input_ids"][:16]},))
    rounded, double = few.record(model, LayerStack.find(model)).rows, copy.deepcopy(model).double()
    exact = few.record(double, LayerStack.find(double)).rows
    assert exact[0].dtype == torch.float64
    for i, (a, b) in enumerate(zip(exact, rounded, strict=True)):
        assert found.floor["cka"][i] == pytest.approx(cka_change(a, b.double()).item(), rel=1e-6)
        l2 = float((a - b.double()).norm() / a.norm())
        assert found.floor["relative_l2"][i] == pytest.approx(l2, rel=1e-6)
    assert 1e-17 < min(found.floor["cka"]) <= max(found.floor["cka"]) < 1e-9
    assert set(found.floor) == {m.name for m in CHOSEN}


def test_a_change_near_the_floor_is_marked_and_a_larger_one_is_right() -> None:
    model, probe = TinyLM().model, Probe((IDS,))
    found, stack = reference(model, probe), LayerStack.find(model)
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for p in tuned.transformer.h[3].parameters():
            p.mul_(1 + 1e-2)
        tuned.transformer.wte.weight[1, 0] += 1e-6  # far below what float32 resolves in the first layers
    profile = found.profiles(probe.record(tuned, LayerStack.find(tuned)), CHOSEN, 0, 0)["cka"]
    assert profile.floor == found.floor["cka"]
    assert 3 not in profile.unresolved
    assert set(profile.unresolved) <= {0, 1, 2}
    still = found.profiles(probe.record(model, stack), CHOSEN, 0, 0)["cka"]
    assert still.unresolved == (), "an unchanged model is exactly 0"


def test_small_changes_are_right_where_they_are_not_marked() -> None:
    """The README's sentence: within a few percent of float64 wherever a layer is not marked."""
    model, probe = TinyLM().model, Probe((IDS,))
    found, double = reference(model, probe), copy.deepcopy(model).double()
    noise = {
        name: torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) for name, p in model.named_parameters()
    }
    exact_reference = Reference.record(probe, double, LayerStack.find(double), CHOSEN)
    seen = 0
    for size in (1e-6, 1e-5, 1e-4, 1e-3):
        tuned, tuned_double = copy.deepcopy(model), copy.deepcopy(double)
        with torch.no_grad():
            for (name, p), q in zip(tuned.named_parameters(), tuned_double.parameters(), strict=True):
                p.add_(noise[name] * size * p.norm() / noise[name].norm())
                q.copy_(p.double())
        got = found.profiles(probe.record(tuned, LayerStack.find(tuned)), CHOSEN, 0, 0)["cka"]
        true = exact_reference.profiles(probe.record(tuned_double, LayerStack.find(tuned_double)), CHOSEN, 0, 0)["cka"]
        for i, (a, b) in enumerate(zip(got.change, true.change, strict=True)):
            if i not in got.unresolved:
                assert a == pytest.approx(b, rel=0.25)
                seen += 1
    assert seen >= 8


class Refuses(nn.Module):
    """Works in float32 alone, as models that cast inside."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.blocks(x.float())
        return out


@pytest.mark.parametrize(
    ("model", "batch"),
    [(Refuses(), torch.randn(32, 4)), (Refuses().blocks.double(), torch.randn(32, 4, dtype=torch.float64))],
)
def test_what_cannot_be_measured_is_left_out(model: nn.Module, batch: Tensor) -> None:
    probe, stack = Probe((batch,)), LayerStack.find(model)
    assert rounding_floor(probe, model, stack, Layout(False, ("BD",) * len(stack)), CHOSEN) == {}
    assert (
        Reference.record(probe, model, stack, CHOSEN).profiles(probe.record(model, stack), CHOSEN, 0, 0)["cka"].floor
        is None
    )


def test_it_survives_a_checkpoint(tmp_path: Path) -> None:
    found = reference(TinyLM().model, Probe((IDS,)))
    torch.save(found.state_dict(), tmp_path / "state.pt")
    again = Reference.from_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert again.floor == found.floor
    older = {key: value for key, value in found.state_dict().items() if key != "floor"}
    assert Reference.from_state_dict(older).floor == {}
    profile = Profile((1e-14, 0.1), ("a", "b"), "cka", floor=(1e-14, 1e-14))
    assert Profile.from_json(profile.to_json()) == profile
    assert profile.unresolved == (0,)
    assert Profile((RESOLVED * 1e-14, 0.0), ("a", "b"), "cka", floor=(1e-14, 1e-14)).unresolved == ()


def test_every_report_marks_it(tmp_path: Path) -> None:
    def low(record: dict[str, Any]) -> None:
        for row in record["rows"]:
            for profile in row["profiles"].values():
                profile["floor"] = [2 * c if i == 1 else 0.0 for i, c in enumerate(profile["change"])]

    runs = [changed(run, "DepthProfile", low) for run in make_runs(arms=2)]
    text = printed(runs)
    assert UNRESOLVED_NOTE[:40] in " ".join(text.split())
    assert sum(" ~" in line for line in text.splitlines()) >= 2
    assert "standard: the change of layers 1 is below 10 x the rounding error" in " ".join(text.split())
    assert UNRESOLVED_NOTE in printed(runs[:1], bars=True)
    report.write_html(runs, tmp_path / "a.html")
    assert UNRESOLVED_NOTE in (tmp_path / "a.html").read_text(encoding="utf-8").replace("&gt;", ">")
    labels = {line.get_label() for ax in report.figure(runs).subfigs[0].axes for line in ax.lines}
    assert any("no evidence" in str(label) for label in labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ax = runs[0].profiles["cka"].plot()
    assert any("no evidence" in str(line.get_label()) for line in ax.lines)
    clean = printed(make_runs(arms=2))
    assert "~" not in clean
    assert np.isfinite(json.loads(json.dumps(runs[0].to_dict()))["records"]["depth"]["rows"][0]["step"])


def test_all_measures_have_a_floor() -> None:
    model, probe = TinyLM().model, Probe((IDS,))
    everything = find_measures(list(MEASURES))
    found = Reference.record(probe, model, LayerStack.find(model), everything).floor
    assert set(found) == set(MEASURES)
    assert all(0 <= value < 1e-4 for floors in found.values() for value in floors)
