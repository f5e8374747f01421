"""A study's grid, folders and pool: nothing is made twice, nothing is half read, and a kill leaves nothing running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from depthcb.study.cli import shard
from depthcb.study.grid import RunConfig, read_study
from depthcb.study.pool import MOST_KILLS, environment, run_pool
from depthcb.study.store import RESULT, Busy, Store, locked, read_result, write_result

HERE = Path(__file__).parent
GRID: dict[str, Any] = {
    "model": ["a", "b"], "objective": ["causal_lm", "contrastive"], "optimizer": ["sgd"],
    "control": ["standard", "equal-step"], "seed": [0, 1, 2],
}  # fmt: skip


def study(folder: Path, **more: Any) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({"grid": GRID, **more}))
    return path


@pytest.fixture
def maker(monkeypatch: pytest.MonkeyPatch) -> str:
    """A maker without a fit; see study_maker.py."""
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    return "study_maker"


def made(store: Store) -> list[str]:
    """What was made, once each time: the maker notes it."""
    return [line for path in store.root.glob("runs/*/made") for line in path.read_text().splitlines()]


def test_the_grid_is_every_combination_with_its_options(tmp_path: Path) -> None:
    by = {"optimizer": {"sgd": {"model.lr": 0.1}}, "objective": {"contrastive": {"data.max_length": 32}}}
    runs = read_study(study(tmp_path, options={"trainer.max_steps": 5, "model.lr": 1}, by=by, threads=2))
    assert len(runs) == len({run.hash for run in runs}) == 24
    assert len({run.pair for run in runs}) == 12
    first = runs[0]
    assert (first.model, first.objective, first.control, first.threads) == ("a", "causal_lm", "standard", 2)
    assert first.options == {"trainer.max_steps": 5, "model.lr": 0.1}
    assert {run.options.get("data.max_length") for run in runs if run.objective == "contrastive"} == {32}


def test_one_more_value_adds_only_its_runs(tmp_path: Path) -> None:
    before = {run.hash for run in read_study(study(tmp_path))}
    grown = tmp_path / "grown.yaml"
    grown.write_text(yaml.safe_dump({"grid": GRID | {"seed": [0, 1, 2, 3]}}))
    after = {run.hash for run in read_study(grown)}
    assert before < after
    assert len(after - before) == 8
    assert not before & {run.hash for run in read_study(study(tmp_path, threads=2))}, "threads change the last digit"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense: [", "is not YAML"),
        ("a: 1", "has no grid: give a list for each of model, objective"),
        (yaml.safe_dump({"grid": GRID, "option": {}}), "has option, which no study has"),
        (
            yaml.safe_dump({"grid": GRID | {"seed": [0, 0]}}),
            r"grid.seed is \[0, 0\]; it must be a list of one or more distinct values",
        ),
        (yaml.safe_dump({"grid": GRID | {"seed": ["x"]}}), "grid.seed has 'x'; it takes whole numbers"),
        (
            yaml.safe_dump({"grid": GRID | {"control": ["equal"]}}),
            "grid.control has 'equal'; it takes standard, equal-step",
        ),
        (yaml.safe_dump({"grid": GRID, "by": {"lr": {}}}), "by.lr is no axis of the grid"),
        (
            yaml.safe_dump({"grid": GRID, "by": {"model": {"c": {}}}}),
            "by.model speaks of 'c', which grid.model does not have",
        ),
    ],
)
def test_a_bad_study_is_one_clear_sentence(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_study(tmp_path / "s.yaml")
    with pytest.raises(ValueError, match=r"nowhere\.yaml cannot be read"):
        read_study(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("name", ["paper", "paper-sgd", "mini"])
def test_bundled_studies_are_studies(name: str) -> None:
    runs = read_study(Path(__file__).parents[2] / "recipes" / "studies" / f"{name}.yaml")
    assert len(runs) == {"paper": 240, "paper-sgd": 240, "mini": 96}[name]
    configs = {path.stem for path in (Path(__file__).parents[2] / "recipes" / "configs").glob("*.yaml")}
    assert {run.objective for run in runs} <= configs


def test_a_pool_makes_each_run_once_and_the_next_one_nothing(maker: str, tmp_path: Path) -> None:
    configs, store = read_study(study(tmp_path)), Store(tmp_path / "out")
    seen: list[tuple[int, int]] = []
    progress = run_pool(configs, store, 4, lambda p: seen.append((p.done, p.running)), maker)
    assert (progress.done, progress.failed) == (24, 0)
    assert max(running for _, running in seen) == 4
    assert sorted(made(store)) == sorted(config.hash for config in configs)
    again = run_pool(configs, store, 4, maker=maker)
    assert (again.done, again.made, len(made(store))) == (24, 0, 24)


def test_a_result_spoilt_by_hand_is_made_again_and_no_other(maker: str, tmp_path: Path) -> None:
    configs, store = read_study(study(tmp_path))[:4], Store(tmp_path / "out")
    run_pool(configs, store, 2, maker=maker)
    cut, changed = (store.folder(config) / RESULT for config in configs[:2])
    cut.write_text(cut.read_text()[:-20])
    fields = json.loads(changed.read_text())
    changed.write_text(json.dumps(fields | {"slope": 99.0}))
    assert store.result(configs[0]) is store.result(configs[1]) is None
    run_pool(configs, store, 2, maker=maker)
    assert sorted(made(store)) == sorted([config.hash for config in configs] + [c.hash for c in configs[:2]])
    assert [store.result(config)["slope"] for config in configs[:2]] == [1.0, 1.0]  # type: ignore[index]


def test_failures_are_recorded_and_retried_when_asked(maker: str, tmp_path: Path) -> None:
    configs, store = read_study(study(tmp_path, options={"fail": "a contrastive"})), Store(tmp_path / "out")
    progress = run_pool(configs, store, 4, maker=maker)
    assert (progress.done, progress.failed) == (18, 6)
    failed = [result for config in configs if (result := store.result(config)) and result["status"] != "finished"]
    assert {result["message"] for result in failed} == {"on purpose"}
    assert run_pool(configs, store, 4, maker=maker).made == 0
    store.forget_failures(configs)
    assert run_pool(configs, store, 4, maker=maker).made == 6


def test_a_run_that_dies_each_time_is_given_up_and_named(maker: str, tmp_path: Path) -> None:
    configs, store = read_study(study(tmp_path, options={"die": "b"})), Store(tmp_path / "out")
    progress = run_pool(configs, store, 4, maker=maker)
    assert (progress.done, progress.failed) == (12, 12)
    dead = store.result(configs[-1])
    assert dead is not None
    assert dead["status"] == "killed"
    lines = " | ".join(["I am about to die"] * MOST_KILLS)
    assert dead["message"] == f"ended by signal 9 {MOST_KILLS} times; last lines: {lines}"
    assert [path.name for path in store.folder(configs[-1]).iterdir() if path.name.startswith(".")] == []


DRIVER = """
import sys
from pathlib import Path
from depthcb.study.grid import read_study
from depthcb.study.pool import run_pool
from depthcb.study.store import Store
run_pool(read_study(sys.argv[1]), Store(Path(sys.argv[2])), 3, maker="study_maker")
"""


def drive(path: Path, out: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", DRIVER, str(path), str(out)])


def alive(out: Path) -> list[int]:
    """Processes that make runs of this study."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().decode()
            except OSError:
                continue
            if "study_maker" in command and str(out) in command:
                found.append(int(entry.name))
    return found


