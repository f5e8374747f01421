"""Chooses the demo's size by the machine's memory and measured speed."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from depthcb import EqualStep, LayerStack, UpdateRatioMonitor
from depthcb.probe import Probe
from depthcb.reference import Reference
from depthcb.similarity import find_measures
from depthcb_recipes.backbones.catalogue import count_parameters
from depthcb_recipes.backbones.loading import load_backbone
from depthcb_recipes.backbones.pretraining import pretrain_if_missing
from depthcb_recipes.demo.sizes import SIZES, Costs, Settings, affordable, memory_needed, replicated
from depthcb_recipes.fit_progress import StepClock
from depthcb_recipes.machine import free_memory, release_memory
from depthcb_recipes.objectives.causal_lm import CausalLM
from depthcb_recipes.precision import Precision, device_of, settle

#: The measures of the demo's profiles.
DEMO_MEASURES = ("cka", "cka_normalized")


@dataclass(frozen=True)
class Plan:
    """What the demo runs on this machine.

    Args:
        settings: The settings of every fit, with the precision that was chosen.
        precision: That precision with the reason.
        pretrained: The network at its pretrained weights.
        tokenizer: Its tokenizer.
        costs: The measured costs that decided the size; None if the size was given.
        started: Start of the demo, in seconds of `time.monotonic`.
    """

    settings: Settings
    precision: Precision
    pretrained: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    costs: Costs | None
    started: float

    @property
    def seconds_in_all(self) -> float | None:
        """Duration of the whole demo, estimated from the measured costs."""
        return time.monotonic() - self.started + self.costs.seconds(self.settings) if self.costs else None

    def to_dict(self) -> dict[str, object]:
        """Returns the plan as stored in ``summary.json``."""
        seconds = round(self.costs.seconds(self.settings), 1) if self.costs else None
        return {
            "sizes": size_name(self.settings),
            "settings": dataclasses.asdict(self.settings),
            "precision": self.precision.to_dict(),
            "costs": dataclasses.asdict(self.costs) if self.costs else None,
            "estimated_seconds": seconds,
            "seconds": round(time.monotonic() - self.started, 1),
        }


def make_plan(
    sizes: Sequence[Settings], console: Console, minutes: float, started: float, replicate: bool = False
) -> Plan:
    """Returns a plan for the first size that fits memory and time, or for the smallest if none fits the time.

    Args:
        sizes: The sizes to choose from, largest first.
        console: Where the choice is printed.
        minutes: Time budget of the whole demo.
        started: Start of the demo, in seconds of `time.monotonic`.
        replicate: Whether to spend the time that is left on more seeds.

    Raises:
        ValueError: Too little memory, or a backbone that cannot be loaded.
    """
    device = device_of("auto")
    small_enough = _with_memory(sizes, device)
    precision = settle(sizes[0].precision, device)
    console.print(str(precision), highlight=False, soft_wrap=True)
    plan: Plan | None = None
    for backbone, of_one in itertools.groupby(small_enough, key=lambda size: size.backbone):
        own = list(of_one)
        console.print(f"Loading {backbone}.", highlight=False, soft_wrap=True)
        pretrain_if_missing(backbone)
        pretrained, tokenizer = load_backbone(backbone)
        costs = measure(pretrained, own[-1], precision) if len(sizes) > 1 else None
        left = 60 * minutes - (time.monotonic() - started)
        found = affordable(own, costs, left) if costs else own[0]
        if found and costs and replicate:
            found = replicated(found, costs, left)
        settings = dataclasses.replace(found or own[-1], precision=precision.precision)
        plan = Plan(settings, precision, pretrained, tokenizer, costs, started)
        if found:
            break
        if plan.seconds_in_all:
            console.print(f"{backbone}: even its smallest size would take about {plan.seconds_in_all / 60:.1f} min.")
    assert plan is not None
    _tell(plan, console, minutes)
    return plan


def _with_memory(sizes: Sequence[Settings], device: torch.device) -> list[Settings]:
    """Returns the sizes that fit the free memory of the device.

    Raises:
        ValueError: None fits.
    """
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    parameters = {backbone: count_parameters(backbone) for backbone in {size.backbone for size in sizes}}
    needed = [memory_needed(parameters[size.backbone], size) for size in sizes]
    if min(needed) > free:
        raise ValueError(
            f"The demo needs {min(needed) / 1e9:.1f} GB of memory on {sizes[-1].backbone} and {free / 1e9:.1f} GB are "
            "free: end other programs, or choose a smaller backbone (--quick)."
        )
    return [size for size, bytes_ in zip(sizes, needed, strict=True) if bytes_ <= free]


def _tell(plan: Plan, console: Console, minutes: float) -> None:
    """Prints the choice, and a warning if it will take long."""
    s, costs, name, seconds = plan.settings, plan.costs, size_name(plan.settings), plan.seconds_in_all
    what = f"{s.steps} steps of {s.batch_size} x {s.block_size} tokens, {s.probe_rows} probe rows"
    if costs is None or seconds is None:
        console.print(f"{s.backbone}: {s.fits} fits of {what}.", highlight=False, soft_wrap=True)
        return
    console.print(
        f"Size {name or 'of your own'}: {s.fits} fits of {what}; about {seconds / 60:.1f} min in all (a step takes "
        f"{costs.step_seconds(s):.2f} s, a probe pass {costs.probe_seconds(s):.2f} s)."
        + (f" `--sizes {name}` repeats this choice." if name else ""),
        highlight=False,
        soft_wrap=True,
    )
    if seconds > 2 * 60 * minutes:
        console.print(
            f"[yellow]This machine is slow for it: even the smallest size takes {seconds / 60:.0f} min, not "
            f"{minutes:g}. Ctrl-C ends it at any time.[/]",
            highlight=False,
            soft_wrap=True,
        )


def measure(pretrained: PreTrainedModel, size: Settings, precision: Precision) -> Costs:
    """Times training steps of two lengths under the control, and a probe pass, after a warm-up step.

    Args:
        pretrained: The network, which is not changed.
        size: The smallest size, from which the others are extrapolated.
        precision: The precision of the fits.
    """
    model = copy.deepcopy(pretrained)
    batch = _random_batch(model, size.batch_size, size.block_size)
    twice = {name: torch.cat([column, column]) for name, column in batch.items()}
    clock = StepClock()
    trainer = pl.Trainer(
        max_steps=4,
        devices=1,
        precision=precision.precision,  # type: ignore[arg-type]  # Lightning checks it
        gradient_clip_val=1.0,
        callbacks=[EqualStep(), UpdateRatioMonitor(), clock],
        logger=False,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches: Any = [batch, batch, batch, twice]
    trainer.fit(CausalLM(model), DataLoader(batches, batch_size=None))
    rows = [min(16, size.probe_rows - start) for start in range(0, size.probe_rows, 16)]  # as `PackedText` does
    probe = Probe(tuple(_random_batch(model, n, size.probe_length) for n in rows))
    stack, measures = LayerStack.find(model), find_measures(DEMO_MEASURES)
    reference = Reference.record(probe, model.base_model, stack, measures)
    start = time.perf_counter()
    reference.profiles(probe.record(model.base_model, stack, reference.layout), measures, step=0, epoch=0)
    probed = time.perf_counter() - start
    del model, trainer, stack
    release_memory()
    _, *steps, step_twice = clock.seconds  # the first one is the warm-up
    return Costs(min(steps), step_twice, size.tokens, probed, size.probe_rows * size.probe_length)


def _random_batch(model: PreTrainedModel, rows: int, length: int) -> dict[str, torch.Tensor]:
    """Returns random tokens, which take as long as text."""
    ids = torch.randint(model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def size_name(settings: Settings) -> str | None:
    """Returns the name of a size in `SIZES`, with its seeds if several; None if it has none."""
    plain = dataclasses.replace(settings, precision="auto", seeds=1)
    seeds = f"x{settings.seeds}" if settings.seeds > 1 else ""
    return next((name + seeds for name, size in SIZES.items() if size == plain), None)
