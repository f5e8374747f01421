"""One run of a study: a fit, its null, and the figures that the study's table needs."""

from __future__ import annotations

import copy
import dataclasses
import errno
import hashlib
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from torch.distributed.tensor import DTensor

from depthcb import DepthProfile
from depthcb.callbacks.logging import callbacks_of
from depthcb.errors import NotFiniteError, chain
from depthcb.run import Run, read_runs
from depthcb_recipes import CONFIGS
from depthcb_recipes.backbones.catalogue import describe
from depthcb_recipes.backbones.loading import BackboneNotFoundError
from depthcb_recipes.fit import DEFAULTS, fit_cli
from depthcb_recipes.machine import peak_memory
from depthcb_recipes.objectives.objective import Objective
from depthcb_recipes.objectives.objective_distance_monitor import ObjectiveDistanceMonitor
from depthcb_recipes.precision import Precision
from depthcb_recipes.publish import published, remove_left_over
from depthcb_recipes.studies.grid import RunConfig
from depthcb_recipes.studies.result import FINISHED, Figures, Result
from depthcb_recipes.studies.store import Store, cache_error, full_disk


def run(config: RunConfig, folder: Path) -> Result:
    """Fits and returns the result; an error is recorded as a failed run.

    Args:
        config: The run.
        folder: The run's folder in its study's.

    Raises:
        Exception: The disk is full or the cache cannot be written, which would fail the other runs too.
    """
    torch.set_num_threads(config.threads)
    settled = Store(folder.parents[1]).precision(config.device)
    precision = Precision(**settled) if settled and settled["precision"] == config.precision else None
    try:
        return Result(FINISHED, config, fit(config, folder, precision))
    except Exception as error:
        if full_disk(error) or cache_error(error):
            raise
        traceback.print_exc()
        return Result(failure(error), config, message=" ".join(str(error).split()) or type(error).__name__)


