"""transformers' Trainer and TRL: silence, loggers, resume, precisions, accumulation, adapters, refusals, failures."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import wandb
from datasets import Dataset
from front_ends.same import MEASURES, Outcome, model, probe, trainer, transformers_callbacks, with_transformers
from lightning.fabric import Fabric
from offline import history
from peft import LoraConfig, get_peft_model
from support import LENGTH, VOCABULARY, free_port, run_python, texts
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, Trainer, TrainerCallback

import depthcb
import depthcb.fabric as fabric_front_end
from depthcb.run import read_runs
from depthcb.transformers import DepthProfileCallback, EqualStepCallback, UpdateRatioCallback

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*fewer than 5 directions.*",
    "ignore:.*mostly shrinks.*",
    "ignore:.*is_gradient_checkpointing.*:FutureWarning",
)


def hooks() -> int:
    return len(_global_optimizer_pre_hooks) + len(_global_optimizer_post_hooks)


def tiny(dropout: float = 0.1) -> GPT2LMHeadModel:
    torch.manual_seed(3)
    config = GPT2Config(
        n_embd=16, n_layer=4, n_head=2, vocab_size=VOCABULARY, n_positions=64, bos_token_id=0, eos_token_id=0,
        pad_token_id=0, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, tie_word_embeddings=False,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


class Streams(TrainerCallback):
    """Records all random states and train/eval flags around steps and evaluations."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        flags = [m.training for m in kwargs["model"].modules()]
        self.seen.append((torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist(), flags))

    on_evaluate = on_train_end = on_epoch_end = on_step_begin


def outcome(folder: Path, callbacks: list[Any], **options: Any) -> tuple[Any, ...]:
    net, streams = tiny(), Streams()
    defaults: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "train_sampling_strategy": "random"}
    run = trainer(net, folder, [*callbacks, streams], **{**defaults, **options})
    run.train()
    assert run.optimizer is not None
    logs = [
        {k: v for k, v in row.items() if "_per_second" not in k and "runtime" not in k} for row in run.state.log_history
    ]
    return net.state_dict(), run.optimizer.state_dict(), streams.seen, logs


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation, the last window partial": {"gradient_accumulation_steps": 3},
    "bf16": {"bf16": True},
    "evaluation at the start": {"eval_on_start": True},
    "clipping and a schedule": {"max_grad_norm": 0.1, "lr_scheduler_type": "linear"},
}


