"""Which precision to train in: bfloat16 autocast where the device computes it natively, else float32.

A bfloat16 matrix product takes half the time of a float32 one on a CPU that has instructions for it, and 5 to 50 times
as long on one that emulates them. What a CPU lists as its capabilities does not say which, so it is timed.
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

#: bfloat16 must be this many times as fast as float32 on a CPU to be chosen [ours].
WORTH_IT = 1.3
#: A precision that somebody named is warned about when it takes this many times as long as float32 [ours].
TOO_SLOW = 2.0
#: After its warm-up, a product that takes this many times as long as float32 needs no further timing.
HOPELESS = 10.0
ROUNDS = 7
#: The variable by which a fit's further processes learn the choice.
_SETTLED = "DEPTHCB_PRECISION"
_DTYPES = {
    "bf16-mixed": torch.bfloat16,
    "bf16-true": torch.bfloat16,
    "16-mixed": torch.float16,
    "16-true": torch.float16,
}


@dataclass(frozen=True)
class Precision:
    """A precision and why it is used.

    Args:
        precision: What `lightning.pytorch.Trainer` takes.
        reason: One clause, with the figures that decided.
    """

    precision: str
    reason: str

    def __str__(self) -> str:
        return f"Precision {self.precision}: {self.reason}."

    def to_dict(self) -> dict[str, str]:
        """The choice as JSON has it."""
        return asdict(self)


def settle(asked: Any, device: torch.device) -> Precision:
    """The precision of a fit: the one that is asked for, or for ``"auto"`` the one that suits the device.

    A precision that was named and is slow here is used, with one warning. Further processes of a fit on several
    devices use what the first one settled.

    Args:
        asked: As Lightning's Trainer takes it, or ``"auto"``.
        device: What the fit runs on.
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
                f"precision={asked} was asked for, but its matrix products take {1 / speed:.1f} times as long as "
                f"float32's on this {device.type}: leave it out, or give precision=auto."
            )
    return Precision("32-true" if asked is None else str(asked), "asked for")


def choose(device: torch.device, products: Callable[[torch.device, torch.dtype], Product] | None = None) -> Precision:
    """The precision that suits a device [ours]; float16 is never chosen.

    Args:
        device: What is to be trained on.
        products: Makes the product that is timed on a CPU, from the device and a dtype; by default `product`.

    Example:
        >>> choose(torch.device("meta")).precision
        '32-true'
    """
    if device.type == "cuda":
        major, minor = min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
        # is_bf16_supported() would also count emulation.
        native, name = major >= 8, torch.cuda.get_device_name(device)
        verb = "computes" if native else "does not compute"
        reason = f"{name}, compute capability {major}.{minor}, {verb} bfloat16 natively"
        return Precision("bf16-mixed" if native else "32-true", reason)
    if device.type != "cpu":
        return Precision("32-true", f"bfloat16 is not chosen on {device.type}")
    make = products or product
    speed = speedup(make(device, torch.bfloat16), make(device, torch.float32))
    told = f"{speed:.1f} times as fast as" if speed >= 1 else f"{1 / speed:.1f} times slower than"
    reason = f"a bfloat16 matrix product is {told} a float32 one on this CPU ({WORTH_IT} times as fast is worth it)"
    return Precision("bf16-mixed" if speed >= WORTH_IT else "32-true", reason)


def product(device: torch.device, dtype: torch.dtype) -> Product:
    """A matrix product of 256 x 384 and 384 x 768 under autocast, as a layer of a network makes it.

    Args:
        device: Where it is computed.
        dtype: float32 for no autocast.
    """
    x, weight = torch.ones(256, 384, device=device), torch.ones(768, 384, device=device)

    def multiply() -> None:
        with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            F.linear(x, weight)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return multiply


def speedup(candidate: Product, baseline: Product) -> float:
    """How many times as fast as a baseline a candidate is: the ratio of the medians of alternating, warmed-up calls.

    Takes some 20 milliseconds; a candidate that is hopelessly slow is called twice only.
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
    """The kind of device that a Trainer's ``accelerator`` means on this machine.

    Example:
        >>> device_of("cpu")
        device(type='cpu')
    """
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", 0)
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu" if accelerator in ("auto", "cpu") else "meta")  # none that is known


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Two threads that wait for each other on a busy machine would decide, not the arithmetic."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _seconds(call: Product) -> float:
    # The time of this thread, which other processes do not change, plus that in which it waits for a GPU.
    clock: Callable[[], float] = time.perf_counter if torch.cuda.is_available() else time.thread_time
    start = clock()
    call()
    return clock() - start


if __name__ == "__main__":  # a study asks, whose own process is to stay free of torch
    print(json.dumps(choose(device_of(sys.argv[1])).to_dict()))
