"""Selects the training precision: bfloat16 autocast if the device supports it natively, otherwise float32.

A bfloat16 matrix product takes half the time of a float32 one on CPUs with native instructions, but 5 to 50 times as
long on CPUs that emulate them. The CPU flags do not reliably show which is the case, so it is timed.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.nn import functional as F

Product = Callable[[], object]

#: Minimum speedup of bfloat16 over float32 for it to be chosen on a CPU [ours].
WORTH_IT = 1.3
#: A warning is issued if a requested precision takes this many times as long as float32 [ours].
TOO_SLOW = 2.0
#: Timing stops early if a product takes this many times as long as float32.
HOPELESS = 10.0
ROUNDS = 7
#: Environment variable that passes the choice to the other processes of a fit.
_SETTLED = "DEPTHCB_PRECISION"
_DTYPES = {
    "bf16-mixed": torch.bfloat16,
    "bf16-true": torch.bfloat16,
    "16-mixed": torch.float16,
    "16-true": torch.float16,
}


@dataclass(frozen=True)
class Precision:
    """A precision and the reason for it.

    Args:
        precision: The ``precision`` argument of `lightning.pytorch.Trainer`.
        reason: One clause, including the measured values.
    """

    precision: str
    reason: str

    def __str__(self) -> str:
        return f"Precision {self.precision}: {self.reason}."

    def to_dict(self) -> dict[str, str]:
        """Returns a JSON-serialisable dict."""
        return asdict(self)


def settle(asked: Any, device: torch.device) -> Precision:
    """Returns the precision of a fit: the requested one, or for ``"auto"``, the best one for the device.

    A requested precision is always used, with a warning if it is slow on this device. In a fit on several devices, all
    processes use the choice of the first one.

    Args:
        asked: The ``precision`` argument of Lightning's Trainer, or ``"auto"``.
        device: Device that the fit runs on.
    """
    if asked == "auto":
        settled = os.environ.get(_SETTLED) if int(os.environ.get("LOCAL_RANK", 0)) else None
        choice = Precision(**json.loads(settled)) if settled else choose(device)
        os.environ[_SETTLED] = json.dumps(choice.to_dict())
        return choice
    dtype = _DTYPES.get(str(asked))
    if dtype is not None:
        speed = speedup(product(device, dtype), product(device, torch.float32))
        if speed <= 1 / TOO_SLOW:
            rank_zero_warn(
                f"precision={asked} was requested, but its matrix products take {1 / speed:.1f} times as long as in "
                f"float32 on this {device.type}: remove it or use precision=auto."
            )
    return Precision("32-true" if asked is None else str(asked), "requested")


def choose(device: torch.device, products: Callable[[torch.device, torch.dtype], Product] | None = None) -> Precision:
    """Returns the best precision for a device [ours]; float16 is never chosen.

    Args:
        device: Device to train on.
        products: Returns the matrix product to time on a CPU, given the device and a dtype; defaults to `product`.

    Example:
        >>> choose(torch.device("meta")).precision
        '32-true'
    """
    if device.type == "cuda":
        major, minor = min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
        # torch.cuda.is_bf16_supported() also returns True for emulation.
        native, name = major >= 8, torch.cuda.get_device_name(device)
        verb = "computes" if native else "does not compute"
        reason = f"{name}, compute capability {major}.{minor}, {verb} bfloat16 natively"
        return Precision("bf16-mixed" if native else "32-true", reason)
    if device.type != "cpu":
        return Precision("32-true", f"bfloat16 is not chosen on {device.type}")
    make = products or product
    speed = speedup(make(device, torch.bfloat16), make(device, torch.float32))
    result = f"{speed:.1f} times as fast as" if speed >= 1 else f"{1 / speed:.1f} times slower than"
    reason = f"a bfloat16 matrix product is {result} a float32 one on this CPU (threshold: {WORTH_IT} times as fast)"
    return Precision("bf16-mixed" if speed >= WORTH_IT else "32-true", reason)


def product(device: torch.device, dtype: torch.dtype) -> Product:
    """Returns a function that computes a matrix product of 256 x 384 and 384 x 768 under autocast, like a linear layer.

    Args:
        device: Device of the tensors.
        dtype: Autocast dtype; float32 disables autocast.
    """
    x, weight = torch.ones(256, 384, device=device), torch.ones(768, 384, device=device)

    def multiply() -> None:
        with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            F.linear(x, weight)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return multiply


def speedup(candidate: Product, baseline: Product) -> float:
    """Returns the speedup of a candidate over a baseline: the ratio of median times of alternating calls after warm-up.

    Takes about 20 milliseconds; a very slow candidate is only called twice.
    """
    rounds = []
    with _one_thread():
        for warm_up in (baseline, candidate):
            warm_up()
        for _ in range(ROUNDS):
            rounds.append((_seconds(baseline), _seconds(candidate)))
            if rounds[0][1] > HOPELESS * rounds[0][0]:
                break
    usual, new = (statistics.median(times) for times in zip(*rounds, strict=True))
    return float(usual / new)


def device_of(accelerator: Any) -> torch.device:
    """Returns the device that a Trainer's ``accelerator`` argument selects on this machine.

    Example:
        >>> device_of("cpu")
        device(type='cpu')
    """
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", 0)
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu" if accelerator in ("auto", "cpu") else "meta")  # unknown


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Limits torch to one thread; on a busy machine, thread synchronisation would dominate the timing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _seconds(call: Product) -> float:
    # On a CPU, thread time, which other processes do not affect; with a GPU, wall-clock time, which includes waiting.
    clock: Callable[[], float] = time.perf_counter if torch.cuda.is_available() else time.thread_time
    start = clock()
    call()
    return clock() - start


if __name__ == "__main__":  # run by a study, whose own process does not import torch
    print(json.dumps(choose(device_of(sys.argv[1])).to_dict()))
