"""`depthcb advise`: the trainings that test proposals, their table, and the whole command on a real network."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from advised import BASE, LAYERS, run_with
from scipy import stats
from studies import FIGURES

from depthcb.advice import LAST, RANDOM, RULES, propose
from depthcb.cli import main
from depthcb.run import Run, write_header, write_row
from depthcb_recipes.advice.arms import ALL, LORA_LR, Arm, arms, candidates, draws_of, parse_modes
from depthcb_recipes.advice.conclusion import LEVEL, conclude
from depthcb_recipes.advice.source import training_of
from depthcb_recipes.advice.trained import trained_table
from depthcb_recipes.studies.grid import RunConfig
from depthcb_recipes.studies.result import FINISHED, Result, write_result
from depthcb_recipes.studies.store import Store

SEEDS, DRAWS = 4, 2


def planned(modes: str = "full,lora") -> tuple[list[Any], list[Arm]]:
    proposals = propose(run_with(), 0.25, range(SEEDS * DRAWS))
    return proposals, arms(BASE, proposals, LAYERS, parse_modes(modes), SEEDS, DRAWS, rank=4)


def test_every_training_differs_from_the_run_only_in_seed_layers_and_mode() -> None:
    proposals, found = planned()
    own = {"model.train_layers", "model.lora_rank", "model.lr", "trainer.callbacks"}
    for arm in found:
        same = dataclasses.replace(arm.config, seed=BASE.seed, null_seeds=BASE.null_seeds, options=BASE.options)
        assert same == BASE
        assert {k: v for k, v in arm.config.options.items() if k not in own} == {}
        assert arm.config.options["model.train_layers"] == list(arm.layers)
        lora = arm.mode == "lora"
        assert arm.config.options["model.lr"] == pytest.approx(1e-3 * (LORA_LR if lora else 1))
        assert ("model.lora_rank" in arm.config.options) == lora
    assert [arm.config.seed for arm in found] == sorted(arm.config.seed for arm in found), "whole seeds first"
    per_seed = [arm for arm in found if arm.config.seed == 2 and arm.mode == "full"]
    known = [p.rule.name for p in proposals if p.sets]
    assert [arm.rule for arm in per_seed] == [ALL, *(n for name in known for n in [name] * (1 + (name == RANDOM)))]
    assert {len(arm.layers) for arm in found if arm.rule != ALL} == {2}, "equal budget"


def test_trainings_of_known_length_are_validated_once_at_their_end() -> None:
    steps = {"trainer.max_steps": 30, "trainer.accumulate_grad_batches": 2, "trainer.val_check_interval": 20}
    base = dataclasses.replace(BASE, options={**BASE.options, **steps})
    options = arms(base, propose(run_with(), 0.25, range(1)), LAYERS, ["full"], 1, 1, 4)[0].config.options
    assert options["trainer.val_check_interval"] == 60, "in batches"
    assert options["trainer.check_val_every_n_epoch"] is None


def test_each_seed_has_random_sets_of_its_own() -> None:
    assert sorted(n for seed in range(SEEDS) for n in draws_of(seed, DRAWS)) == list(range(SEEDS * DRAWS))
    proposals, found = planned("full")
    (rule,) = (p for p in proposals if p.rule.name == RANDOM)
    assert [arm.layers for arm in found if arm.rule == RANDOM] == list(rule.sets)


def test_rules_that_choose_the_same_layers_share_their_training() -> None:
    _, found = planned("full")
    of_seed = [arm for arm in found if arm.config.seed == 0]
    assert len({arm.config.hash for arm in of_seed}) == len({arm.layers for arm in of_seed}) < len(of_seed)


def write(store: Store, arm: Arm, loss: float) -> None:
    folder = store.prepare(arm.config)
    figures = dataclasses.replace(FIGURES, loss=loss, seconds=2.0, trained_parameters=7, peak_memory=10**9)
    write_result(folder, Result(FINISHED, arm.config, figures))


def test_the_table_has_the_means_of_whole_seeds(tmp_path: Path) -> None:
    proposals, found = planned("full")
    store, rng = Store(tmp_path), np.random.default_rng(0)
    losses = {arm.config.hash: float(rng.normal()) for arm in found}
    left_out = next(arm for arm in found if arm.config.seed == 3)
    for arm in found:
        if arm.config.hash != left_out.config.hash:
            write(store, arm, losses[arm.config.hash])
    table = trained_table(proposals, found, store)
    assert table.seeds == (0, 1, 2)
    assert table.missing == 1
    assert [row.loss for row in table.rows] == sorted(row.loss for row in table.rows)
    for row in table.rows:
        own = [arm for arm in found if arm.rule == row.rule]
        expected = [np.mean([losses[a.config.hash] for a in own if a.config.seed == s]) for s in table.seeds]
        assert row.losses == pytest.approx(expected)
        assert (row.parameters, row.seconds, row.memory) == (7, 2.0, 1e9)
    assert {c.rule for c in table.conclusion.comparisons} == set(candidates(proposals))
    assert str(table.conclusion) == "Undecided: 3 of 4 seeds."


def test_comparisons_are_scipys_paired_t_intervals_with_bonferronis_level() -> None:
    rng = np.random.default_rng(1)
    losses = {name: rng.normal(2, 0.1, 6).tolist() for name in (LAST, RANDOM, "a", "b", "c")}
    found = conclude(losses)
    assert [c.rule for c in found.comparisons] == ["a", "b", "c"]
    for c in found.comparisons:
        for other, estimate in ((RANDOM, c.random), (LAST, c.last)):
            reference = stats.ttest_rel(losses[c.rule], losses[other]).confidence_interval(1 - LEVEL / 3)
            assert (estimate.low, estimate.high) == pytest.approx((reference.low, reference.high))


def test_a_winner_must_beat_both_and_four_seeds_are_the_fewest() -> None:
    flat, noise = [2.0] * 5, [0.01, -0.01, 0.02, 0.0, -0.02]
    low = [1.0 + n for n in noise]
    assert conclude({RANDOM: flat, LAST: flat, "a": low, "b": flat}).winners == ["a"]
    for both in ({RANDOM: flat, LAST: low}, {RANDOM: low, LAST: flat}):
        told = conclude({**both, "a": [1.0 - n for n in noise], "b": flat})
        assert told.winners == []
        assert str(told) == "No rule beats both random and last k with these 5 seeds."
    few = conclude({name: values[:3] for name, values in {RANDOM: flat, LAST: flat, "a": low}.items()})
    assert few.comparisons[0].wins
    assert few.winners == []
    assert conclude({RANDOM: [1.0], LAST: [1.0], "a": [0.0]}).comparisons == ()
    with pytest.raises(ValueError, match="no random"):
        conclude({LAST: flat})


def test_a_run_of_a_study_is_its_own_training(tmp_path: Path) -> None:
    own = {"trainer.max_steps": 6, "trainer.callbacks": [{"class_path": "depthcb.DepthProfile"}]}
    config = RunConfig("bert-tiny", "contrastive", "sgd", "equal-step", 3, options=own)
    folder = Store(tmp_path).prepare(config)
    found = training_of(folder)
    assert (found.model, found.objective, found.optimizer, found.control) == (
        "bert-tiny",
        "contrastive",
        "sgd",
        "standard",
    )
    assert dict(found.options) == {"model.lr": 5e-5, "trainer.max_steps": 6}, "the learning rate is the objective's own"
    with pytest.raises(ValueError, match=r"run\.yaml of a study"):
        training_of(tmp_path.parent / "nothing")


def test_a_training_that_is_not_bundled_is_refused(tmp_path: Path) -> None:
    config = {"model": {"class_path": "my.Model"}, "data": {"class_path": "my.Data"}, "trainer": {}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match="Model on Data, which no bundled configuration does"):
        training_of(tmp_path)


def leave(run: Run, folder: Path) -> None:
    for name, found in run.records.items():
        write_header(folder, name, found.callback, 0, found.settings, found.fit, found.parts)
        for row in found.rows:
            write_row(folder, name, dict(row))


def test_the_command_prints_every_rule_and_concludes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leave(run_with(), tmp_path / "one")
    assert main(["advise", str(tmp_path / "one"), "--json", str(tmp_path / "a.json")]) == 0
    out = capsys.readouterr().out
    assert set(RULES) <= set(re.findall(r"^  (\w[\w ]*?)  ", out, re.MULTILINE))
    assert "no placement rule" in out
    assert not re.search(r"\bbest|better|wins|should", out)
    assert re.search(r"^worth: no worth: train to the end", out, re.MULTILINE)
    written = json.loads((tmp_path / "a.json").read_text())["rules"]
    forms = next(rule for rule in written if rule["rule"] == LAST)["sets"][0]
    assert forms["layers"] == forms["peft"]["layers_to_transform"] == [6, 7]
    assert forms["glob"] == "model.layers.[67]"


def test_wrong_arguments_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leave(run_with(), tmp_path / "a" / "one")
    leave(run_with(), tmp_path / "a" / "two")
    one = str(tmp_path / "a" / "one")
    for arguments, told in {
        (str(tmp_path / "a"),): "name one",
        (one, "--rules", "slope"): "there is no rule 'slope'",
        (one, "--budget", "25"): "such as 25%",
        (one, "--modes", "qlora"): "full, lora or both",
        (one, "--test", "--seeds", "0"): "at least 1",
        (one, "--test"): "config.yaml of `depthcb fit`",
    }.items():
        assert main(["advise", *arguments]) == 2
        error = capsys.readouterr().err
        assert told in error
        assert error.count("\n") == 1


FIT = [
    "fit", "--config", "sequence_classification", "--model.backbone", "bert-tiny", "--model.lr", "1e-3",
    "--data.max_length", "32", "--data.batch_size", "8", "--trainer.max_steps", "4", "--trainer.val_check_interval", "2",
    "--trainer.check_val_every_n_epoch", "null", "--trainer.limit_val_batches", "8", "--trainer.log_every_n_steps", "1",
    "--trainer.enable_progress_bar", "false",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_real_run_is_advised_and_tested_and_a_second_command_trains_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*FIT, "--trainer.logger.init_args.save_dir", "runs"]) == 0
    (folder,) = (path.parent for path in tmp_path.rglob("config.yaml"))
    command = ["advise", str(folder), "--test", "--seeds", "2", "--rules", "change,objective distance", "--jobs", "2"]
    assert main([*command, "--json", "a.json"]) == 0
    out = capsys.readouterr().out
    assert "Undecided: 2 of 4 seeds." in out
    assert "layers 0,1,2,3 LoRA 8" in out, "each training names itself"
    results = sorted(tmp_path.rglob("result.json"))
    stamps = [path.stat().st_mtime_ns for path in results]
    full, lora = json.loads(Path("a.json").read_text())["tested"]
    rows = {row["rule"]: row for row in full["rows"]}
    assert rows[LAST]["parameters"] == 8544 + 264, "one of four equal layers, and the new head"
    assert all(math.isfinite(row["loss"]) for row in [*full["rows"], *lora["rows"]] for row["loss"] in row["losses"])
    assert rows[ALL]["memory"] > 1e8
    of_seed = [json.loads(path.read_text()) for path in results]
    assert len({r["data_order"] for r in of_seed if r["config"]["seed"] == 0}) == 1, (
        "the same batches in the same order"
    )
    weights = {
        r["initial_weights"]
        for r in of_seed
        if r["config"]["seed"] == 0 and "model.lora_rank" not in r["config"]["options"]
    }
    assert len(weights) == 1
    assert main(command) == 0
    assert [path.stat().st_mtime_ns for path in results] == stamps
