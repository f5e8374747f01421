"""A study's grid, folders and pool: runs are not repeated, files are never partial, and kills leave no processes."""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from studies import FIGURES, alive, gone, hold

from depthcb.cli import main
from depthcb_recipes.backbones.architectures import ARCHITECTURES
from depthcb_recipes.studies.commands import check_memory, fitting, shard
from depthcb_recipes.studies.grid import VERSION, RunConfig, load_study, measures_of, read_study
from depthcb_recipes.studies.pool import MOST_KILLS, Pool, run_study
from depthcb_recipes.studies.process import environment
from depthcb_recipes.studies.result import RESULT, Result, read_result, write_result
from depthcb_recipes.studies.store import LOCK, Busy, Store, locked, seems_running

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
def runner(monkeypatch: pytest.MonkeyPatch) -> str:
    """A runner without a fit; see study_runner.py."""
    monkeypatch.setenv("PYTHONPATH", f"{HERE}{os.pathsep}{HERE.parent}")
    return "study_runner"


def made(store: Store) -> list[str]:
    """Hashes of what was made, once each time: the runner notes it."""
    return [line.split()[0] for line in (store.root / "made").read_text().splitlines()]


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
        (yaml.safe_dump({"grid": GRID, "option": {}}), "has option, which a study cannot have"),
        (
            yaml.safe_dump({"grid": GRID | {"seed": [0, 0]}}),
            r"grid.seed is \[0, 0\]; it must be a list of one or more distinct values",
        ),
        (yaml.safe_dump({"grid": GRID | {"seed": ["x"]}}), "grid.seed has 'x'; it takes whole numbers"),
        (
            yaml.safe_dump({"grid": GRID | {"control": ["equal"]}}),
            "grid.control has 'equal'; it takes standard, equal-step",
        ),
        (yaml.safe_dump({"grid": GRID, "by": {"lr": {}}}), "by.lr is not an axis of the grid"),
        (yaml.safe_dump({"grid": [GRID, 3]}), "has no grid: give a list for each of"),
        (yaml.safe_dump({"grid": [GRID, GRID | {"seed": []}]}), r"grid\[1\].seed is \[\]; it must be a list"),
        (
            yaml.safe_dump({"grid": GRID, "by": {"family": {"cnn": {}}}}),
            "by.family names 'cnn', which is none of encoder, decoder, state-space, recurrent",
        ),
        (
            yaml.safe_dump({"grid": GRID, "deciding": "procrustes"}),
            r"deciding is 'procrustes', which is not a measure of a causal_lm sgd standard 0 \(cka, cka_normalized\)",
        ),
        (
            yaml.safe_dump({"grid": GRID, "by": {"model": {"c": {}}}}),
            "by.model names 'c', which is not in grid.model",
        ),
        (yaml.safe_dump({"grid": GRID, "threads": 0}), "threads is 0; it must be a whole number, 1 or more"),
        (yaml.safe_dump({"grid": GRID, "by": {"seed": {1: {"gpus": "x"}}}}), "gpus is 'x'; it must be a whole number"),
    ],
)
def test_a_bad_study_is_one_clear_sentence(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_study(tmp_path / "s.yaml")
    with pytest.raises(ValueError, match=r"nowhere\.yaml cannot be read"):
        read_study(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("name", "count"), [("paper", 226), ("paper-ours", 240), ("paper-sgd", 240), ("mini", 120), ("mini-smoke", 24)]
)
def test_bundled_studies_are_studies(name: str, count: int) -> None:
    runs = read_study(Path(__file__).parents[2] / "recipes" / "depthcb_recipes" / "studies" / f"{name}.yaml")
    assert len(runs) == count
    configs = {
        path.stem for path in (Path(__file__).parents[2] / "recipes" / "depthcb_recipes" / "configs").glob("*.yaml")
    }
    assert {run.objective for run in runs} <= configs


def test_the_papers_preset_has_its_runs() -> None:
    """180 standard runs, 40 equal-step ones at 125M-350M and 6 at 1.3B-1.4B; encoders have a budget of their own."""
    study = load_study(Path(__file__).parents[2] / "recipes" / "depthcb_recipes" / "studies" / "paper.yaml")
    assert study.deciding == "procrustes"
    assert {run.optimizer for run in study.runs} == {"adamw"}
    standard = [run for run in study.runs if run.control == "standard"]
    equal = [run for run in study.runs if run.control == "equal-step"]
    assert {run.model for run in standard} == set(ARCHITECTURES)
    assert (len(standard), len({(run.model, run.objective) for run in standard})) == (180, 60)
    large = [run for run in equal if ARCHITECTURES[run.model].parameters > 1e9]
    assert (len(equal), len(large), {run.objective for run in large}) == (46, 6, {"causal_lm"})
    assert all(ARCHITECTURES[run.model].family in ("encoder", "decoder") for run in equal)
    assert {run.pair for run in equal} < {run.pair for run in standard}, "each equal-step run has its standard twin"
    for run in study.runs:
        encoder = ARCHITECTURES[run.model].family == "encoder"
        assert run.options["trainer.max_steps"] == (3000 if encoder else 1000)
        assert measures_of(run) == ["procrustes", "cka", "cka_normalized"]
        assert run.options["probe.rows"] == 290
    assert len({json.dumps({k: v for k, v in run.options.items() if k.startswith("probe")}) for run in study.runs}) == 1


def test_grids_of_one_study_follow_each_other(tmp_path: Path) -> None:
    path, first = tmp_path / "s.yaml", GRID | {"control": ["standard"]}
    second = GRID | {"model": ["b"], "control": ["equal-step"], "seed": [0]}
    path.write_text(yaml.safe_dump({"grid": [first, second], "by": {"model": {"b": {"model.lr": 1}}}}))
    runs = read_study(path)
    assert [run.control for run in runs] == ["standard"] * 12 + ["equal-step"] * 2
    assert runs[:12] == [run for run in read_study(study(tmp_path, by={"model": {"b": {"model.lr": 1}}}))
                         if run.control == "standard"]  # fmt: skip
    path.write_text(yaml.safe_dump({"grid": [first, first]}))
    with pytest.raises(ValueError, match=r"grid\[1\] has a causal_lm sgd standard 0, as an earlier grid has"):
        read_study(path)


def test_options_by_family(tmp_path: Path) -> None:
    grid = GRID | {"model": ["bert-tiny", "gpt2-tiny", "mamba2-tiny", "roberta-base"]}
    by = {
        "family": {"encoder": {"trainer.max_steps": 9}, "state-space": {"threads": 2}},
        "model": {"roberta-base": {"trainer.max_steps": 4}},
    }
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump({"grid": grid, "options": {"trainer.max_steps": 3}, "by": by}))
    found = {run.model: (run.options["trainer.max_steps"], run.threads) for run in read_study(path)}
    assert found == {"bert-tiny": (9, 1), "gpt2-tiny": (3, 1), "mamba2-tiny": (3, 2), "roberta-base": (4, 1)}
    path.write_text(yaml.safe_dump({"grid": grid | {"model": ["./nowhere"]}, "by": by | {"model": {}}}))
    with pytest.raises(ValueError, match=r"by\.family needs the family of '\./nowhere', which is not known"):
        read_study(path)


