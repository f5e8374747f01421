"""Cost limits of the callbacks: no device syncs between logs, one copy of the stack, a reference of constant size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from support import TinyLM, fit, seeded
from torch import nn
from torch.overrides import TorchFunctionMode

from depthcb import DepthProfile, EqualStep, LayerStack, UpdateRatioMonitor
from depthcb.engine import StepEqualizer
from depthcb.probe import Probe
from depthcb.reference import Reference
from depthcb.similarity import find_measures

#: Not `torch.equal`, which is only used on a CPU: see the test on another device.
READS = {
    "tolist",
    "item",
    "__bool__",
    "__float__",
    "__int__",
    "__index__",
    "cpu",
    "numpy",
    "nonzero",
    "unique",
}


class CountReads(TorchFunctionMode):
    """Counts operations that synchronise a GPU: reading a value back, or a data-dependent shape."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads += getattr(func, "__name__", "") in READS
        return func(*args, **(kwargs or {}))


def watched(make: type[Callback], **arguments: Any) -> tuple[Any, list[int]]:
    """A callback that records the syncs of each of its optimizer-step hooks."""
    per_step: list[int] = []

    class Watched(make):  # type: ignore[misc, valid-type]
        def on_before_optimizer_closure(self, *args: Any) -> None:
            with CountReads() as mode:
                super().on_before_optimizer_closure(*args)
            per_step.append(mode.reads)

        def on_after_optimizer_step(self, *args: Any) -> None:
            with CountReads() as mode:
                super().on_after_optimizer_step(*args)
            per_step[-1] += mode.reads

    return Watched(**arguments), per_step


def test_nothing_is_read_back_between_logs() -> None:
    """Except which sums must be repeated, and which are not finite, on a CPU, where there is nothing to wait for."""
    targets: list[Any] = ["mean", "median", "min", "geometric_mean", 1e-3, (1.0, 2.0, 3.0, 4.0), lambda r, step: r]
    callbacks = [(2, *watched(EqualStep, target=target)) for target in targets] + [(0, *watched(UpdateRatioMonitor))]
    for allowed, callback, per_step in callbacks:
        fit(seeded(TinyLM), [callback], log_every_n_steps=4, max_steps=8, max_epochs=2)
        assert [reads > allowed for reads in per_step] == [False] * 3 + [True] + [False] * 3 + [True]


@pytest.mark.parametrize("target", ["mean", "median", "min", "geometric_mean", 1e-3, lambda ratios, step: ratios * 2])
def test_nothing_is_read_back_from_another_device(target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device has no values: reading one is an error."""
    monkeypatch.setattr("depthcb.engine.equalizer._check_weights", lambda groups: None)  # reads norms, once per fit
    model = nn.Sequential(*[nn.Linear(8, 8, device="meta") for _ in range(4)])
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    control = StepEqualizer(target=target, every=1000).attach(model, [optimizer])
    for _ in range(3):
        control.keep_weights()  # as after a logged step
        optimizer.step()
    control.detach()
    assert control.steps_made == 3
    with pytest.raises(RuntimeError, match="meta"):
        control.check_weights()  # as at a logged step, which waits for the device


def test_equal_step_keeps_one_copy_of_the_stack() -> None:
    control, module = EqualStep(), seeded(TinyLM)
    fit(module, [control])
    kept = sum(t.numel() for t in control.equalizer._steps._copies.values())
    assert kept == sum(p.numel() for layer in LayerStack.find(module).parameters() for p in layer)


def test_the_reference_does_not_grow_with_width_or_time() -> None:
    def size(width: int) -> int:
        model = nn.Sequential(*[nn.Linear(width, width) for _ in range(3)])
        batch = torch.randn(16, width)
        reference = Reference.record(Probe((batch,)), model, LayerStack.find(model), find_measures(["cka"]))
        return sum(t.nbytes for kind in reference.sketches.values() for t in kind)

    assert size(8) == size(512) == 3 * 16 * 16 * 8
    watch = DepthProfile()
    fit(seeded(TinyLM), [watch], val_check_interval=1)
    sketches = watch.state_dict()["reference"]["sketches"]
    assert list(sketches) == ["gram"]
    assert [tuple(k.shape) for k in sketches["gram"]] == [(16, 16)] * 4
