"""The same training in Lightning, a plain loop, Fabric and transformers' Trainer gives the same numbers and records."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from front_ends.same import Outcome, with_a_plain_loop, with_fabric, with_lightning, with_transformers

OTHERS: dict[str, Callable[[Path], Outcome]] = {
    "plain": with_a_plain_loop,
    "fabric": with_fabric,
    "transformers": with_transformers,
}


@pytest.fixture(scope="module")
def lightning(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return with_lightning(tmp_path_factory.mktemp("lightning"))


@pytest.mark.parametrize("name", OTHERS)
def test_the_same_training_gives_the_same_numbers_and_record(name: str, lightning: Outcome, tmp_path: Path) -> None:
    found = OTHERS[name](tmp_path)
    assert torch.equal(found.weights, lightning.weights)
    assert found.run.control == lightning.run.control == "equal-step"
    assert found.run.finished
    assert found.run.unpaired == ""
    for measure, profiles in lightning.profiles.items():
        assert [p.change for p in found.profiles[measure]] == [p.change for p in profiles]
        assert profiles[-1].mean > 1e-4
    assert found.run.records.keys() == lightning.run.records.keys() == {"depth", "equal_step", "update_ratio"}
    for name, record in lightning.run.records.items():
        assert found.rows(name) == lightning.rows(name)
        assert len(record.rows) == (2 if name == "depth" else 8)
        same = {"probe_hash", "rows", "distinct", "effective_rank", "causal", "target", "outside", "decay", "measures"}
        kept = [{k: v for k, v in r.settings.items() if k in same} for r in (record, found.run.records[name])]
        assert kept[0] == kept[1]
        layers = found.run.records[name].settings["layers"]
        assert [f"net.{layer}" for layer in layers] == record.settings["layers"]
        assert record.callback == found.run.records[name].callback
        assert record.fit["optimizers"] == found.run.records[name].fit["optimizers"]
