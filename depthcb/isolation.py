"""Context managers that restore random states, the state of modules and precision settings on exit."""

from __future__ import annotations

import contextlib
import functools
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

#: Attributes that every module has.
_OWN = frozenset(vars(nn.Module()))
_CONTAINERS = (dict, OrderedDict, defaultdict, Counter, list, set, deque)
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


@contextlib.contextmanager
def isolated(model: nn.Module) -> Iterator[None]:
    """Runs code in fp32 eval mode without gradients; restores flags, module state, random states and precision on exit.

    The state of a module is its buffers and attributes, and what they hold: values, tensors and random generators, also
    in lists, dicts and sets. A torchmetrics metric, a counter or a cache in a module is thus as it was.
    """
    flags = [(m, m.training) for m in model.modules()]
    # nn.TransformerEncoder's fused kernels skip forward hooks, and reject padded inputs when a hook is registered.
    fused = torch.backends.mha.get_fastpath_enabled()
    devices = {p.device.type for p in model.parameters() if not p.is_meta} or {"cpu"}  # meta: weights not read yet
    with contextlib.ExitStack() as scope:
        scope.enter_context(isolated_rng())
        scope.enter_context(_ieee_precision())
        scope.enter_context(torch.no_grad())
        for device in devices:
            scope.enter_context(torch.autocast(device, enabled=False))
        if any(_compiled(m) for m, _ in flags):  # compiled code would silently skip the forward hooks
            scope.enter_context(torch.compiler.set_stance("force_eager"))
        state = [_state(m) for m, _ in flags]
        try:
            for module, _ in flags:
                module.training = False  # not .eval(), because some modules override it with side effects
                if "_original_forward" in vars(module):  # accelerate's, whose own turns autocast on
                    vars(module).pop("forward", None)
            torch.backends.mha.set_fastpath_enabled(False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
            for put_back in state:
                put_back()
            for module, flag in flags:
                module.training = flag


def generators_of(model: nn.Module) -> list[Any]:
    """Returns the random generators that the modules of a model hold, of torch, NumPy or Python."""
    held = (value for module in model.modules() for value in _held(_attributes(module)))
    return [value for value in held if isinstance(value, _GENERATORS)]


@contextlib.contextmanager
def seeded(generators: Sequence[Any], seed: int) -> Iterator[None]:
    """Seeds all random states and these generators: what runs in it draws the same random numbers again.

    Inside of `isolated`, which puts the generators back.
    """
    with isolated_rng(seed):
        for generator in generators:
            if isinstance(generator, torch.Generator):
                generator.manual_seed(seed)
            elif isinstance(generator, np.random.Generator):
                generator.bit_generator.state = type(generator.bit_generator)(seed).state
            else:
                generator.seed(seed)
        yield


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in _OWN}


def _held(value: Any, seen: set[int] | None = None) -> Iterator[Any]:
    """Yields an object, and those in it if it is a container; each once."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    yield value
    if type(value) in (*_CONTAINERS, tuple):
        for item in list(value.values() if isinstance(value, dict) else value):
            yield from _held(item, seen)


def _state(module: nn.Module) -> Callable[[], None]:
    """Returns a function that puts back the buffers and attributes of a module, and what they hold."""
    kind, attributes, buffers = type(module), _attributes(module), dict(module._buffers)
    contents = [put_back for value in _held([attributes, buffers]) if (put_back := _contents(value)) is not None]

    def put_back_all() -> None:
        if type(module) is not kind:  # a lazy module has got its weights
            return
        module._buffers.update(buffers)
        for name in _attributes(module).keys() - attributes.keys():
            del vars(module)[name]
        vars(module).update(attributes)
        for put_back in contents:
            put_back()

    return put_back_all


def _contents(value: Any) -> Callable[[], Any] | None:
    """Returns a function that puts back what an object holds; None for objects that are taken to hold nothing."""
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        return functools.partial(_rewrite, value, value.clone())
    if isinstance(value, torch.Generator):
        return functools.partial(value.set_state, value.get_state())
    if isinstance(value, np.random.Generator):
        return functools.partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return functools.partial(value.set_state, value.get_state())
    if isinstance(value, random.Random):
        return functools.partial(value.setstate, value.getstate())
    if type(value) in _CONTAINERS:
        return functools.partial(_refill, value, dict(value) if isinstance(value, dict) else list(value))
    return None


def _rewrite(tensor: Tensor, before: Tensor) -> None:
    if not torch.equal(tensor, before):
        tensor.copy_(before)


def _refill(container: Any, items: Any) -> None:
    container.clear()
    (container.update if isinstance(container, (dict, set)) else container.extend)(items)


@contextlib.contextmanager
def isolated_rng(seed: int | None = None) -> Iterator[None]:
    """Restores all random states (Python, NumPy, torch on all devices) on exit; optionally seeds them on entry."""
    states = random.getstate(), np.random.get_state()
    cuda = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=cuda):
        try:
            if seed is not None:
                random.seed(seed)
                np.random.seed(seed)
                torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed GPUs not yet initialised
                for device in cuda:
                    torch.cuda.default_generators[device].manual_seed(seed)
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def _compiled(module: nn.Module) -> bool:
    return "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None


@contextlib.contextmanager
def _ieee_precision() -> Iterator[None]:
    """Computes fp32 in fp32, not in TF32 or bf16.

    torch has two generations of switches and raises an error where code reads the older one while they differ, as
    torch.backends.cudnn.flags does: both are set.
    """
    backends: Any = torch.backends
    newer = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
    newer += [backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn]
    before = [backend.fp32_precision for backend in newer]
    older = _older_switches()
    try:
        if older is not None:
            torch.set_float32_matmul_precision("highest")
            backends.cudnn.allow_tf32 = False
        for backend in newer:
            backend.fp32_precision = "ieee"
        yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older[0])
            backends.cudnn.allow_tf32 = older[1]
        for backend, value in zip(newer, before, strict=True):
            backend.fp32_precision = value


def _older_switches() -> tuple[str, bool] | None:
    try:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:  # the user set newer ones alone, so that no code can read these
        return None
