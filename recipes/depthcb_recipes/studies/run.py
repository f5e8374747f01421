"""Makes one run of a study: a fit, its null, and what the study's table needs of them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.distributed.tensor import DTensor

from depthcb import DepthProfile
from depthcb.errors import NotFiniteError, chain
from depthcb.null import null_profiles
from depthcb.run import Run, read_runs, write_null
from depthcb_recipes.backbones.catalogue import CONFIGS, describe
from depthcb_recipes.backbones.loading import BackboneNotFoundError
from depthcb_recipes.fit import fit_cli
from depthcb_recipes.objectives.distance_monitor import ObjectiveDistanceMonitor
from depthcb_recipes.precision import Precision
from depthcb_recipes.publish import published, remove_left_over
from depthcb_recipes.studies.grid import RunConfig
from depthcb_recipes.studies.store import Store, full_disk


def make(config: RunConfig, folder: Path) -> dict[str, Any]:
    """The result of a fit, or what kept it from one; that is recorded, never taken for a result.

    Raises:
        Exception: The disk is full, which is no fault of this run's.
    """
    torch.set_num_threads(config.threads)
    try:
        return {"status": "finished", "config": config.to_dict(), **fit(config, folder)}
    except Exception as error:
        if full_disk(error):
            raise
        traceback.print_exc()
        return {"status": failure(error), "config": config.to_dict(), "message": " ".join(str(error).split())}


def failure(error: BaseException) -> str:
    """What kept a run from its figures, by the error that ended it or one that led to it.

    Example:
        >>> failure(MemoryError()), failure(KeyError())
        ('out of memory', 'failed')
    """
    for e in chain(error):
        if isinstance(e, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(e):
            return "out of memory"
        if isinstance(e, NotFiniteError):
            return "not finite"
        if isinstance(e, BackboneNotFoundError):
            return "missing model"
    return "failed"


class Fingerprints(pl.Callback):
    """Hashes of the weights that a fit started from and of the batches that it saw; stops at a loss that is not finite.

    Each batch's hash goes on from that of the batches before it, so that a resumed fit ends with the same one.

    Raises:
        NotFiniteError: After the batch whose loss it was.
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
        if not trainer.strategy.reduce_boolean_decision(finite):  # on one process, all stop: none waits for it
            raise NotFiniteError(f"the loss was {float(loss)} at step {trainer.global_step}: lower the learning rate")


class Resumable(pl.Callback):
    """Keeps one checkpoint, of the last validation, with the state of the random streams: what dropout goes on from.

    Args:
        path: The checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._streams: dict[str, Any] = {}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking and trainer.global_step != trainer.max_steps:  # from the end nothing goes on
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


class Null(pl.Callback):
    """At the end of a fit, measures noise of the size of its net change, tensor by tensor.

    Args:
        folder: The run's folder: the null is written beside its record.
        watch: What measured the fit's own profiles.
        seeds: Draws of noise.
    """

    def __init__(self, folder: Path, watch: DepthProfile, seeds: int) -> None:
        self.folder, self.watch, self.seeds = folder, watch, seeds

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        watch = self.watch
        assert watch.reference is not None
        assert watch.fixed_probe is not None
        # Loaded again, so that the fit is not made beside a second copy.
        pretrained = type(pl_module)(**{k: v for k, v in pl_module.hparams.items() if not k.startswith("_")})
        pretrained._device_mesh = pl_module.device_mesh
        pretrained.configure_model()
        pretrained.to(pl_module.device)
        seeds = range(self.seeds)
        draws = null_profiles(pretrained, pl_module, watch.fixed_probe, watch.reference, watch.measures, seeds=seeds)
        if trainer.is_global_zero:
            write_null(self.folder, draws)


def fit(config: RunConfig, folder: Path) -> dict[str, Any]:
    """Does a run's fit and its null; returns their results."""
    cli = fit_cli(arguments(config, folder), run=False, exit_on_error=False)
    trainer, module = cli.trainer, cli.model
    cli.precision_record.choice = precision_of(config, folder) or cli.precision
    prints = Fingerprints()
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # its callback connector sets it
    watch = next(c for c in callbacks if isinstance(c, DepthProfile))
    callbacks += [prints, Null(folder, watch, config.null_seeds)]
    checkpoint = folder / "last.ckpt"
    if config.resumes:
        if trainer.world_size > 1:
            raise ValueError(
                f"data.stateful is not supported on {trainer.world_size} processes, since the random streams of one "
                "are kept: leave it out, and a killed run starts from scratch."
            )
        remove_left_over(checkpoint)
        callbacks.append(Resumable(checkpoint))
    trainer.fit(module, cli.datamodule, ckpt_path=checkpoint if checkpoint.is_file() else None)
    checkpoint.unlink(missing_ok=True)
    if not trainer.is_global_zero:
        return {}  # the first process returns the results
    (run,) = read_runs(folder)
    made = {"pair": config.pair, "precision": str(trainer.precision)}
    return made | summary(run) | facts(config, callbacks, prints)


def precision_of(config: RunConfig, folder: Path) -> Precision | None:
    """The precision that the run's study has settled, with its reason; None where the run names one itself."""
    kept = Store(folder.parents[1]).precision(config.device)
    return Precision(**kept) if kept and kept["precision"] == config.precision else None


def arguments(config: RunConfig, folder: Path) -> list[str]:
    """The command line of ``depthcb fit`` that makes the run."""
    control = ["--trainer.callbacks+=depthcb.EqualStep"] if config.control == "equal-step" else []
    return [
        f"--config={CONFIGS / config.objective}.yaml",
        f"--seed_everything={config.seed}",
        f"--model.backbone={config.model}",
        f"--model.optimizer={config.optimizer}",
        f"--data.seed={config.seed}",
        f"--trainer.logger.init_args.save_dir={folder}",
        "--trainer.logger.init_args.name=",
        "--trainer.logger.init_args.version=",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--trainer.enable_checkpointing=false",
        f"--trainer.accelerator={'gpu' if config.gpus else 'cpu'}",
        f"--trainer.devices={config.gpus or 1}",
        *(f"--{name}={v if isinstance(v, str) else json.dumps(v)}" for name, v in config.options.items()),
        *control,
    ]


def summary(run: Run) -> dict[str, Any]:
    """What the study's table needs of a run's record."""
    losses = run.metrics["val/loss"]
    profiles = {measure: found[-1] for measure, found in run.profiles.items()}
    return {
        "slope": next(iter(profiles.values())).slope,
        "profiles": {measure: profile.to_dict() for measure, profile in profiles.items()},
        "null": {measure: [p.to_dict() for p in draws] for measure, draws in run.null.items()},
        "wanted_spread": run.wanted_ratio.spread,
        "realised_spread": run.step_ratio.spread,
        "lowest_rank": min(run.effective_rank),
        "loss_before": losses[0][1],
        "loss": losses[-1][1],
        "seconds": run.records["depth"].end["seconds"] if run.records["depth"].end else None,
        "provenance": run.records["depth"].provenance,
    }


def facts(config: RunConfig, callbacks: list[pl.Callback], prints: Fingerprints) -> dict[str, Any]:
    """What the run started from, and what its backbone is."""
    distances = [c.distance for c in callbacks if isinstance(c, ObjectiveDistanceMonitor)]
    return {
        "initial_weights": prints.initial_weights,
        "data_order": prints.data_order,
        "objective_distance": distances[0].overall if distances and distances[0] else None,
        "backbone": dataclasses.asdict(describe(config.model)),
    }