def failure(error: BaseException) -> str:
    """Returns the status of a run that an error ended, by the error or by one that led to it.

    Example:
        >>> failure(MemoryError()), failure(KeyError())
        ('out of memory', 'failed')
    """
    for e in chain(error):
        refused = isinstance(e, OSError) and e.errno == errno.ENOMEM  # a fork, or a file mapped into memory
        if refused or isinstance(e, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(e):
            return "out of memory"
        if isinstance(e, NotFiniteError):
            return "not finite"
        if isinstance(e, BackboneNotFoundError):
            return "missing model"
    return "failed"


class Fingerprints(pl.Callback):
    """Hashes the initial weights and the batches of a fit, and stops at a non-finite loss.

    The batches' hash is a running one, so that a resumed fit ends with the hash of an uninterrupted one.

    Raises:
        NotFiniteError: After a batch whose loss is not finite.
    """

    def __init__(self) -> None:
        self.initial_weights = ""
        self.data_order = ""

    def state_dict(self) -> dict[str, Any]:
        return {"initial_weights": self.initial_weights, "data_order": self.data_order}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.initial_weights, self.data_order = state_dict["initial_weights"], state_dict["data_order"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.initial_weights:
            return
        weights = hashlib.sha256()
        for name, tensor in sorted(pl_module.state_dict().items()):
            weights.update(name.encode())
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            weights.update(whole.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        self.initial_weights = weights.hexdigest()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, *_: Any) -> None:
        order = hashlib.sha256(self.data_order.encode())
        for name, tensor in sorted(batch.items()):
            order.update(name.encode())
            order.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        self.data_order = order.hexdigest()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
        finite = bool(torch.isfinite(loss).all())
        if not trainer.strategy.reduce_boolean_decision(finite):  # all processes stop: none waits for another
            raise NotFiniteError(f"the loss was {float(loss)} at step {trainer.global_step}: lower the learning rate")


class Resumable(pl.Callback):
    """Saves one checkpoint at each validation, with the state of the random generators that dropout draws from.

    Args:
        path: The checkpoint's file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._streams: dict[str, Any] = {}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking and trainer.global_step != trainer.max_steps:  # a finished fit is not resumed
            with published(self.path) as fresh:
                trainer.save_checkpoint(fresh)

    def on_train_batch_start(self, *_: Any) -> None:
        if self._streams:
            torch.set_rng_state(self._streams["cpu"])
            torch.cuda.set_rng_state_all(self._streams["cuda"])
            self._streams = {}

    def state_dict(self) -> dict[str, Any]:
        return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._streams = state_dict


def fit(
    config: RunConfig,
    folder: Path,
    precision: Precision | None = None,
    *,
    before: Callable[[pl.Trainer, Objective], None] = lambda trainer, module: None,
) -> Figures | None:
    """Fits a network as a run's configuration says, and measures its null.

    Args:
        config: The run.
        folder: Where its record goes.
        precision: The precision that was chosen for the run, with its reason; None if it is the run's own choice.
        before: Called with the Trainer and the module before the fit.

    Returns:
        The figures; None on all processes of the run but the first.

    Raises:
        ValueError: The configuration cannot be run.
    """
    cli = fit_cli(configuration(config, folder), run=False, exit_on_error=False)
    trainer, module = cli.trainer, cli.model
    cli.precision_record.choice = precision or cli.precision
    before(trainer, module)
    prints = Fingerprints()
    callbacks = callbacks_of(trainer)
    watch = next((c for c in callbacks if isinstance(c, DepthProfile)), None)
    if watch is None:
        raise ValueError(
            "trainer.callbacks has no DepthProfile, which a study's figures come from: add depthcb.DepthProfile."
        )
    if config.null_seeds:
        watch.recorder.pretrained = watch.recorder.pretrained or "cpu"
        watch.recorder.null_draws = config.null_seeds
    callbacks.append(prints)
    checkpoint = folder / "last.ckpt"
    if config.resumes:
        if trainer.world_size > 1:
            raise ValueError(
                f"data.stateful is not supported on {trainer.world_size} processes, since only the random streams of "
                "one are saved: leave it out, and a killed run starts from scratch."
            )
        remove_left_over(checkpoint)
        callbacks.append(Resumable(checkpoint))
    trainer.fit(module, cli.datamodule, ckpt_path=checkpoint if checkpoint.is_file() else None)
    checkpoint.unlink(missing_ok=True)
    if not trainer.is_global_zero:
        return None
    (found,) = read_runs(folder)
    return _figures(config, found, callbacks, prints, trainer)


def configuration(config: RunConfig, folder: Path) -> dict[str, Any]:
    """Returns the options of ``depthcb fit`` that are the run, as LightningCLI takes them."""
    default = yaml.safe_load(DEFAULTS.read_text(encoding="utf-8"))
    bundled = CONFIGS / f"{config.objective}.yaml"
    objective = copy.deepcopy(config.recipe) or yaml.safe_load(bundled.read_text(encoding="utf-8"))
    options = {**objective, "trainer": default["trainer"] | objective.get("trainer", {})}
    logger = {"save_dir": str(folder), "name": "", "version": ""}
    own = {
        "seed_everything": config.seed,
        "model.backbone": config.model,
        "model.optimizer": config.optimizer,
        "data.seed": config.seed,
        "trainer.logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": logger},
        "trainer.enable_progress_bar": False,
        "trainer.enable_model_summary": False,
        "trainer.enable_checkpointing": False,
        "trainer.accelerator": "gpu" if config.gpus else "cpu",
        "trainer.devices": config.gpus or 1,
        **config.options,
    }
    for name, value in own.items():
        _set(options, name.split("."), copy.deepcopy(value))
    if config.control == "equal-step":
        others = options["trainer"]["callbacks"] or []  # after it, so that a monitor sees the controlled steps
        options["trainer"]["callbacks"] = [{"class_path": "depthcb.EqualStep"}, *others]
    return options


def _set(options: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Sets one option by its dotted name; those of a class may be named without ``init_args``."""
    first, *rest = path
    if "class_path" in options and first not in ("class_path", "init_args", "dict_kwargs"):
        _set(options, ["init_args", *path], value)
    elif rest:
        _set(options.setdefault(first, {}), rest, value)
    else:
        options[first] = value


def _figures(
    config: RunConfig, run: Run, callbacks: Sequence[pl.Callback], prints: Fingerprints, trainer: pl.Trainer
) -> Figures:
    losses, depth = run.metrics["val/loss"], run.records["depth"]
    profiles = {measure: found[-1] for measure, found in run.profiles.items()}
    distances = [c.distance for c in callbacks if isinstance(c, ObjectiveDistanceMonitor)]
    return Figures(
        pair=config.pair,
        precision=str(trainer.precision),
        slope=next(iter(profiles.values())).slope,
        profiles={measure: profile.to_dict() for measure, profile in profiles.items()},
        null={measure: [p.to_dict() for p in draws] for measure, draws in run.null.items()},
        matched_null={measure: [p.to_dict() for p in draws] for measure, draws in run.matched_null.items()},
        wanted_spread=run.wanted_ratio.spread,
        realised_spread=run.step_ratio.spread,
        lowest_rank=min(run.effective_rank),
        loss_before=losses[0][1],
        loss=losses[-1][1],
        seconds=depth.end["seconds"] if depth.end else None,
        provenance=depth.provenance,
        initial_weights=prints.initial_weights,
        data_order=prints.data_order,
        objective_distance=distances[0].overall if distances and distances[0] else None,
        objective_distance_interval=distances[0].interval if distances and distances[0] else None,
        objective_procrustes_uncorrected=distances[0].procrustes_uncorrected if distances and distances[0] else None,
        worth_correlation=run.worth.rank_correlation(next(iter(profiles.values()))).rho if run.worth else None,
        backbone=dataclasses.asdict(describe(config.model)),
        trained_parameters=sum(p.numel() for p in trainer.lightning_module.parameters() if p.requires_grad),
        peak_memory=torch.cuda.max_memory_allocated() if config.gpus else peak_memory(),
    )