@pytest.mark.parametrize(("name", "given"), [*((name, True) for name in OPTIONS), ("plain", False)])
def test_an_observed_run_is_the_unobserved_one(name: str, given: bool, tmp_path: Path) -> None:
    watch, before = DepthProfileCallback(probe() if given else None, measures=MEASURES), hooks()
    bare = outcome(tmp_path / "bare", [], **OPTIONS[name])
    seen = outcome(tmp_path / "seen", [watch, UpdateRatioCallback()], **OPTIONS[name])
    assert watch.recorder.profiles
    assert watch.recorder.profiles[-1].mean > 1e-6, "nothing was watched: a weak test"
    for a, b in zip(bare, seen, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert hooks() == before


def test_the_probe_runs_in_fp32_inside_bf16(tmp_path: Path) -> None:
    """accelerate's forward turns bf16 on: rounded activations would differ from those of the same weights in fp32."""
    watch, net = DepthProfileCallback(probe(), measures=MEASURES), tiny()
    before = tiny()
    trainer(net, tmp_path, [watch], bf16=True).train()
    after = tiny()
    after.load_state_dict(net.state_dict())
    alone = depthcb.depth_profile(before, after, probe(), measures=MEASURES)
    assert watch.recorder.profiles[-1].change == pytest.approx(alone["cka"].change, rel=1e-9)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_steps_are_equal_and_counted_once(accumulate: int, tmp_path: Path) -> None:
    callbacks = transformers_callbacks()
    run = trainer(model(), tmp_path, callbacks, gradient_accumulation_steps=accumulate)
    run.train()
    (found,) = read_runs(tmp_path)
    assert found.step_ratio.steps == tuple(range(run.state.global_step))
    assert found.step_ratio.spread == pytest.approx(1, rel=1e-4)
    assert found.wanted_ratio.spread > 1.01, "nothing to control: a weak test"
    seen = np.array(found.records["update_ratio"].rows[-1]["update_ratio/L02"])
    assert seen == pytest.approx(found.step_ratio.table[-1][2], rel=1e-5)


def test_a_resumed_run_goes_on(tmp_path: Path) -> None:
    whole, net, callbacks = with_transformers(tmp_path / "whole"), model(), transformers_callbacks()

    before = hooks()

    class Fails(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 6:
                raise KeyError("killed")

    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4}
    with pytest.raises(KeyError, match="killed"):
        trainer(net, tmp_path / "parts", [*callbacks, Fails()], **options).train()
    assert hooks() == before
    net, callbacks = model(), transformers_callbacks()
    trainer(net, tmp_path / "parts", callbacks, **options).train(resume_from_checkpoint=True)
    parts = Outcome.of(net, callbacks[2].recorder.profiles_by_measure, tmp_path / "parts")
    assert torch.equal(parts.weights, whole.weights)
    for name in whole.run.records:
        assert parts.rows(name) == whole.rows(name)
    assert parts.profiles == whole.profiles
    assert parts.run.mixed == parts.run.unpaired == ""
    assert [part["step"] for part in parts.run.records["depth"].parts] == [0, 4]
    assert callbacks[0].equalizer.mean_realised.counts == [8] * 4
    (tmp_path / "parts" / "depthcb" / "depth.pt").unlink()
    with pytest.raises(ValueError, match=r"has no reference .*use the same output folder"):
        trainer(model(), tmp_path / "parts", transformers_callbacks(), **options).train(resume_from_checkpoint=True)


def test_a_control_that_a_resume_adds_makes_a_mixed_run(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4}
    control, _, watch = transformers_callbacks()
    trainer(model(), tmp_path, [watch], max_steps=4, **options).train()
    control, _, watch = transformers_callbacks()
    trainer(model(), tmp_path, [control, watch], **options).train(resume_from_checkpoint=True)
    (run,) = read_runs(tmp_path)
    assert run.mixed == "EqualStep 'equal_step' added at step 4; hyperparameters changed at step 4"


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """W&B reads the environment once per process: it is told before and after."""
    wandb.teardown()
    with monkeypatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_DIR", str(tmp_path))
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
        yield
    wandb.teardown()


@pytest.mark.usefixtures("offline")
def test_rows_reach_every_integration_that_is_on(tmp_path: Path) -> None:
    callbacks = transformers_callbacks()
    trainer(model(), tmp_path / "run", callbacks, report_to=["wandb", "tensorboard"], logging_steps=2).train()
    wandb.finish()
    rows = history(tmp_path)
    slopes = [(r["train/global_step"], r["eval/depth/cka/slope"]) for r in rows if "eval/depth/cka/slope" in r]
    assert slopes == [
        (4, pytest.approx(callbacks[2].recorder.profiles[0].slope)),
        (8, pytest.approx(callbacks[2].recorder.profiles[1].slope)),
    ]
    for key in ("train/equal_step/target", "train/update_ratio/spread", "train/loss"):
        assert [row["train/global_step"] for row in rows if key in row] == [2, 4, 6, 8], key
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    assert [e.step for e in events.Scalars("eval/depth/cka/slope")] == [4, 8]
    assert [e.step for e in events.Scalars("train/equal_step/spread")] == [2, 4, 6, 8]


def test_another_fit_with_the_same_objects_keeps_the_reference(tmp_path: Path) -> None:
    net, callbacks = model(), transformers_callbacks()
    for _ in range(2):
        trainer(net, tmp_path, callbacks).train()
    means = [p.mean for p in callbacks[2].recorder.profiles]
    assert len(means) == 4
    assert means[2] > means[1], "the second fit measures from where the first began"
    assert callbacks[0].equalizer.mean_realised.counts == [8] * 4
    (run,) = read_runs(tmp_path)
    assert [p.step for p in run.profiles["cka"]] == [3, 7]


def test_a_profile_chooses_the_best_checkpoint(tmp_path: Path) -> None:
    watch = DepthProfileCallback(probe(), measures=MEASURES)
    options = {"save_strategy": "best", "metric_for_best_model": "depth/cka/mean", "greater_is_better": False}
    made = trainer(model(), tmp_path, [watch], **options)
    made.train()
    first, second = watch.recorder.profiles
    assert first.mean < second.mean
    assert made.state.best_metric == pytest.approx(first.mean)
    assert made.state.best_model_checkpoint is not None
    assert made.state.best_model_checkpoint.endswith("checkpoint-4")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_strategy": "no"}, "eval_strategy is 'no', so no profile is measured"),
    ],
)
def test_a_run_that_never_evaluates_says_so(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=message):
        trainer(model(), tmp_path, [DepthProfileCallback(probe(), measures=MEASURES)], **options).train()