def test_a_pool_makes_each_run_once_and_the_next_one_nothing(runner: str, tmp_path: Path) -> None:
    configs, store = read_study(study(tmp_path)), Store(tmp_path / "out")
    seen: list[tuple[int, int]] = []
    progress = run_study(configs, store, Pool(4, runner=runner), lambda p: seen.append((p.done, p.running)))
    assert (progress.done, progress.failed) == (24, 0)
    assert max(running for _, running in seen) == 4
    assert sorted(made(store)) == sorted(config.hash for config in configs)
    again = run_study(configs, store, Pool(4, runner=runner))
    assert (again.done, again.completed, len(made(store))) == (24, 0, 24)


def test_a_result_spoilt_by_hand_is_made_again_and_no_other(runner: str, tmp_path: Path) -> None:
    configs, store = read_study(study(tmp_path))[:4], Store(tmp_path / "out")
    run_study(configs, store, Pool(2, runner=runner))
    cut, changed = (store.folder(config) / RESULT for config in configs[:2])
    cut.write_text(cut.read_text()[:-20])
    fields = json.loads(changed.read_text())
    changed.write_text(json.dumps(fields | {"slope": 99.0}))
    with pytest.warns(UserWarning, match=r"result\.json is damaged .*: the run is made again"):
        assert store.result(configs[0]) is store.result(configs[1]) is None
    with pytest.warns(UserWarning, match=r"result\.json is damaged"):
        run_study(configs, store, Pool(2, runner=runner))
    assert sorted(made(store)) == sorted([config.hash for config in configs] + [c.hash for c in configs[:2]])
    assert [store.result(config).figures.slope for config in configs[:2]] == [1.0, 1.0]  # type: ignore[union-attr]


