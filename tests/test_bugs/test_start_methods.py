"""Under spawn and forkserver, Python 3.14's default, a probe of a dataset that cannot be pickled ended the training."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import multiprocessing, sys, threading, warnings
import torch
from support import TinyLM, fit, texts
from torch.utils.data import DataLoader, Dataset
from depthcb import DepthProfile

print("imported")
multiprocessing.set_start_method(sys.argv[1])

class Locked(Dataset):
    def __init__(self):
        self.lock, self.same, self.texts, self.reads = threading.Lock(), lambda text: text, texts(), 0

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, index):
        with self.lock:
            self.reads += 1
            return self.same(self.texts[index])

def trained(callbacks):
    torch.manual_seed(0)
    module, data = TinyLM(), Locked()
    fit(module, callbacks, (DataLoader(data, 8, shuffle=True), DataLoader(data, 8)), val_check_interval=2)
    return data.reads, torch.cat([p.detach().flatten() for p in module.parameters()])

watch = DepthProfile()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    (reads, weights), (bare_reads, bare_weights) = trained([watch]), trained([])
print(len(watch.profiles), reads == bare_reads, torch.equal(weights, bare_weights))
print(sum("could not be read" in str(warning.message) for warning in caught))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process cannot be forked safely")
@pytest.mark.parametrize("method", [pytest.param("spawn", marks=pytest.mark.slow), "forkserver"])
def test_a_dataset_that_cannot_be_pickled(method: str, tmp_path: Path) -> None:
    """The script guards nothing by ``__name__``: another process that imported it would print as well."""
    (tmp_path / "script.py").write_text(SCRIPT)
    tests = Path(__file__).parents[1]
    run = [sys.executable, str(tmp_path / "script.py"), method]
    path = os.pathsep.join([str(tests), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["imported", "2 True True", "0"]
