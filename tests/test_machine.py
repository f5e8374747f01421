"""Cores and memory within the limits of a container, tested with simulated control group files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from depthcb_recipes import machine


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cgroup v2 tree with this process in ``/job/step``."""
    (tmp_path / "job" / "step").mkdir(parents=True)
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path)
    monkeypatch.setattr(machine, "_OWN", tmp_path / "own")
    (tmp_path / "own").write_text("0::/job/step\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    return tmp_path


@pytest.mark.parametrize(("quota", "cores"), [("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1)])
def test_a_quota_of_the_processor_counts_wherever_above_it_is_set(groups: Path, quota: str, cores: int) -> None:
    (groups / "job" / "cpu.max").write_text(f"{quota}\n")
    (groups / "job" / "step" / "cpu.max").write_text("max 100000\n")
    assert machine.available_cores() == cores


def test_version_1_says_it_in_other_files(groups: Path) -> None:
    (groups / "own").write_text("4:memory:/job\n1:cpu,cpuacct:/job\n")
    (groups / "cpu" / "job").mkdir(parents=True)
    (groups / "cpu" / "job" / "cpu.cfs_quota_us").write_text("300000\n")
    (groups / "cpu" / "job" / "cpu.cfs_period_us").write_text("100000\n")
    assert machine.available_cores() == 3
    (groups / "cpu" / "job" / "cpu.cfs_quota_us").write_text("-1\n")  # no quota
    assert machine.available_cores() == 8
    (groups / "memory" / "job").mkdir(parents=True)
    (groups / "memory" / "job" / "memory.limit_in_bytes").write_text("3000000\n")
    (groups / "memory" / "job" / "memory.usage_in_bytes").write_text("2000000\n")
    (groups / "memory" / "job" / "memory.stat").write_text("total_inactive_file 500000\n")
    assert machine.free_memory() == 1_500_000


def test_memory_is_what_the_tightest_group_leaves(groups: Path) -> None:
    (groups / "job" / "memory.max").write_text("5000000\n")
    (groups / "job" / "memory.current").write_text("4000000\n")
    (groups / "job" / "step" / "memory.max").write_text("max\n")
    assert machine.free_memory() == 1_000_000
    (groups / "job" / "memory.current").write_text("6000000\n")
    assert machine.free_memory() == 0


def test_without_groups_the_machine_decides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "_OWN", tmp_path / "nothing")
    assert 0 < machine.free_memory() <= psutil.virtual_memory().total


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_affinity_counts_and_what_the_user_has_set_stays() -> None:
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
        "from depthcb_recipes.machine import use_threads_politely; use_threads_politely(); "
        "print(os.environ['OMP_NUM_THREADS'], os.environ['OMP_WAIT_POLICY'])"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")}

    def said(**variables: str) -> str:
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=clean | variables, capture_output=True, text=True, check=True).stdout.strip()

    assert said() == "1 PASSIVE"
    assert said(OMP_NUM_THREADS="3", OMP_WAIT_POLICY="ACTIVE") == "3 ACTIVE"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="elsewhere the system says only what getrusage does")
def test_the_peak_of_a_process_is_not_that_of_its_parent() -> None:
    held = b"x" * 2**29
    code = "from depthcb_recipes.machine import peak_memory; print(peak_memory())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 2**20 < int(done.stdout) < len(held) <= machine.peak_memory()
