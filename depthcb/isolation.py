"""Context managers that restore random states, train/eval flags, buffers and precision settings on exit."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn


@contextlib.contextmanager
def isolated(model: nn.Module) -> Iterator[None]:
    """Runs code in fp32 eval mode without gradients; restores flags, buffers, random states and precision on exit."""
    flags = [(m, m.training) for m in model.modules()]
    buffers = [(m, n, b, b.clone()) for m, _ in flags for n, b in m._buffers.items() if b is not None]
    # nn.TransformerEncoder's fused kernels skip forward hooks, and reject padded inputs when a hook is registered.
    fused = torch.backends.mha.get_fastpath_enabled()
    precision = [(b, b.fp32_precision) for b in _fp32_backends()]
    devices = {p.device.type for p in model.parameters()} or {"cpu"}
    with contextlib.ExitStack() as scope:
        scope.enter_context(isolated_rng())
        scope.enter_context(torch.no_grad())
        for device in devices:
            scope.enter_context(torch.autocast(device, enabled=False))
        if any(_compiled(m) for m, _ in flags):  # compiled code would silently skip the forward hooks
            scope.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            for module, _ in flags:
                module.training = False  # not .eval(), because some modules override it with side effects
            for backend, _ in precision:
                backend.fp32_precision = "ieee"
            torch.backends.mha.set_fastpath_enabled(False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
            for module, name, buffer, before in buffers:
                module._buffers[name] = buffer
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
            for module, flag in flags:
                module.training = flag
            for backend, value in precision:
                backend.fp32_precision = value


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


def _fp32_backends() -> Sequence[Any]:
    backends: Any = torch.backends
    return (
        backends.cuda.matmul,
        backends.cudnn.conv,
        backends.cudnn.rnn,
        backends.mkldnn.matmul,
        backends.mkldnn.conv,
    )
