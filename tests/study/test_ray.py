"""Ray as the engine: a cluster of two nodes on this machine, one of which dies."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from studies import command

from depthcb_recipes.studies.grid import read_study
from depthcb_recipes.studies.store import RESULT, Store

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
GRID: dict[str, Any] = {
    "model": ["a", "b"], "objective": ["causal_lm"], "optimizer": ["sgd"], "control": ["standard", "equal-step"],
    "seed": [0, 1, 2],
}  # fmt: skip
DRIVER = """
import sys
from pathlib import Path
from depthcb_recipes.studies.grid import read_study
from depthcb_recipes.studies.pool import run_study
from depthcb_recipes.studies.ray import RayEngine
from depthcb_recipes.studies.store import Store
try:
    engine = RayEngine(runner="study_runner")
    run_study(read_study(sys.argv[1]), Store(Path(sys.argv[2])), engine, lambda p: print(p.done, p.running, flush=True))
except ValueError as error:
    print(error)
"""


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head node with one core."""
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    monkeypatch.setenv("PYTHONPATH", f"{HERE}:{HERE.parent}")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield cluster
    cluster.shutdown()


def study(folder: Path, **more: Any) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({"grid": GRID, **more}))
    return path


def drive(path: Path, out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", DRIVER, str(path), str(out)], stdout=subprocess.PIPE, text=True)


def test_a_node_that_dies_costs_no_run(cluster: Any, tmp_path: Path) -> None:
    second = cluster.add_node(num_cpus=1)
    path, out = study(tmp_path, options={"seconds": 1}), tmp_path / "out"
    with drive(path, out) as driver:
        assert driver.stdout is not None
        while len(list(out.glob(f"runs/*/{RESULT}"))) < 3:
            time.sleep(0.05)
        cluster.remove_node(second, allow_graceful=False)
        # Ray itself logs at length that a node died.
        seen = [found.groups() for line in driver.stdout if (found := re.fullmatch(r"(\d+) (\d+)\n", line))]
        assert driver.wait() == 0
    running = [int(number) for _, number in seen]
    assert max(running) == 2, "one run a node"
    assert running[-2] == 1, "the node that is left makes the rest"
    assert seen[-1] == ("12", "0")
    assert all(Store(out).result(config).finished for config in read_study(path))  # type: ignore[union-attr]


def test_what_no_node_has_is_said(cluster: Any, tmp_path: Path) -> None:
    run = command("run", study(tmp_path, gpus=1), tmp_path / "out", "--engine", "ray")
    said = subprocess.run(run, capture_output=True, text=True).stderr
    assert (
        "12 of 12 runs do not fit on any node of the Ray cluster, which are [{'CPU': 1, 'GPU': 0}] (a causal_lm" in said
    )


@pytest.mark.parametrize("address", ["127.0.0.1:1", "auto", "ray://127.0.0.1:1", "no address"])
def test_a_cluster_that_is_not_there_is_named(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with drive(study(tmp_path), tmp_path / "out") as driver:
        said = driver.communicate(timeout=120)[0]
    assert f"No Ray cluster answers at RAY_ADDRESS={address} (" in said


def test_a_port_that_is_no_cluster_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # accepts, and never answers
        address = f"127.0.0.1:{deaf.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        began = time.monotonic()
        with drive(study(tmp_path), tmp_path / "out") as driver:
            said = driver.communicate(timeout=120)[0]
    assert f"No Ray cluster answers at RAY_ADDRESS={address} (no answer in 25 s)" in said
    assert time.monotonic() - began < 90, "25 s, and the start of Python and Ray on a busy machine"
