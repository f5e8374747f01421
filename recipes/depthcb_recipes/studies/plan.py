"""``depthcb study plan``: what each run of a study takes in memory and time, before anything is started."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from transformers import AutoModel, AutoModelForCausalLM

from depthcb import LayerStack
from depthcb.gradient_distance import GROUPS, MOST_MEMORY
from depthcb_recipes.backbones.architectures import ARCHITECTURES
from depthcb_recipes.backbones.catalogue import config_of
from depthcb_recipes.data.text_data import TextData
from depthcb_recipes.demo.plan import measure
from depthcb_recipes.demo.sizes import Costs, Settings
from depthcb_recipes.precision import device_of, settle
from depthcb_recipes.silence import silent_libraries, silent_transformers
from depthcb_recipes.studies.grid import RunConfig
from depthcb_recipes.studies.runner import configuration

#: Bytes of a process with its libraries, measured [ours].
PROCESS = 900_000_000
#: Bytes of activations that a training step keeps, per token, layer and width: twice the 34 of Korthikanti et al.,
#: "Reducing activation recomputation in large transformer models" (2022), which count half precision; attention without
#: its score matrices.
_ACTIVATIONS = 68
#: Copies of the logits (fp32) that a language model's loss keeps: scores, their log softmax, the gradient.
_LOGITS = 3 * 4
#: Memory of a GPU that is planned for where this machine has none.
GPU_MEMORY = 80_000_000_000


@dataclass(frozen=True)
class Needs:
    """What one run takes, in bytes if not said otherwise.

    Args:
        parameters: Number of parameters, with a language model's head where the objective has one.
        weights: Weights and their gradients.
        optimizer: State of the optimizer.
        control: The copies that `EqualStep` and `UpdateRatioMonitor` keep of the stack.
        activations: Of a training step.
        probe: The probe's reference.
        pretrained: The copy of the pretrained weights, in main memory.
        distance: Second model and gradients of the objective distance, in main memory, before the fit.
        gpus: GPUs that the run is split over; 0 is the CPU.
    """

    parameters: int
    weights: int
    optimizer: int
    control: int
    activations: int
    probe: int
    pretrained: int
    distance: int
    gpus: int

    @property
    def training(self) -> int:
        """Bytes where the network is trained, over all GPUs."""
        return self.weights + self.optimizer + self.control + self.activations

    @property
    def device(self) -> int:
        """Bytes on each GPU; 0 for a run on the CPU."""
        return self.training // self.gpus if self.gpus else 0

    @property
    def main(self) -> int:
        """Peak of main memory: while the objective distance is measured, or later."""
        fit = 0 if self.gpus else self.training + self.probe
        before = self.distance if self.gpus else self.distance + self.weights // 2 + self.activations
        return PROCESS + self.pretrained + max(before, fit + (self.probe if self.gpus else 0))


def needs(config: RunConfig) -> Needs:
    """Estimates the memory of a run from its network's configuration; in fp32, as the recipes keep weights [ours]."""
    options = configuration(config, Path())
    network = config_of(config.model)
    auto = AutoModelForCausalLM if config.objective == "causal_lm" else AutoModel
    with torch.device("meta"), silent_transformers():
        model = auto.from_config(network)  # type: ignore[no-untyped-call]
    model.tie_weights()
    stack = LayerStack.find(model)
    numbers = sum(p.numel() for p in model.parameters())
    in_stack = sum(p.numel() for layer in stack.parameters() for p in layer)
    size = settings(config, options)
    width, layers = network.hidden_size, len(stack)
    logits = _LOGITS * network.vocab_size if config.objective == "causal_lm" else 0
    forwards = 2 if config.objective == "contrastive" else 1
    callbacks = {c["class_path"].rpartition(".")[2]: c.get("init_args", {}) for c in options["trainer"]["callbacks"]}
    copies = len({"EqualStep", "UpdateRatioMonitor"} & callbacks.keys())
    groups = 2 * GROUPS * in_stack
    distance = 4 * numbers + groups * (4 if groups * 4 <= MOST_MEMORY else 2) + 4 * in_stack
    return Needs(
        parameters=numbers,
        weights=8 * numbers,
        optimizer=(8 if config.optimizer == "adamw" else 4) * numbers,
        control=4 * copies * in_stack,
        activations=forwards * size.tokens * (_ACTIVATIONS * width * layers + logits),
        probe=layers * size.probe_rows * (8 * size.probe_rows + 4 * width),
        pretrained=4 * numbers,
        distance=distance if "ObjectiveDistanceMonitor" in callbacks and config.gpus < 2 else 0,
        gpus=config.gpus,
    )


def settings(config: RunConfig, options: dict[str, Any]) -> Settings:
    """Returns the sizes that a run's time depends on, in the demo's terms."""
    data, trainer, probe = options["data"]["init_args"], options["trainer"], options.get("probe") or {}
    watch = next(c for c in trainer["callbacks"] if c["class_path"].endswith("DepthProfile")).get("init_args", {})
    length = data.get("block_size") or data.get("max_length")
    batch = data["batch_size"]
    rows = data.get("val_rows", inspect.signature(TextData).parameters["val_rows"].default)
    limit = trainer.get("limit_val_batches")
    return Settings(
        config.model,
        steps=trainer["max_steps"],
        batch_size=batch,
        block_size=length,
        validate_every=trainer["val_check_interval"],
        val_blocks=min(rows, limit * batch) if isinstance(limit, int) else rows,
        probe_rows=probe.get("rows", 290) if probe else watch.get("probe_rows", 256),
        probe_length=probe.get("max_length", 128) if probe else length,
        null_seeds=config.null_seeds,
    )


