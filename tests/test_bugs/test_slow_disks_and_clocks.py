"""A file system that takes seconds to sync or rename, and clocks that jump by hours, cost no run and make none twice."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from studies import hold

from depthcb_recipes.studies.grid import read_study
from depthcb_recipes.studies.store import LOCK, Busy, Store, locked, seems_running

STUDY = Path(__file__).parents[1] / "study"
HOUR = 3600.0
#: Delays fsync and rename by $SLOW seconds; adds the seconds in the file $JUMP to the wall clock.
SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>
static void wait(void) { char *slow = getenv("SLOW"); if (slow) usleep(atof(slow) * 1e6); }
int fsync(int fd) { wait(); return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(fd); }
int rename(const char *a, const char *b) {
  wait();
  return ((int (*)(const char *, const char *))dlsym(RTLD_NEXT, "rename"))(a, b);
}
int clock_gettime(clockid_t clock, struct timespec *now) {
  int status = ((int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime"))(clock, now);
  char *path = clock == CLOCK_REALTIME ? getenv("JUMP") : NULL;
  FILE *file = path ? fopen(path, "r") : NULL;
  double jump = 0;
  if (file) { if (fscanf(file, "%lf", &jump) == 1) now->tv_sec += (time_t)jump; fclose(file); }
  return status;
}
"""
DRIVER = """
import sys
from pathlib import Path
from depthcb_recipes.studies.grid import read_study
from depthcb_recipes.studies.pool import Pool, run_study
from depthcb_recipes.studies.store import Store
left = []
report = lambda progress: progress.seconds_left is None or left.append(progress.seconds_left)
run_study(read_study(sys.argv[1]), Store(Path(sys.argv[2])), Pool(2, runner="study_runner"), report)
assert min(left, default=0) >= 0
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled library."""
    if sys.platform != "linux" or shutil.which("gcc") is None:
        pytest.skip("needs Linux and gcc")
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SHIM)
    build = ["gcc", "-shared", "-fPIC", "-o", str(folder / "shim.so"), str(folder / "shim.c"), "-ldl"]
    subprocess.run(build, check=True)
    return folder / "shim.so"


def study(folder: Path) -> Path:
    grid = {
        "model": ["a", "b"], "objective": ["causal_lm"], "optimizer": ["sgd"], "control": ["standard", "equal-step"],
        "seed": [0],
    }  # fmt: skip
    (folder / "study.yaml").write_text(yaml.safe_dump({"grid": grid, "options": {"seconds": 1}}))
    return folder / "study.yaml"


def two_drivers(path: Path, out: Path, variables: dict[str, str]) -> list[subprocess.Popen[bytes]]:
    python_path = os.pathsep.join([str(STUDY), str(STUDY.parent), os.environ.get("PYTHONPATH", "")])
    run = [sys.executable, "-c", DRIVER, str(path), str(out)]
    return [subprocess.Popen(run, env={**os.environ, "PYTHONPATH": python_path, **variables}) for _ in range(2)]


def check(path: Path, out: Path) -> None:
    """Each run was made once, and has a whole result."""
    configs, store = read_study(path), Store(out)
    assert sorted(line.split()[0] for line in (out / "made").read_text().splitlines()) == sorted(
        c.hash for c in configs
    )
    assert all((result := store.result(config)) is not None and result.finished for config in configs)


@pytest.mark.slow
def test_slow_disks(shim: Path, tmp_path: Path) -> None:
    path, out = study(tmp_path), tmp_path / "out"
    began = time.monotonic()
    drivers = two_drivers(path, out, {"LD_PRELOAD": str(shim), "SLOW": "1"})
    assert [driver.wait(timeout=120) for driver in drivers] == [0, 0]
    assert time.monotonic() - began > 6, "configuration and result of each run are synced and renamed: 4 s a run"
    check(path, out)


@pytest.mark.slow
def test_clocks_that_jump_while_two_drivers_run(shim: Path, tmp_path: Path) -> None:
    path, out, jump = study(tmp_path), tmp_path / "out", tmp_path / "jump"
    jump.write_text("0")
    drivers = two_drivers(path, out, {"LD_PRELOAD": str(shim), "JUMP": str(jump)})
    hours = iter([5, -5] * 1000)
    deadline = time.monotonic() + 120
    while any(driver.poll() is None for driver in drivers):
        assert time.monotonic() < deadline
        jump.write_text(str(next(hours) * HOUR))
        time.sleep(0.3)
    assert [driver.wait() for driver in drivers] == [0, 0]
    check(path, out)
    times = [float(line.split()[2]) for line in (out / "made").read_text().splitlines()]
    assert any(abs(began - time.time()) > HOUR for began in times), "the runs saw the clock jump"


@pytest.mark.parametrize("jump", [-5 * HOUR, 5 * HOUR])
def test_a_jump_takes_no_lock_from_its_holder(jump: float, tmp_path: Path) -> None:
    with hold(tmp_path, "elsewhere", lease=2) as holder:
        os.utime(tmp_path / LOCK, (time.time() + jump,) * 2)
        with pytest.raises(Busy), locked(tmp_path, patience=4, lease=2):
            pass
        assert holder.poll() is None
    os.utime(tmp_path / LOCK, (time.time() + jump,) * 2)
    assert not seems_running(tmp_path), "a dead machine's lock from another time seemed held for hours"