def test_a_null_of_other_weights_is_refused(tmp_path: Path) -> None:
    watch = DepthProfileCallback(probe(), measures=MEASURES, pretrained="cpu", null_draws=2)
    options: dict[str, Any] = {"load_best_model_at_end": True, "save_strategy": "epoch"}
    with pytest.raises(ValueError, match="load_best_model_at_end"):
        trainer(model(), tmp_path / "best", [watch], **options).train()
    trainer(model(), tmp_path / "last", [watch]).train()
    (run,) = read_runs(tmp_path / "last")
    assert len(run.null["cka"]) == 2
    assert set(run.records["depth"].rows[-1]) >= {"net_change"}


@pytest.mark.parametrize("make", [EqualStepCallback, UpdateRatioCallback, DepthProfileCallback])
@pytest.mark.parametrize("engine", ["DeepSpeed", "FSDP1"])
def test_deepspeed_and_fsdp1_are_refused(make: Any, engine: str, tmp_path: Path) -> None:
    """Neither runs on a CPU, so a real Trainer is told that accelerate has prepared for it."""
    callback = make()
    run = trainer(model(), tmp_path, [callback])
    run.is_deepspeed_enabled = engine == "DeepSpeed"
    run.is_fsdp_enabled = engine == "FSDP1"
    run.accelerator.state.__dict__["fsdp_plugin"] = SimpleNamespace(fsdp_version=1)
    try:
        with pytest.raises(ValueError, match=rf"{make.__name__} does not support {engine}.*use FSDP2.*depthcb compare"):
            run_event(run)
    finally:
        del run.accelerator.state.__dict__["fsdp_plugin"]


def run_event(run: Trainer) -> None:
    """Calls the event as the Trainer does, from one of its methods."""

    def on_init_end(self: Trainer) -> None:
        self.callback_handler.on_init_end(self.args, self.state, self.control)

    on_init_end(run)


LIGHTNING = {"DepthProfile": lambda: depthcb.DepthProfile(probe()), "EqualStep": depthcb.EqualStep, "UpdateRatioMonitor": depthcb.UpdateRatioMonitor}  # fmt: skip
FABRIC = {"DepthProfile": lambda: fabric_front_end.DepthProfile(probe()), "EqualStep": fabric_front_end.EqualStep, "UpdateRatioMonitor": fabric_front_end.UpdateRatioMonitor}  # fmt: skip
OWN = {"DepthProfile": DepthProfileCallback, "EqualStep": EqualStepCallback, "UpdateRatioMonitor": UpdateRatioCallback}


@pytest.mark.parametrize("name", OWN)
def test_signposts(name: str, tmp_path: Path) -> None:
    own = OWN[name].__name__
    for make, known in ((LIGHTNING[name], f"depthcb.{name}"), (FABRIC[name], f"depthcb.fabric.{name}")):
        told = rf"^{known} is not for transformers.Trainer: use depthcb\.transformers\.{own} there\.$"
        with pytest.raises(TypeError, match=told):
            trainer(model(), tmp_path, [make()])  # type: ignore[operator]
    with pytest.raises(TypeError, match=rf"{own} is not for Lightning's Trainer: use depthcb\.{name} there"):
        pl.Trainer(callbacks=[OWN[name]()], logger=False, accelerator="cpu")  # type: ignore[operator]
    with pytest.raises(TypeError, match=rf"{own} is not for Fabric: use depthcb\.fabric\.{name} there"):
        Fabric(accelerator="cpu", callbacks=[OWN[name]()]).setup(model())  # type: ignore[operator]


