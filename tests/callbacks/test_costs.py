"""Cost limits of the callbacks: no device syncs between logs, one copy of the stack, a reference of constant size."""

from __future__ import annotations

import io
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from dispatched import Dispatched
from lightning.pytorch.callbacks import Callback
from support import TinyLM, fit, seeded
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

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
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += getattr(func, "__name__", "") in READS
        return func(*args, **(kwargs or {}))


def watched(make: type[Callback], mode: type[CountReads | Dispatched], **arguments: Any) -> tuple[Any, list[int]]:
    """A callback, and a list of what the mode counts in the hooks of each optimizer step."""
    per_step: list[int] = []

    class Watched(make):  # type: ignore[misc, valid-type]
        def on_before_optimizer_closure(self, *args: Any) -> None:
            with mode() as counting:
                super().on_before_optimizer_closure(*args)
            per_step.append(counting.count)

        def on_after_optimizer_step(self, *args: Any) -> None:
            with mode() as counting:
                super().on_after_optimizer_step(*args)
            per_step[-1] += counting.count

    return Watched(**arguments), per_step


def test_nothing_is_read_back_between_logs() -> None:
    """Except, once, which sums must be repeated on a CPU, where there is nothing to wait for."""
    targets: list[Any] = ["mean", "median", "min", "geometric_mean", 1e-3, (1.0, 2.0, 3.0, 4.0), lambda r, step: r]
    callbacks = [(1, *watched(EqualStep, CountReads, target=target)) for target in targets]
    callbacks.append((0, *watched(UpdateRatioMonitor, CountReads)))
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
        control.note_weights()  # as after a logged step
        optimizer.step()
    control.detach()
    assert control.steps_made == 3
    with pytest.raises(RuntimeError, match="meta"):
        control.check_weights()  # as at a logged step, which waits for the device


class ToMainMemory(TorchDispatchMode):
    """Lets tensors without values be copied to main memory, where nothing arrives."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._foreach_copy_.default, torch.ops.aten.copy_.default):
            pairs = zip(args[0], args[1], strict=True) if isinstance(args[0], list) else [args[:2]]
            if any(to.device.type == "cpu" and source.is_meta for to, source in pairs):
                return None if isinstance(args[0], list) else args[0]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("every", [1, 1000])
def test_the_copy_can_be_kept_in_main_memory(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every operation then gets its tensors on the other device, or it is an error."""
    monkeypatch.setattr("depthcb.engine.equalizer._check_weights", lambda groups: None)
    monkeypatch.setattr(StepEqualizer, "raise_if_broken", lambda self: None)
    monkeypatch.setattr(StepEqualizer, "_log_step", lambda self, sums: None)
    monkeypatch.setattr(StepEqualizer, "check_weights", lambda self: None)
    model = nn.Sequential(*[nn.Linear(700, 700, device="meta") for _ in range(4)])
    control, optimizer = control_of(model, every, offload=True)
    with ToMainMemory():
        for _ in range(3):
            control.before_step(optimizer)
            control.after_step(optimizer)
    assert {copy.device.type for copy in control._steps._copies.values()} == {"cpu"}
    assert len(control._steps._copies) == 8


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("offload", [False, True])
def test_a_gpu_is_not_waited_for(offload: bool) -> None:
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Linear(700, 700) for _ in range(4)])
        gradients = [torch.randn_like(p) for p in model.parameters()]
        model.to(device)
        control, optimizer = control_of(model, 1000, offload=offload)
        for p, gradient in zip(model.parameters(), gradients, strict=True):
            p.grad = gradient.to(device)
        for step in range(4):
            control.before_step(optimizer)
            optimizer.step()
            torch.cuda.set_sync_debug_mode("error" if step else "default")
            control.after_step(optimizer)
            torch.cuda.set_sync_debug_mode("default")
        results.append([p.detach().cpu() for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def control_of(model: nn.Module, every: int, **arguments: Any) -> tuple[StepEqualizer, torch.optim.Optimizer]:
    """A control that is not attached yet, and an optimizer with gradients."""
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    control = StepEqualizer(every=every, **arguments)
    control.prepare(model, [optimizer])
    return control, optimizer


@pytest.mark.parametrize("every", [1, 1000])
def test_the_control_keeps_one_copy_also_while_logging(every: int) -> None:
    """All further memory is in blocks of 1 MB, of which two are in use at a time at most."""
    model = nn.Sequential(*[nn.Linear(700, 700) for _ in range(4)])
    control, optimizer = control_of(model, every)
    size = sum(p.nbytes for p in model.parameters())
    control.note_weights()
    with Dispatched() as first:
        control.before_step(optimizer)
    assert sum(first.allocated) == size
    for _ in range(3):
        optimizer.step()
        with Dispatched() as later:
            control.after_step(optimizer)
            control.before_step(optimizer)
        assert max(later.allocated) <= 2**20
    control.after_step(optimizer)
    assert control.steps_made == 4


@pytest.mark.parametrize(("every", "passes"), [(1000, 8), (1, 11)])
def test_how_often_the_control_reads_and_writes_the_weights(every: int, passes: int) -> None:
    """Passes over the parameters or their copy; a logged step measures what it has realised."""
    model = nn.Sequential(*[nn.Linear(700, 700) for _ in range(4)])
    control, optimizer = control_of(model, every)
    for _ in range(3):
        watched = [*model.parameters(), *control._steps._copies.values()]
        with Dispatched(watched) as before:
            control.before_step(optimizer)
        optimizer.step()
        with Dispatched(watched) as after:
            control.after_step(optimizer)
    size = sum(p.nbytes for p in model.parameters())
    assert before.traffic == 2 * size
    assert passes - 0.1 < (before.traffic + after.traffic) / size <= passes


def test_a_monitor_does_nothing_at_steps_that_it_does_not_log() -> None:
    monitor, operations = watched(UpdateRatioMonitor, Dispatched)
    fit(seeded(TinyLM), [monitor], log_every_n_steps=4, max_steps=8, max_epochs=2)
    assert [bool(count) for count in operations] == [False] * 3 + [True] + [False] * 3 + [True]


def test_checkpoints_do_not_grow_with_the_number_of_validations() -> None:
    watch = DepthProfile()
    fit(seeded(TinyLM), [watch])
    profiles = watch.profiles_by_measure
    (first, *_), sizes = profiles["cka"], []
    for count in (511, 1000, 2000):
        for measure, (profile, *_) in profiles.items():
            profiles[measure][:] = [replace(profile, step=step) for step in range(count)]
        file = io.BytesIO()
        torch.save(watch.state_dict(), file)
        sizes.append(file.tell())
        resumed = DepthProfile()
        resumed.load_state_dict(watch.state_dict())
        steps = [profile.step for profile in resumed.profiles]
        assert (len(steps), steps[0], steps[-1]) == (min(count, 512), 0, count - 1)
        assert max(b - a for a, b in itertools.pairwise(steps)) <= count / 512 + 2
        assert resumed.profiles[0] == replace(first, step=0)
    assert sizes[2] < 1.01 * sizes[1] < 1.05 * sizes[0]


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