@pytest.mark.slow
def test_failures_are_recorded_and_retried_when_asked(runner: str, tmp_path: Path) -> None:
    configs, store = read_study(study(tmp_path, options={"fail": "a contrastive"})), Store(tmp_path / "out")
    progress = run_study(configs, store, Pool(4, runner=runner))
    assert (progress.done, progress.failed) == (18, 6)
    failed = [result for config in configs if (result := store.result(config)) and not result.finished]
    assert {result.message for result in failed} == {"on purpose"}
    assert run_study(configs, store, Pool(4, runner=runner)).completed == 0
    store.forget_failures(configs)
    assert run_study(configs, store, Pool(4, runner=runner)).completed == 6


@pytest.mark.slow
def test_a_run_that_dies_each_time_is_given_up_and_named(runner: str, tmp_path: Path) -> None:
    configs, store = read_study(study(tmp_path, options={"die": "b"})), Store(tmp_path / "out")
    progress = run_study(configs, store, Pool(4, runner=runner))
    assert (progress.done, progress.failed) == (12, 12)
    dead = store.result(configs[-1])
    assert dead is not None
    assert dead.status == "killed"
    lines = " | ".join(["I am about to die"] * MOST_KILLS)
    how = "by signal 9 (as the system does where memory runs out)"
    assert dead.message == f"ended {how} {MOST_KILLS} times; last lines: {lines}"
    assert [path.name for path in store.folder(configs[-1]).iterdir() if path.name.startswith(".")] == []


@pytest.mark.slow
def test_a_run_that_ends_without_a_result_is_given_up_and_named(runner: str, tmp_path: Path) -> None:
    configs, store = read_study(study(tmp_path, options={"leave": "b"})), Store(tmp_path / "out")
    progress = run_study(configs, store, Pool(4, runner=runner))
    assert (progress.done, progress.failed) == (12, 12)
    left = store.result(configs[-1])
    assert left is not None
    assert left.message.startswith(f"ended with status 0 and no result {MOST_KILLS} times")


def test_who_has_lost_a_run_writes_no_result(tmp_path: Path) -> None:
    """Another process, such as one in a container with the same process numbers, has taken the lock over."""
    config = read_study(study(tmp_path))[0]
    mine, other = tmp_path / "mine", tmp_path / "other"
    mine.mkdir(), other.mkdir()
    with locked(mine) as check:
        write_result(mine, Result("failed", config, message="first"), check)
        with locked(other):
            (mine / LOCK).write_bytes((other / LOCK).read_bytes())
            with pytest.raises(Busy, match="taken over by another process"):
                write_result(mine, Result("failed", config, message="second"), check)
            assert read_result(mine) == Result("failed", config, message="first")
            assert sorted(path.name for path in mine.iterdir()) == [LOCK, "result.json"]
            (mine / LOCK).unlink()


DRIVER = """
import sys
from dataclasses import replace
from pathlib import Path
from depthcb_recipes.studies.grid import read_study
from depthcb_recipes.studies.pool import Pool, run_study
from depthcb_recipes.studies.store import Store
run_study(read_study(sys.argv[1]), Store(Path(sys.argv[2])), Pool(3, runner="study_runner"))
"""


