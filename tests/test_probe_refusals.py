"""Probes that cannot be used are one clear error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from probe_models import Reader, TakesXY, ids, record
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from depthcb.probe import Probe


@pytest.mark.parametrize(
    ("batch", "options", "message"),
    [
        (torch.ones(3, 3), {}, "gives 3 rows: a comparison needs at least 4"),
        (torch.ones(4, 3), {"rows": "max"}, "rows='max' is unknown"),
        (torch.ones(4, 3), {"forward": lambda m, b: m.blocks[0](b)}, r"never reached layer blocks\.1"),
        (torch.ones(4, 3), {"forward": lambda m, b: m(m(b))}, r"'blocks\.0' ran several times"),
        (torch.ones(2, 2, 2, 4, 3), {}, r"returns shape \(2, 2, 2, 4, 3\) for a batch of 2"),
        ({"y": torch.ones(4, 3), "z": torch.ones(4)}, {"forward": lambda m, b: m(**b)}, None),
        ({"y": torch.ones(4, 3)}, {}, None),
        ("text", {}, "contains no tensor"),
    ],
)
def test_bad_probes_are_refused(batch: Any, options: dict[str, Any], message: str | None) -> None:
    """Errors of a user's forward function are not changed."""
    with pytest.raises((ValueError, TypeError, AttributeError), match=message):
        record(TakesXY(), batch, **options)


def test_a_mask_of_another_length_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    batch = {"x": torch.rand(4, 5, 3), "attention_mask": torch.ones(4, 6)}
    everything = record(model, batch, forward=lambda m, b: m(b["x"])).rows[1]
    batch["attention_mask"][0, 4:] = 0
    with pytest.raises(ValueError, match=r"returns 5 positions, attention_mask has 6: pass mask=batch -> \(4, 5\)"):
        record(model, batch, forward=lambda m, b: m(b["x"]))
    found = record(model, batch, forward=lambda m, b: m(b["x"]), mask=lambda b: b["attention_mask"][:, :5]).rows[1]
    torch.testing.assert_close(found[1:], everything[1:])
    with torch.no_grad():
        torch.testing.assert_close(found[0], model(batch["x"])[0, :4].mean(dim=0))
    assert torch.equal(record(model, batch, forward=lambda m, b: m(b["x"]), mask=False).rows[1], everything)


def test_a_mask_that_says_nothing_of_padding_is_refused() -> None:
    batch = {"input_ids": ids(4), "attention_mask": torch.ones(4, 1, 7, 7)}
    with pytest.raises(ValueError, match=r"shape \(4, 1, 7, 7\): padding is read from a \(batch, positions\) mask"):
        record(Reader(), batch)


def test_an_example_of_padding_only_is_refused() -> None:
    batch = {"input_ids": ids(4), "attention_mask": torch.ones(4, 7)}
    batch["attention_mask"][2, 1:] = 0
    with pytest.raises(ValueError, match="Example 2 of the probe has no usable position"):
        record(Reader(causal=True), batch)


def test_an_unfit_source_is_refused() -> None:
    with pytest.raises(ValueError, match="probe=int: pass a batch"):
        Probe.collect(3, limit=4)
    with pytest.raises(ValueError, match="The probe has no batch"):
        Probe.collect(TensorDataset(torch.ones(0, 2)), limit=4)


def test_causality_is_decided_on_the_longest_example() -> None:
    """An example with a single token is ambiguous; it is rejected because its only position does not count."""
    mask = torch.ones(5, 7, dtype=torch.int64)
    mask[0, 1:] = 0
    with pytest.raises(ValueError, match="Example 0 of the probe has no usable position"):
        record(Reader(causal=True), {"input_ids": ids(), "attention_mask": mask})


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return sum(branch(x) for branch in self.branches)  # type: ignore[return-value]


def test_layers_side_by_side_are_no_depth() -> None:
    with pytest.raises(ValueError, match=r"'branches\.0' and 'branches\.1' read the same input"):
        record(Branches(), torch.ones(4, 3))


@pytest.mark.parametrize(
    "source",
    [
        [{"input_ids": torch.ones(7, dtype=torch.int64)}] * 5,
        DataLoader([{"input_ids": [1, 2, 3]}] * 5, batch_size=5),
    ],
)
def test_ids_that_are_no_batch_are_refused(source: Any) -> None:
    with pytest.raises(ValueError, match=r"input_ids of a probe batch is a .*with_format\('torch'\)"):
        Probe.collect(source, 8)


def test_a_list_of_modules_needs_a_forward() -> None:
    model = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
    with pytest.raises(ValueError, match="ModuleList has no forward: pass forward="):
        record(model, torch.ones(4, 3))
