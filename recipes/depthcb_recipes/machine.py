"""What this process may use of the machine: cores and memory, within the limits of its container or batch job."""

from __future__ import annotations

import contextlib
import gc
import math
import os
from collections.abc import Iterator
from pathlib import Path

#: Where Linux shows control groups, and those that this process is in.
_CGROUPS, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def available_cores() -> int:
    """Cores that this process may run on: its affinity, and the quota of its control group, not all there are."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    quotas = []
    for group in _control_groups("cpu"):
        with contextlib.suppress(OSError, ValueError):
            quota, period = (group / "cpu.max").read_text().split()
            quotas.append(int(quota) / int(period))  # "max" is no number
        with contextlib.suppress(OSError, ValueError):
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if int(quota) > 0:
                quotas.append(int(quota) / int(period))
    return max(1, math.floor(min([cores, *quotas])))


def free_memory() -> int:
    """Bytes that this process can still take without swapping, by the machine and by its control group.

    Raises:
        ModuleNotFoundError: psutil is not installed.
    """
    import psutil

    found = [int(psutil.virtual_memory().available)]
    for group in _control_groups("memory"):
        for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            with contextlib.suppress(OSError, ValueError):
                found.append(int((group / limit).read_text()) - int((group / used).read_text()) + _cached(group))
    return max(0, min(found))


def release_memory() -> None:
    """Hands back to the system what a fit that is over has left: 3.5 GB of 4.7 on the demo's larger network.

    An optimizer's state is only reachable in circles, and glibc keeps what is freed in small pieces.
    """
    import ctypes

    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library, or Windows
        ctypes.CDLL(None).malloc_trim(0)


def use_threads_politely() -> None:
    """Sets the threads of a process that is ours, before torch is imported; what the user has set stays.

    A thread that waits for another one spins by default. Beside other work, it thereby holds the core that the other
    one needs: a training step on two threads took 1.5 times as long beside one busy process on two cores. Waiting
    passively costs a tenth on an idle machine.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(available_cores()))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _control_groups(controller: str) -> Iterator[Path]:
    """The folders of this process's control group and those around it, of either version; Linux has them."""
    with contextlib.suppress(OSError):
        for line in _OWN.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            root = _CGROUPS / controller if controllers else _CGROUPS
            inner = root / path.lstrip("/")
            yield from (group for group in (inner, *inner.parents) if group.is_relative_to(root))


def _cached(group: Path) -> int:
    """Bytes of files that count as used and are given up when needed."""
    with contextlib.suppress(OSError):
        for line in (group / "memory.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name in ("inactive_file", "total_inactive_file"):
                return int(value)
    return 0
