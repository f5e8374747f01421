"""A reference whose examples did not fit its rows was resumed: later profiles had no interval and a wrong row count."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from depthcb import LayerStack
from depthcb.probe import Probe
from depthcb.reference import Reference
from depthcb.similarity import find_measures


@pytest.mark.parametrize("examples", [torch.arange(3), torch.arange(17)])
def test_it_is_refused(examples: torch.Tensor) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    probe, measures = Probe((torch.randn(16, 4),)), find_measures(["cka", "cosine"])
    state = Reference.record(probe, model, LayerStack.find(model), measures).state_dict()
    assert Reference.from_state_dict(state).probe_hash == probe.hash
    with pytest.raises(ValueError, match="do not match the layers and rows"):
        Reference.from_state_dict(state | {"examples": examples})