def calibrate() -> tuple[Costs, int]:
    """Times training steps and a probe pass of a small network on this machine; returns them with its parameters."""
    network = ARCHITECTURES["gpt2"].config(n_layer=4, vocab_size=8192)
    model = AutoModelForCausalLM.from_config(network)  # type: ignore[no-untyped-call]
    size = Settings("gpt2", batch_size=4, block_size=64, probe_rows=32, probe_length=64)
    with silent_libraries():
        costs = measure(model, size, settle("auto", device_of("auto")))
    return costs, sum(p.numel() for p in model.parameters())


def seconds(config: RunConfig, parameters: int, costs: Costs, calibrated: int) -> float:
    """Estimates a run's time: the calibration's, in proportion to parameters and tokens [ours]."""
    ratio = parameters / calibrated
    scaled = replace(costs, step=costs.step * ratio, step_twice=costs.step_twice * ratio, probe=costs.probe * ratio)
    return scaled.fit_seconds(settings(config, configuration(config, Path())))


def gpus_of(gigabytes: float | None) -> tuple[int, int, str]:
    """Returns how many GPUs are planned for, their memory in bytes, and a sentence on both.

    Args:
        gigabytes: Memory of a GPU; None for that of this machine's, or `GPU_MEMORY`.
    """
    count = torch.cuda.device_count()
    own = torch.cuda.get_device_properties(0).total_memory if count else GPU_MEMORY
    memory = round(gigabytes * 1e9) if gigabytes is not None else own
    if count:
        return count, memory, f"This machine has {count} GPUs; planned for {_gb(memory)} GB each."
    return (
        1,
        memory,
        f"This machine has no GPU: memory is planned for one of {_gb(memory)} GB, and times are its CPU's.",
    )


def plan_table(
    configs: Sequence[RunConfig], costs: Costs, calibrated: int, gpu_memory: int, gpus: int, memory: int
) -> tuple[Table, list[str]]:
    """Returns one row per model and control, the largest of its objectives, and a sentence for each that cannot fit.

    Args:
        configs: The study's runs.
        costs: From `calibrate`.
        calibrated: Parameters of the network that was timed.
        gpu_memory: Bytes of a GPU.
        gpus: Number of GPUs.
        memory: Bytes of main memory that are free.
    """
    titles = ("model", "control", "runs", "parameters", "weights + gradients", "optimizer", "control's copies",
              "activations", "per GPU", "main memory", "h per run", "h")  # fmt: skip
    table = Table(*titles, box=SIMPLE_HEAD, pad_edge=False)
    problems, total = [], 0.0
    cells: dict[tuple[str, str], list[RunConfig]] = {}
    for config in configs:
        cells.setdefault((config.model, config.control), []).append(config)
    for (model, control), own in cells.items():
        by_objective = {c.objective: (needs(c), seconds(c, needs(c).parameters, costs, calibrated)) for c in own}
        most = max((need for need, _ in by_objective.values()), key=lambda need: need.training)
        hours = sum(by_objective[c.objective][1] for c in own) / 3600
        total += hours
        figures = (most.weights, most.optimizer, most.control, most.activations, most.device, most.main)
        table.add_row(Path(model).name, control, str(len(own)), f"{most.parameters / 1e6:,.0f} M", *map(_gb, figures),
                      f"{hours / len(own):.2f}", f"{hours:.1f}")  # fmt: skip
        problems += _problems(f"{model} {control}", most, gpu_memory, gpus, memory)
    table.add_row("all", "", str(len(configs)), *[""] * 8, f"{total:.1f}")
    return table, problems


def _problems(name: str, need: Needs, gpu_memory: int, gpus: int, memory: int) -> list[str]:
    """Says why a run cannot fit, and what to do."""
    found = []
    if need.gpus > gpus:
        found.append(
            f"{name} is split over {need.gpus} GPUs and there is {gpus}: run it where there are {need.gpus} (the study "
            "skips it elsewhere), or on a cluster with --engine ray."
        )
    if need.device > gpu_memory:
        parts = -(-need.training // gpu_memory)
        found.append(
            f"{name} needs {_gb(need.device)} GB per GPU of {_gb(gpu_memory)}: split it over "
            f"{max(parts, need.gpus + 1)} (gpus and ModelParallelStrategy under by.model, as paper.yaml does for "
            "pythia-6.9b), or make data.batch_size smaller."
        )
    if need.main > memory:
        found.append(
            f"{name} needs {_gb(need.main)} GB of main memory and {_gb(memory)} are free: end other programs, or run "
            "it on a machine with more."
        )
    return found


def _gb(number: int) -> str:
    return f"{number / 1e9:.1f}"
