"""Cores and memory available to this process, within the limits of its container or batch job."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

#: Linux control groups: mount point, and list of the groups of this process.
_CGROUPS, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def available_cores() -> int:
    """Returns the number of cores this process may use, given its CPU affinity and control group quota."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    quotas = []
    for group in _control_groups("cpu"):
        with contextlib.suppress(OSError, ValueError):
            quota, period = (group / "cpu.max").read_text().split()
            quotas.append(int(quota) / int(period))  # raises ValueError for "max" (no quota)
        with contextlib.suppress(OSError, ValueError):
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if int(quota) > 0:
                quotas.append(int(quota) / int(period))
    return max(1, math.floor(min([cores, *quotas])))


def free_memory() -> int:
    """Returns the bytes this process can still allocate without swapping, given the machine and control group limits.

    Raises:
        ModuleNotFoundError: If psutil is not installed.
    """
    import psutil

    limits = [int(psutil.virtual_memory().available)]
    for group in _control_groups("memory"):
        for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            with contextlib.suppress(OSError, ValueError):
                limits.append(int((group / limit).read_text()) - int((group / used).read_text()) + _cached(group))
    return max(0, min(limits))


def peak_memory() -> int:
    """Returns the most bytes of main memory that this process has held so far (Linux and macOS)."""
    with contextlib.suppress(OSError, StopIteration):  # on Linux, what `getrusage` says may be its parent's
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def release_memory() -> None:
    """Returns memory of a finished fit to the system: 3.5 of 4.7 GB for the demo's larger network.

    Optimizer state is only referenced by cycles, and glibc keeps small freed blocks.
    """
    import ctypes

    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # not glibc, or Windows
        ctypes.CDLL(None).malloc_trim(0)


def use_threads_politely() -> None:
    """Limits OpenMP threads to the available cores and makes them wait passively, unless set by the user.

    Must be called before torch is imported. Waiting threads spin by default and so occupy cores that other threads
    need: with another busy process on two cores, a training step on two threads took 1.5 times as long. Passive waiting
    costs 10 % on an idle machine.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(available_cores()))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _control_groups(controller: str) -> Iterator[Path]:
    """Yields the folders of this process's control groups and their parents (cgroup v1 and v2, Linux only)."""
    with contextlib.suppress(OSError):
        for line in _OWN.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            root = _CGROUPS / controller if controllers else _CGROUPS
            inner = root / path.lstrip("/")
            yield from (group for group in (inner, *inner.parents) if group.is_relative_to(root))


def _cached(group: Path) -> int:
    """Returns the bytes of reclaimable page cache, which count as used."""
    with contextlib.suppress(OSError):
        for line in (group / "memory.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name in ("inactive_file", "total_inactive_file"):
                return int(value)
    return 0