def test_a_killed_driver_leaves_nothing_running_and_the_next_one_finishes(maker: str, tmp_path: Path) -> None:
    path, out = study(tmp_path, options={"seconds": 0.3}), tmp_path / "out"
    configs, store = read_study(path), Store(out)
    for kill in range(4):
        driver = drive(path, out)
        deadline = time.monotonic() + 60
        while len(list(out.glob(f"runs/*/{RESULT}"))) < 3 * (kill + 1):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        if kill == 1 and (workers := alive(out)):
            os.kill(workers[0], signal.SIGKILL)  # a worker alone: its run is made again
        driver.kill()
        driver.wait()
        time.sleep(0.3)
        assert alive(out) == [], "what a killed driver started lives on"
    assert drive(path, out).wait(timeout=60) == 0
    assert all(store.result(config) for config in configs)
    finished = made(store)
    assert sorted(finished) == sorted(config.hash for config in configs), "a run was finished twice"


def test_two_drivers_at_once_make_no_run_twice(maker: str, tmp_path: Path) -> None:
    path, out = study(tmp_path, options={"seconds": 0.1}), tmp_path / "out"
    drivers = [drive(path, out) for _ in range(2)]
    assert [driver.wait(timeout=120) for driver in drivers] == [0, 0]
    assert sorted(made(Store(out))) == sorted(config.hash for config in read_study(path))


def test_a_lock_is_its_process(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(Busy), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_shards_are_the_study(tmp_path: Path) -> None:
    configs = read_study(study(tmp_path))
    parts = [shard(configs, f"{i}/3") for i in (1, 2, 3)]
    assert sorted(c.hash for part in parts for c in part) == sorted(c.hash for c in configs)
    for bad in ("0/3", "4/3", "x", "1/0", "1"):
        with pytest.raises(ValueError, match=f"--shard {bad}: give the part's number"):
            shard(configs, bad)


def test_a_batch_job_does_not_reach_into_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_NTASKS", "PL_GLOBAL_SEED", "WANDB_MODE"):
        monkeypatch.setenv(name, "7")
    found = environment(3, 12)
    assert found["OMP_NUM_THREADS"] == found["MKL_NUM_THREADS"] == "3"
    assert not {"SLURM_NTASKS", "PL_GLOBAL_SEED", "WANDB_MODE"} & set(found)


def test_results_are_whole_or_not_there(tmp_path: Path) -> None:
    assert read_result(tmp_path) is None
    write_result(tmp_path, {"status": "finished", "slope": float("nan")})
    assert read_result(tmp_path)["status"] == "finished"  # type: ignore[index]
    assert [path.name for path in tmp_path.iterdir()] == [RESULT]
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / RESULT).mkdir()
    with pytest.raises(ValueError, match="cannot be read"):
        read_result(tmp_path / "dir")


def test_a_hash_is_that_of_the_settings_alone() -> None:
    config = RunConfig("a", "causal_lm", "sgd", "standard", 0, options={"x": 1, "y": 2})
    assert config.hash == RunConfig("a", "causal_lm", "sgd", "standard", 0, options={"y": 2, "x": 1}).hash
    assert config.hash != RunConfig("a", "causal_lm", "sgd", "standard", 0, options={"x": 1}).hash
