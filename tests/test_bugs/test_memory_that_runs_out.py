"""Out of memory without a message was recorded with none, and memory that the system refused as another failure."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from support import run_script


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory cannot be limited")
def test_out_of_memory_is_recorded_with_its_reason(tmp_path: Path) -> None:
    done = run_script("out_of_memory_runs.py", tmp_path)
    torch, numpy, python, system = done.stdout.splitlines()[-4:]
    assert torch.startswith("torch: out of memory: ")
    assert "you tried to allocate 4398046511104 bytes" in torch
    assert numpy.startswith("numpy: out of memory: Unable to allocate 4.00 TiB")
    assert python == "python: out of memory: MemoryError"
    assert system == "system: out of memory: [Errno 12] Cannot allocate memory"