@pytest.mark.slow
def test_two_processes_agree_with_each_other_and_with_one(tmp_path: Path) -> None:
    """accelerate shards nothing on a CPU, so this is DDP alone."""
    alone, folder = with_transformers(tmp_path / "one"), tmp_path / "two"
    launcher = ["torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    script = Path(__file__).with_name("transformers_fit.py")
    folder.mkdir()
    done = run_python(*["-m", *launcher, script, folder])
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first["weights"] == first["unwatched"]
    assert first["weights"] == pytest.approx(alone.weights.tolist(), abs=1e-5)
    for change, before in zip(first["change"], alone.profiles["cka"], strict=True):
        assert change == pytest.approx(before.change, rel=1e-3)
    (record,) = [run for run in read_runs(folder) if run.profiles]
    assert record.step_ratio.steps == tuple(range(8))
    assert record.step_ratio.table == pytest.approx(alone.run.step_ratio.table, rel=1e-5)
    assert record.finished


def lora(net: GPT2LMHeadModel) -> Any:
    return get_peft_model(net, LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True))


def test_adapters_are_watched_and_not_controlled(tmp_path: Path) -> None:
    callbacks = [UpdateRatioCallback(), DepthProfileCallback(probe(), measures=MEASURES)]
    trainer(lora(tiny()), tmp_path, callbacks).train()
    (run,) = read_runs(tmp_path)
    assert run.profiles["cka"][-1].mean > 0
    assert len(run.step_ratio.steps) == 8
    with pytest.raises(ValueError, match=r"EqualStep: layer .* trains adapters"):
        trainer(lora(tiny()), tmp_path, [EqualStepCallback()]).train()


def tokenizer() -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["<eos>", *(f"w{i}" for i in range(1, VOCABULARY))])}
    plain = Tokenizer(WordLevel(words, unk_token="<eos>"))
    plain.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>", pad_token="<eos>", unk_token="<eos>")


def words(seed: int) -> list[str]:
    return [" ".join(f"w{i}" for i in item["input_ids"].tolist()) for item in texts(40, seed)]


def trl_run(kind: str, folder: Path, callbacks: list[Any]) -> Any:
    trl = pytest.importorskip("trl")
    own: dict[str, Any] = {
        "per_device_train_batch_size": 8, "max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "logging_steps": 1,
        "report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True,
        "learning_rate": 1e-2, "dataloader_pin_memory": False, "max_length": 2 * LENGTH,
    }  # fmt: skip
    if kind == "SFT":
        sets = [Dataset.from_dict({"text": words(seed)}) for seed in (0, 1)]
    else:
        sets = [
            Dataset.from_dict({"prompt": words(s), "chosen": words(s + 10), "rejected": words(s + 20)}) for s in (0, 1)
        ]
    more: dict[str, Any] = {} if kind == "SFT" else {"ref_model": tiny()}
    arguments = getattr(trl, f"{kind}Config")(str(folder), **own)
    return getattr(trl, f"{kind}Trainer")(
        tiny(), args=arguments, train_dataset=sets[0], eval_dataset=sets[1], processing_class=tokenizer(),
        callbacks=callbacks, **more,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_trl(kind: str, tmp_path: Path) -> None:
    found = []
    for watched in (False, True):
        watch = DepthProfileCallback(measures=MEASURES)
        callbacks = [EqualStepCallback(), *([UpdateRatioCallback(), watch] if watched else [])]
        run = trl_run(kind, tmp_path / str(watched), callbacks)
        run.train()
        found.append(run.model.state_dict())
    torch.testing.assert_close(*found, rtol=0, atol=0)
    (record,) = read_runs(tmp_path / "True")
    assert [p.step for p in record.profiles["cka"]] == [1, 3]
    assert record.profiles["cka"][-1].mean > 1e-6
    assert record.step_ratio.steps == (0, 1, 2, 3)
    assert record.step_ratio.spread == pytest.approx(1, rel=1e-4)
    assert json.loads(json.dumps(record.records["depth"].fit["trainer"])) == f"{kind}Trainer"