def drive(path: Path, out: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", DRIVER, str(path), str(out)])


def test_a_killed_driver_leaves_nothing_running_and_the_next_one_finishes(runner: str, tmp_path: Path) -> None:
    path, out = study(tmp_path, options={"seconds": 0.3}), tmp_path / "out"
    configs, store, finished = read_study(path), Store(out), dict[Path, int]()
    for kill in range(4):
        driver = drive(path, out)
        deadline = time.monotonic() + 60
        while len(list(out.glob(f"runs/*/{RESULT}"))) < 3 * (kill + 1):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        if kill == 1 and (workers := set(alive(out)) - {driver.pid}):
            os.kill(workers.pop(), signal.SIGKILL)  # only a worker was killed: its run is repeated
        driver.kill()
        driver.wait()
        assert gone(out, within=5.0), "what a killed driver started lives on"
        for folder, file in finished.items():
            assert (folder / RESULT).stat().st_ino == file, "a finished run was made again"
        finished |= {path.parent: path.stat().st_ino for path in out.glob(f"runs/*/{RESULT}")}
    assert drive(path, out).wait(timeout=60) == 0
    assert all(store.result(config) for config in configs)
    assert all((folder / RESULT).stat().st_ino == file for folder, file in finished.items())


@pytest.mark.slow
def test_two_drivers_at_once_make_no_run_twice(runner: str, tmp_path: Path) -> None:
    path, out = study(tmp_path, options={"seconds": 0.1}), tmp_path / "out"
    drivers = [drive(path, out) for _ in range(2)]
    assert [driver.wait(timeout=120) for driver in drivers] == [0, 0]
    assert sorted(made(Store(out))) == sorted(config.hash for config in read_study(path))


def test_a_lock_is_void_with_its_process(tmp_path: Path) -> None:
    assert not seems_running(tmp_path)
    with hold(tmp_path):
        assert seems_running(tmp_path)
        with pytest.raises(Busy), locked(tmp_path):
            pass
    assert not seems_running(tmp_path), "the killed holder's mark is still there, and says so"
    with locked(tmp_path):
        pass


@pytest.mark.slow
def test_a_machine_that_gives_no_sign_of_life_loses_its_run_and_ends_it(tmp_path: Path) -> None:
    with hold(tmp_path, "elsewhere", lease=2) as holder:
        assert seems_running(tmp_path)
        with pytest.raises(Busy), locked(tmp_path, patience=5, lease=2):  # the holder is alive, so waiting times out
            pass
        holder.send_signal(signal.SIGSTOP)  # like a machine that hangs or is disconnected
        with locked(tmp_path, patience=20, lease=2):
            holder.send_signal(signal.SIGCONT)
            assert holder.wait(timeout=20) == 1, "it must not go on with what is another's"


@pytest.mark.slow
def test_a_file_that_is_edited_while_it_runs_mixes_nothing(runner: str, tmp_path: Path) -> None:
    path, out = study(tmp_path, options={"seconds": 0.3}), tmp_path / "out"
    before, store = read_study(path), Store(out)
    first = drive(path, out)
    deadline = time.monotonic() + 60
    while len(list(out.glob(f"runs/*/{RESULT}"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    after = read_study(study(tmp_path, options={"seconds": 0.1}))
    second = drive(path, out)
    assert [first.wait(timeout=120), second.wait(timeout=120)] == [0, 0]
    assert not {config.hash for config in before} & {config.hash for config in after}
    assert sorted(made(store)) == sorted(config.hash for config in [*before, *after])
    for config in [*before, *after]:
        result = store.result(config)
        assert result is not None
        assert result.config == config


@pytest.mark.slow
def test_runs_never_share_a_gpu(runner: str, tmp_path: Path) -> None:
    configs = read_study(study(tmp_path, by={"model": {"a": {"gpus": 1}, "b": {"gpus": 2}}}, options={"seconds": 0.1}))
    assert {(config.model, config.gpus) for config in configs} == {("a", 1), ("b", 2)}
    store = Store(tmp_path / "out")
    run_study(configs, store, Pool(8, ["3", "5", "7"], runner))
    lines = [line.split() for line in (store.root / "made").read_text().splitlines()]
    used = [(set(gpus.split(",")), float(began), float(ended)) for _, gpus, began, ended in lines]
    assert sorted(len(gpus) for gpus, _, _ in used) == [1] * 12 + [2] * 12
    assert set().union(*(gpus for gpus, _, _ in used)) == {"3", "5", "7"}
    for i, (gpus, began, ended) in enumerate(used):
        for other, start, end in used[:i]:
            assert not gpus & other or ended <= start or end <= began
    assert any(start < ended and began < end for _, began, ended in used for _, start, end in used if start != began)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"options": {"data.since": datetime.date(2024, 1, 1)}},
            r"options has data\.since: .*YAML reads as a date: put",
        ),
        ({"options": [1]}, r"options is \[1\]; it must be a mapping"),
        ({"by": ["model"]}, r"by is \['model'\]; it must be a mapping of axes"),
        ({"by": {"model": "a"}}, r"by\.model is 'a'; it must map values of the axis to options"),
        ({"by": {"model": {"a": 3}}}, r"by\.model\.a is 3; it must be a mapping"),
        ({"threads": True}, "threads is True; it must be a whole number"),
        ({"grid": {**GRID, "model": [datetime.date(2024, 1, 1)]}}, r"grid\.model has .*it takes names; put quotes"),
        ({"grid": {**GRID, "seed": [True]}}, r"grid\.seed has True; it takes whole numbers"),
    ],
)
def test_oddities_of_yaml_are_one_sentence(wrong: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({"grid": GRID, **wrong}))
    with pytest.raises(ValueError, match=message):
        read_study(path)


