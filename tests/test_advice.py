"""Rules rank layers by what the record has, sets fit the budget, and every form says the same to its ecosystem."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger
from recipes_families import tiny
from runs import changed, make_run, record
from support import TinyLM, fit, seeded
from torch import nn

from depthcb import DepthProfile, LayerStack, UpdateRatioMonitor
from depthcb.advice import LAST, RANDOM, RULES, MissingData, Place, parse_budget, propose, sizes, within
from depthcb.advice_formats import as_dict, frozen, layers_argument, peft_arguments, schedule
from depthcb.intervals import Estimate
from depthcb.layer_contents import layer_contents
from depthcb.run import Run, read_runs
from depthcb.worth import RestoreProfile

LAYERS = 8

# peft's own call, and what it says of GPT-2's transposed weights.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning", "ignore:fan_in_fan_out")


def run_with(layers: int = LAYERS, parameters: list[int] | None = None) -> Run:
    def describe(found: dict[str, Any]) -> None:
        found["settings"] |= {"parameters": parameters or [100] * layers, "linear": ["attention.query", "mlp"]}

    return changed(make_run(0, "SGD", "standard", layers, 4), "DepthProfile", describe)


def with_worth(run: Run, worth: list[float]) -> Run:
    estimates = tuple(Estimate(w, w - 1, w + 1) for w in worth)
    names = tuple(run.layers)
    profile = RestoreProfile(names, estimates, estimates, estimates, estimates, 1.0, 2.0, 4)
    return changed(run, "DepthProfile", lambda found: found["end"].update(worth=profile.to_dict()))


def with_record(run: Run, name: str, made: dict[str, Any]) -> Run:
    fields = run.to_dict()
    fields["records"][name] = made
    return Run.from_dict(fields)


def ranking(rule: str, run: Run, count: int = 2, draw: int = 0) -> list[int]:
    return RULES[rule].rank(run, Place(LAYERS, count, draw))


def test_data_rules_rank_by_their_figure() -> None:
    rng = np.random.default_rng(0)
    worth, norms, distance = rng.normal(size=(3, LAYERS)).tolist()
    run = with_worth(run_with(), worth)
    rows = [{"step": s, **{f"watch/grad_norm/L{i:02d}": n * (1 - 2 * s) for i, n in enumerate(norms)}} for s in (0, 1)]
    monitor = {"per_layer": [None, *distance[1:]]}
    run = with_record(run, "watch", record("UpdateRatioMonitor", rows))
    run = with_record(run, "objective_distance", record("ObjectiveDistanceMonitor", [], settings=monitor))
    assert ranking("worth", run) == np.argsort(worth)[::-1].tolist()
    assert ranking("gradient norm", run) == np.argsort(norms)[::-1].tolist(), "of the first step"
    assert ranking("objective distance", run) == [*(1 + np.argsort(distance[1:])[::-1]), 0], "None comes last"
    assert ranking("change", run) == np.argsort(run.profiles["cka"][-1].change)[::-1].tolist()
    ratios = [run.records["update_ratio"].rows[0][f"update_ratio/L{i:02d}"] for i in range(LAYERS)]
    assert ranking("step ratio", run) == np.argsort(ratios)[::-1].tolist()


def test_what_is_missing_is_named_with_its_remedy() -> None:
    run = make_run(0, "SGD", "standard", LAYERS, 0)  # interrupted before its first validation
    remedies = {
        "change": "DepthProfile()", "worth": "worth=True", "step ratio": "UpdateRatioMonitor()",
        "gradient norm": "grad_norm", "objective distance": "ObjectiveDistanceMonitor",
    }  # fmt: skip
    assert remedies.keys() == {name for name, rule in RULES.items() if rule.reads}
    for name, remedy in remedies.items():
        with pytest.raises(MissingData, match=re.escape(remedy)):
            ranking(name, run)
    with pytest.raises(ValueError, match="how many parameters its layers have"):
        propose(run, 0.25)


def test_step_ratios_of_smaller_units_rank_no_layers() -> None:
    rows = [{"step": 0, "update_ratio/L00/mlp": 0.1, "update_ratio/L01/mlp": 0.2}]
    run = with_record(run_with(), "update_ratio", record("UpdateRatioMonitor", rows))
    with pytest.raises(MissingData, match="unit='layer'"):
        ranking("step ratio", run)


def test_rules_without_data() -> None:
    run = run_with()
    assert ranking(LAST, run) == [7, 6, 5, 4, 3, 2, 1, 0]
    assert ranking("first k", run) == list(range(LAYERS))
    for count, chosen in {1: [4], 2: [2, 6], 4: [1, 3, 5, 7], 8: list(range(8))}.items():
        assert ranking("evenly spaced", run, count)[:count] == chosen
    assert all(sorted(ranking(name, run)) == list(range(LAYERS)) for name in (LAST, "first k", "evenly spaced", RANDOM))


def test_random_sets_are_the_same_everywhere_and_uniform() -> None:
    run = run_with()
    assert ranking(RANDOM, run, draw=5) == [3, 1, 7, 5, 2, 0, 4, 6]
    firsts = np.array([ranking(RANDOM, run, draw=draw)[:2] for draw in range(0, 8000, 4)])  # every deal's first set
    pairs = np.bincount(firsts.min(axis=1) * LAYERS + firsts.max(axis=1), minlength=LAYERS**2)
    expected = 2000 / 28
    assert pairs[pairs > 0] == pytest.approx(expected, abs=5 * np.sqrt(expected))
    assert (pairs > 0).sum() == 28


@pytest.mark.parametrize(("layers", "count"), [(8, 2), (6, 2), (7, 3), (6, 6)])
def test_consecutive_random_sets_share_out_the_layers(layers: int, count: int) -> None:
    each = layers // count
    for deal in range(20):
        sets = [
            RULES[RANDOM].rank(run_with(), Place(layers, count, each * deal + draw))[:count] for draw in range(each)
        ]
        assert len({layer for own in sets for layer in own}) == each * count


def test_a_set_is_as_large_as_the_budget_allows_in_the_order_of_the_ranking() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        parameters, order = rng.integers(1, 100, LAYERS).tolist(), rng.permutation(LAYERS).tolist()
        share = float(rng.uniform(0.02, 1))
        chosen, left = set(within(order, parameters, share)), share * sum(parameters)
        for layer in order:  # each is in as soon as what is left pays for it
            assert (layer in chosen) == (parameters[layer] <= left)
            left -= parameters[layer] * (layer in chosen)
    assert within([3, 2, 1, 0], [7] * 4, 0.25) == (3,), "exactly a quarter"
    assert within(list(range(10)), [3] * 10, 0.1 + 0.2) == (0, 1, 2), "whatever the rounding"


def test_equal_layers_give_every_rule_the_same_budget() -> None:
    found = propose(with_worth(run_with(), [float(i) for i in range(LAYERS)]), 0.25, draws=range(5))
    assert {len(own) for p in found for own in p.sets} == {2}
    assert [p.rule.name for p in found if p.missing] == ["gradient norm", "objective distance"]
    assert {len(p.sets) for p in found if p.rule.name == RANDOM} == {5}


def test_budgets_that_cannot_be_used_are_refused() -> None:
    for text in ("1/4", "25", "0%", "101%", "many%", "nan%"):
        with pytest.raises(ValueError, match="25%"):
            parse_budget(text)
    with pytest.raises(ValueError, match=r"smallest layer has 12\.5 % .* at least 12\.5%"):
        propose(run_with(), 0.1)


@pytest.mark.parametrize("family", ["bert", "gpt2", "neox"])
def test_peft_adapts_all_linear_modules_of_the_chosen_layers_and_no_others(family: str) -> None:
    from peft import LoraConfig, get_peft_model

    stack = LayerStack.find(tiny(family))
    chosen, linear = [1], layer_contents(stack)["linear"]
    own = {n for n, m in stack.modules[1].named_modules() if type(m) is nn.Linear or type(m).__name__ == "Conv1D"}
    given = [peft_arguments(stack.names, chosen, linear)]
    assert given[0]["layers_to_transform"] == [1]
    renamed = [name.replace("1", "x", 1) for name in stack.names]  # no numbered list, as far as the names go
    given.append({"target_modules": peft_arguments(renamed, chosen, linear)["target_modules"].replace("x", "1", 1)})
    for arguments in given:
        adapted = get_peft_model(tiny(family), LoraConfig(**arguments))
        inside = {n.removeprefix("base_model.model.") for n, m in adapted.named_modules() if hasattr(m, "lora_A")}
        assert inside == {f"{stack.names[1]}.{name}" for name in own}


def test_layers_with_adapters_have_the_linear_modules_of_those_without() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    plain, adapted = tiny("bert"), tiny("bert")
    expected = layer_contents(LayerStack.find(plain))["linear"]
    inject_adapter_in_model(LoraConfig(target_modules=["query", "dense"]), adapted)
    assert layer_contents(LayerStack.find(adapted))["linear"] == expected


@pytest.mark.parametrize("layers", [3, 12])
def test_the_glob_the_freeze_list_and_the_schedule_name_the_same_layers(layers: int) -> None:
    """By LayerStack's own search, and by the regular expressions as finetuning-scheduler applies them."""
    module = TinyLM(layers=layers)
    stack = LayerStack.find(module)
    owners = {id(p): name for name, m in zip(stack.names, stack.modules, strict=True) for p in m.parameters()}
    for size in (2, 3):
        for chosen in itertools.islice(itertools.combinations(range(layers), size), 40):
            own = [stack.names[i] for i in chosen]
            assert list(LayerStack.find(module, layers_argument(stack.names, chosen)).names) == own
            assert sorted(frozen(stack.names, chosen) + own) == sorted(stack.names)
            (phase,) = yaml.safe_load(schedule(stack.names, chosen)).values()
            trained = {
                owners.get(id(p)) for n, p in module.named_parameters() if any(re.match(e, n) for e in phase["params"])
            }
            assert trained == set(own)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # its own
def test_finetuning_scheduler_reads_the_schedule(tmp_path: Path) -> None:
    scheduler = pytest.importorskip("finetuning_scheduler")
    module, path = TinyLM(), tmp_path / "schedule.yaml"
    names = LayerStack.find(module).names
    path.write_text(schedule(names, [1, 2]))
    own = [scheduler.FTSEarlyStopping("val/loss"), scheduler.FTSCheckpoint(monitor="val/loss")]
    fit(
        module,
        [scheduler.FinetuningScheduler(ft_schedule=path, max_depth=0), *own],
        default_root_dir=tmp_path,
        enable_checkpointing=True,
    )
    trained = {n for n, p in module.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in module.named_parameters() if n.startswith((f"{names[1]}.", f"{names[2]}."))}


def test_a_real_record_has_what_the_rules_read(tmp_path: Path) -> None:
    watch, monitor = DepthProfile(), UpdateRatioMonitor(extras=["grad_norm"])
    module = seeded(TinyLM)
    fit(module, [monitor, watch], logger=CSVLogger(tmp_path))
    (run,) = read_runs(tmp_path)
    stack = LayerStack.find(module)
    assert sizes(run) == [sum(p.numel() for p in m.parameters()) for m in stack.modules]
    found = {p.rule.name: p for p in propose(run, 0.5)}
    assert {name for name, p in found.items() if p.missing} == {"worth", "objective distance"}
    change = torch.tensor(watch.profiles[-1].change)
    assert found["change"].sets == (tuple(sorted(change.topk(2).indices.tolist())),)
    forms = as_dict(run.layers, found["change"].sets[0], run.records["depth"].settings["linear"])
    assert {f"{stack.names[0]}.{name}" for name in forms["peft"]["target_modules"]} <= dict(
        module.named_modules()
    ).keys()