def test_empty_entries_are_none(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({"grid": GRID}))
    plain = read_study(path)
    path.write_text(path.read_text() + "options:\nby:\n  model:\n  seed:\n    0:\n")
    assert read_study(path) == plain


def test_a_folder_that_cannot_be_written_is_named_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["study", "run", str(study(tmp_path)), "--out", str(tmp_path / "file" / "out")]) == 2
    assert "cannot be written (Not a directory): name another folder" in capsys.readouterr().err
    assert main(["study", "table", str(study(tmp_path)), "--out", str(tmp_path / "file" / "out")]) == 2
    assert "has no finished run of this study" in capsys.readouterr().err


def test_what_a_machine_lacks_is_said_before_anything_runs(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    path, out = study(tmp_path, gpus=2), tmp_path / "out"
    assert main(["study", "run", str(path), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert "24 of 24 runs do not fit on this machine, which shows 1 GPUs (a causal_lm sgd standard 0 needs 2" in said
    assert "run them on a larger machine, or on a cluster with --engine ray." in said
    assert main(["study", "run", str(study(tmp_path)), "--out", str(out), "--jobs", "0"]) == 2
    assert "--jobs 0: it must be at least 1." in capsys.readouterr().err
    assert not out.exists()


def test_more_jobs_than_memory_are_refused_before_anything_runs(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({"grid": GRID | {"seed": list(range(5_000))}}))
    assert main(["study", "run", str(path), "--out", str(tmp_path / "out"), "--jobs", "20000"]) == 2
    said = capsys.readouterr().err
    assert "--jobs 20000: each run takes at least 0.5 GB of memory and " in said
    assert not (tmp_path / "out").exists()
    check_memory(4, 2 << 30)
    check_memory(1, 0)
    with pytest.raises(ValueError, match=r"--jobs 5: .* and 2\.0 GB are free: give 4 or fewer, or leave it out"):
        check_memory(5, 2 << 30)


def test_runs_that_this_machine_is_too_small_for_stop_no_other(tmp_path: Path, capsys: Any) -> None:
    configs = read_study(study(tmp_path, by={"model": {"b": {"gpus": 2}}}))
    assert fitting(configs, Pool(1, ["0"])) == [config for config in configs if config.model == "a"]
    said = capsys.readouterr().out
    assert "12 of 24 runs do not fit on this machine, which shows 1 GPUs (b causal_lm sgd standard 0 needs 2" in said
    assert "they are skipped" in said


def test_ending_a_run_ends_what_it_started(runner: str, tmp_path: Path) -> None:
    configs, out = read_study(study(tmp_path, options={"seconds": 600, "child": True}))[:1], tmp_path / "out"
    store = Store(out)
    run = Pool(1, runner=runner).start(configs[0], store.prepare(configs[0]), wait=False)
    deadline = time.monotonic() + 30
    while len(alive(out)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    run.kill()
    assert gone(out, within=5.0)


def test_a_folder_that_cannot_be_read_is_named(runner: str, tmp_path: Path, capsys: Any) -> None:
    path, out = study(tmp_path), tmp_path / "out"
    folder = Store(out).folder(read_study(path)[5])
    (folder / RESULT).mkdir(parents=True)  # simulates missing read permission, also for root
    assert main(["study", "run", str(path), "--out", str(out)]) == 2
    assert f"{folder / RESULT} cannot be read" in capsys.readouterr().err
    assert main(["study", "status", str(path), "--out", str(out)]) == 2


def test_shards_are_the_study(tmp_path: Path) -> None:
    configs = read_study(study(tmp_path))
    parts = [shard(configs, f"{i}/3") for i in (1, 2, 3)]
    assert sorted(c.hash for part in parts for c in part) == sorted(c.hash for c in configs)
    for bad in ("0/3", "4/3", "x", "1/0", "1"):
        with pytest.raises(ValueError, match=f"--shard {bad}: give the part's number"):
            shard(configs, bad)


def test_a_batch_job_does_not_reach_into_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = ("SLURM_NTASKS", "PL_GLOBAL_SEED", "WANDB_RUN_ID", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
    for name in (*foreign, "WANDB_API_KEY"):
        monkeypatch.setenv(name, "7")
    found = environment(3, ["1", "2"], wait=False)
    assert found["OMP_NUM_THREADS"] == found["MKL_NUM_THREADS"] == "3"
    assert found["CUDA_VISIBLE_DEVICES"] == "1,2"
    assert environment(1, [], wait=False)["CUDA_VISIBLE_DEVICES"] == "", "a run without GPUs sees none"
    assert not set(foreign) & set(found)
    assert found["WANDB_API_KEY"] == "7", "a user's key is no other job's"


def test_results_are_whole_or_not_there(tmp_path: Path) -> None:
    assert read_result(tmp_path) is None
    config = RunConfig("a", "causal_lm", "sgd", "standard", 0)
    result = Result("finished", config, replace(FIGURES, loss=math.inf, precision="32-true", seconds=None))
    write_result(tmp_path, result)
    assert read_result(tmp_path) == result
    assert [path.name for path in tmp_path.iterdir()] == [RESULT]
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / RESULT).mkdir()
    with pytest.raises(ValueError, match="cannot be read"):
        read_result(tmp_path / "dir")


def test_a_hash_is_that_of_the_settings_alone() -> None:
    config = RunConfig("a", "causal_lm", "sgd", "standard", 0, options={"x": 1, "y": 2})
    assert config.hash == RunConfig("a", "causal_lm", "sgd", "standard", 0, options={"y": 2, "x": 1}).hash
    assert config.hash != RunConfig("a", "causal_lm", "sgd", "standard", 0, options={"x": 1}).hash


def test_results_of_an_earlier_version_are_listed_and_read(tmp_path: Path, capsys: Any) -> None:
    """Version 1 is what depthcb 0.1 wrote; here under a hash that the same configuration no longer has."""
    path, store = study(tmp_path), Store(tmp_path / "out")
    configs = read_study(path)
    fields = Result("finished", configs[0], replace(FIGURES, slope=0.25)).to_dict()
    del fields["version"], fields["precision"]
    folder = store.root / "runs" / "0123456789abcdef"
    folder.mkdir(parents=True)
    plain = json.dumps(fields, sort_keys=True)
    (folder / RESULT).write_text(json.dumps(fields | {"sha256": hashlib.sha256(plain.encode()).hexdigest()}))
    (old,) = store.older(configs)
    assert (old.version, old.config, old.figures) == (1, configs[0], replace(FIGURES, slope=0.25))
    assert main(["study", "status", str(path), "--out", str(store.root)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(
        "24 missing of 24 runs\nolder, version 1: a causal_lm sgd standard 0: the hash of its config"
    )
    assert store.older(configs[1:]) == [], "no run of this study"
    write_result(store.prepare(configs[0]), Result("finished", configs[0], FIGURES))
    assert store.older(configs) == [], "it was run again"


def test_a_killed_run_of_version_1_is_read(tmp_path: Path) -> None:
    """Its result did not name the configuration."""
    store, config = Store(tmp_path), RunConfig("a", "causal_lm", "sgd", "standard", 0)
    fields = {"status": "killed", "message": "ended by signal 9"}
    plain = json.dumps(fields, sort_keys=True)
    (store.prepare(config) / RESULT).write_text(
        json.dumps(fields | {"sha256": hashlib.sha256(plain.encode()).hexdigest()})
    )
    assert store.result(config) == Result("killed", config, message="ended by signal 9")


def test_a_result_of_a_later_version_is_refused(tmp_path: Path) -> None:
    result = Result("failed", RunConfig("a", "causal_lm", "sgd", "standard", 0), message="on purpose")
    with pytest.raises(ValueError, match=rf"it has version {VERSION + 1}, and this depthcb reads up to {VERSION}: upd"):
        Result.from_dict(result.to_dict() | {"version": VERSION + 1})
    with pytest.raises(ValueError, match="it is no result of a run"):
        Result.from_dict({"status": "finished", "config": result.config.to_dict()})
