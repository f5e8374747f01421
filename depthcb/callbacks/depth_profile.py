"""Watches how far each layer's representations have moved from the pretrained model."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader, IterableDataset

from depthcb.callbacks.logged import log_pictures, logged_step, open_record, record_row
from depthcb.callbacks.step_events import damage_named, refuse_sharding
from depthcb.glossary import LOW_RANK, MEASURES
from depthcb.probe import Forward, Probe, Recording, Rows
from depthcb.profile import DERIVED, Profile, Profiles
from depthcb.reference import Reference
from depthcb.similarity import find_measures
from depthcb.stack import LayerStack, half_dtypes


class DepthProfile(Callback):
    """Measures at every validation how far each layer has moved from the pretrained model [paper].

    The reference is recorded at train start, before the first step, and travels in checkpoints: a resumed run still
    compares with the pretrained model, and so does a refit with the same object (`reset` forgets it). Watching changes
    nothing: weights, optimizer state, random streams and train/eval flags stay bit-for-bit what they were.

    ===============================  ==============================================================================
    logged key, under each measure   meaning (once per validation, in the row of ``val/...``)
    ===============================  ==============================================================================
    ``depth/cka/L00``                change of layer 0 (unit: the measure's; 0 is unchanged)
    ``depth/cka/mean``               mean change
    ``depth/cka/slope``              locality gradient: change per whole depth; ``slope_low``, ``slope_high`` bound it
    ``depth/cka/relative_slope``     slope / mean
    ``depth/cka/spearman``           rank correlation of change with depth
    ``depth/cka/centre``             centre of mass of the change, 0 input side, 1 output side
    ``depth/cka/width``              share of the layers that the change is spread over
    ``depth/heatmap``                W&B and TensorBoard: layer x validation, a panel a measure
    ``depth/curves``                 the same two: the curves of all validations, the latest with its band
    ===============================  ==============================================================================

    In the logger's folder it leaves a record that `depthcb.run.read_runs` and ``depthcb report`` read.

    Args:
        probe: What is measured on: a batch, a list of batches, a Dataset or a DataLoader; None takes items 0, 1, ...
            of the (first) validation dataset through its loader's ``collate_fn``. A `Probe` is used as it is.
        layers: The layers, as `LayerStack.find` takes them; None finds them.
        measures: Names out of `depthcb.similarity.MEASURES`; the first one is in `profiles`.
        rows: What a row is, as `Probe` takes it: ``"mean"``, ``"tokens"``, ``"last"`` or ``"first"``.
        every_n_validations: Measure at every n-th validation.
        name: First part of the logged keys; two profiles in one Trainer need two names.
        probe_rows: Most examples taken from a dataset, and most token rows.
        forward: ``(pl_module, batch) -> anything``: how the probe is fed. By default ``pl_module(...)``, or where it
            has no forward of its own the child that holds the layers.

    Raises:
        ValueError: A bad argument, at once; a probe that cannot be built or fed, a stack that cannot be found, or a
            resume without or with another reference, at train start; activations that are not finite, when measured.

    Example:
        >>> import lightning.pytorch as pl
        >>> from depthcb import DepthProfile
        >>> watch = DepthProfile(every_n_validations=2)
        >>> trainer = pl.Trainer(callbacks=[watch], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        probe: Any = None,
        layers: str | list[str] | None = None,
        measures: Sequence[str] = ("cka", "cka_normalized"),
        rows: Rows = "mean",
        every_n_validations: int = 1,
        name: str = "depth",
        probe_rows: int = 256,
        forward: Forward | None = None,
    ) -> None:
        if every_n_validations < 1:
            raise ValueError(f"every_n_validations={every_n_validations}: measure at every validation (1) or fewer.")
        self.measures = find_measures(measures)
        self.probe = probe
        self.layers = layers
        self.rows: Rows = rows
        self.every_n_validations = every_n_validations
        self.name = name
        self.probe_rows = probe_rows
        self.forward = forward
        #: Wall-clock time spent on measuring so far, in seconds.
        self.seconds = 0.0
        self.reset()

    def reset(self) -> None:
        """Forgets the reference and the profiles: the next fit records its own."""
        #: The probe as it was collected, known from train start on.
        self.fixed_probe: Probe | None = None
        #: The recorded pretrained side, known from train start on.
        self.reference: Reference | None = None
        #: All profiles so far, by measure.
        self.profiles_by_measure: dict[str, Profiles] = {m.name: Profiles() for m in self.measures}
        self._validations = 0
        self._unpublished, self._drawn = False, True

    @property
    def profiles(self) -> Profiles:
        """The first measure's profiles so far, oldest first."""
        return self.profiles_by_measure[self.measures[0].name]

    @property
    def state_key(self) -> str:
        return self._generate_state_key(name=self.name)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        refuse_sharding(self, trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        start = time.perf_counter()
        self._stack = LayerStack.find(pl_module, self.layers)
        self.fixed_probe = self._collect(trainer)
        if self.reference is not None:
            self._check_reference(self.reference, self.fixed_probe)
        elif trainer.ckpt_path is not None and trainer.global_step > 0:  # finders restore their own, from step 0
            raise ValueError(
                f"DepthProfile {self.name!r}: {trainer.ckpt_path} holds no reference of the pretrained model for it, "
                "and the resumed weights would be a wrong one: resume from a full checkpoint of a run that had this "
                "callback, or compare two checkpoints with depthcb.depth_profile."
            )
        else:
            with _muted(pl_module):
                self.reference = Reference.record(self.fixed_probe, pl_module, self._stack, self.measures)
            self._warn_low_rank(self.reference)
        self._warn_half(pl_module)
        self._open_record(trainer, pl_module, self.reference)
        self.seconds += time.perf_counter() - start

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING or self.reference is None:
            return
        self._validations += 1
        if self._validations % self.every_n_validations:
            return
        assert self.fixed_probe is not None
        start = time.perf_counter()
        with _muted(pl_module):
            recording: Recording = self.fixed_probe.record(pl_module, self._stack, self.reference.causal)
        step, epoch = logged_step(trainer), trainer.current_epoch
        for measure, profile in self.reference.profiles(recording, self.measures, step, epoch).items():
            self.profiles_by_measure[measure].append(profile)
            # Every rank computes the same figures; saying so keeps Lightning from warning about each key. Their maximum
            # is the figure itself, at half the collectives of a mean.
            shown = f"{self.name}/{measure}/slope" if measure == self.measures[0].name else None
            for key, value in _row(f"{self.name}/{measure}", profile).items():
                pl_module.log(key, value, prog_bar=key == shown, sync_dist=True, reduce_fx="max")
        self._unpublished = True
        self.seconds += time.perf_counter() - start

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._unpublished:
            return
        self._unpublished = False
        start = time.perf_counter()
        record_row(self, trainer, self._record(len(self.profiles) - 1) | {"metrics": self._other_metrics(trainer)})
        self._drawn = deserves_pictures(len(self.profiles))
        if self._drawn:
            self._log_pictures(trainer)
        self.seconds += time.perf_counter() - start

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.profiles and not self._drawn:
            self._log_pictures(trainer)
        end = {"seconds": time.perf_counter() - self._began, "probe_seconds": self.seconds}
        record_row(self, trainer, {"step": logged_step(trainer), "end": end})

    def state_dict(self) -> dict[str, Any]:
        return {
            "reference": None if self.reference is None else self.reference.state_dict(),
            "profiles": {m: [p.to_json() for p in profiles] for m, profiles in self.profiles_by_measure.items()},
            "validations": self._validations,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        with damage_named(self):
            reference = state_dict["reference"]
            self.reference = None if reference is None else Reference.from_state_dict(reference)
            for measure in self.profiles_by_measure:
                saved = state_dict["profiles"].get(measure, [])
                self.profiles_by_measure[measure] = Profiles(map(Profile.from_json, saved))
            self._validations = int(state_dict["validations"])

    def _collect(self, trainer: pl.Trainer) -> Probe:
        source = self.probe
        if source is None:
            source = _validation_loader(trainer)
        elif trainer.val_dataloaders is None:
            rank_zero_warn(f"DepthProfile {self.name!r}: this Trainer never validates, so no profile is measured.")
        return Probe.collect(source, self.probe_rows, rows=self.rows, max_tokens=self.probe_rows, forward=self.forward)

    def _open_record(self, trainer: pl.Trainer, pl_module: pl.LightningModule, reference: Reference) -> None:
        self._began, self._unpublished = time.perf_counter(), False  # whatever an earlier fit left
        settings = {
            "layers": reference.layer_names,
            "measures": {m.name: MEASURES[m.name].definition for m in self.measures},
            "rows": self.rows,
            "probe_rows": len(reference.examples),
            "probe_hash": reference.probe_hash,
            "causal": reference.causal,
            "effective_rank": reference.effective_rank,
        }
        open_record(self, "DepthProfile", trainer, pl_module, settings)
        for i in range(len(self.profiles) if trainer.global_step else 0):  # a resumed run may have another folder
            record_row(self, trainer, self._record(i))

    def _record(self, index: int) -> dict[str, Any]:
        """The index-th measurement, as the run's record holds it."""
        profiles = {m: ps[index] for m, ps in self.profiles_by_measure.items()}
        first = profiles[self.measures[0].name]
        return {"step": first.step, "epoch": first.epoch, "profiles": {m: p.to_dict() for m, p in profiles.items()}}

    def _other_metrics(self, trainer: pl.Trainer) -> dict[str, float]:
        """What was logged by others, as it stands at the end of a validation."""
        known = {key: float(value) for key, value in trainer.callback_metrics.items()}
        return {key: value for key, value in known.items() if not key.startswith(f"{self.name}/")}

    def _log_pictures(self, trainer: pl.Trainer) -> None:
        self._drawn = True
        try:
            log_pictures(self, trainer, self.profiles_by_measure, self.profiles[-1].step)
        except ModuleNotFoundError as error:
            rank_zero_warn(
                f"DepthProfile {self.name!r}: {error.name} is not installed, so loggers get scalars and no pictures: "
                "pip install 'depthcb[wandb]'."
            )

    def _check_reference(self, reference: Reference, probe: Probe) -> None:
        if reference.layer_names != self._stack.names:
            raise ValueError(
                f"DepthProfile {self.name!r}: its reference has layers {_ends(reference.layer_names)}, this model "
                f"{_ends(self._stack.names)}: use a new callback, or reset() it, for another model."
            )
        if reference.probe_hash != probe.hash:
            raise ValueError(
                f"DepthProfile {self.name!r}: its reference was recorded on another probe (or other rows): give the "
                "probe of the first run, or reset() the callback."
            )
        missing = {m.needs for m in self.measures} - set(reference.sketches)
        if missing:
            raise ValueError(
                f"DepthProfile {self.name!r}: its reference was recorded without {', '.join(sorted(missing))}: ask for "
                "the measures of the first run, or reset() the callback."
            )

    def _warn_low_rank(self, reference: Reference) -> None:
        pairs = zip(reference.layer_names, reference.effective_rank, strict=True)
        low = [f"{name} ({rank:.1f})" for name, rank in pairs if rank < LOW_RANK]
        if low and any(m.name == "cka" for m in self.measures):
            rank_zero_warn(
                f"DepthProfile {self.name!r}: plain CKA sees fewer than {LOW_RANK:g} directions (effective "
                f"rank) in {', '.join(low)}: read cka_normalized beside it."
            )

    def _warn_half(self, pl_module: pl.LightningModule) -> None:
        half = half_dtypes(p for layer in self._stack.parameters() for p in layer)
        if half:
            rank_zero_warn(
                f"DepthProfile {self.name!r}: the weights are {half}, and the probe runs in that: "
                "changes near its rounding (1e-2 relative) are noise; keep fp32 weights ('bf16-mixed') to see them."
            )


def deserves_pictures(measurements: int) -> bool:
    """Whether pictures go with this measurement: all of the first 32, then every 2nd, 4th, ... as the run doubles.

    So a run of a million validations sends 270 times two files: W&B takes some 1,000 a run.
    """
    every: int = 2 ** max(0, (measurements - 1).bit_length() - 5)
    return measurements % every == 0


@contextlib.contextmanager
def _muted(pl_module: pl.LightningModule) -> Iterator[None]:
    """Lets a forward that logs say nothing while the probe goes through it."""
    attributes: dict[str, Any] = vars(pl_module)
    before = dict(attributes)
    attributes |= {name: lambda *args, **kwargs: None for name in ("log", "log_dict")}
    try:
        yield
    finally:
        for name in ("log", "log_dict"):
            del attributes[name]
            if name in before:
                attributes[name] = before[name]


def first_validation_loader(trainer: pl.Trainer) -> Any:
    """The Trainer's validation loader, of several the first; None where it does not validate."""
    loader = trainer.val_dataloaders
    if isinstance(loader, dict):
        loader = list(loader.values())
    if isinstance(loader, (list, tuple)):
        loader = loader[0] if loader else None
    return loader


def _validation_loader(trainer: pl.Trainer) -> DataLoader[Any]:
    """The loader whose dataset gives the probe: iterating it would move the random streams of training."""
    loader = first_validation_loader(trainer)
    if loader is None:
        raise ValueError(
            "DepthProfile: no validation loader (or limit_val_batches=0) and no probe: pass probe=a batch, a dataset "
            "or a loader, and let the Trainer validate."
        )
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        raise ValueError(
            "DepthProfile: the validation data can only be iterated, which would move its random streams: pass probe=a "
            "batch or a map-style dataset."
        )
    return loader


def _row(prefix: str, profile: Profile) -> dict[str, float]:
    row: dict[str, float | None] = {f"L{i:02d}": c for i, c in enumerate(profile.change)}
    row |= {key: getattr(profile, key) for key in DERIVED}
    row["slope_low"], row["slope_high"] = profile.slope_interval or (None, None)
    return {f"{prefix}/{key}": value for key, value in row.items() if value is not None}  # NaN stops EarlyStopping


def _ends(names: Sequence[str]) -> str:
    return f"{names[0]!r} to {names[-1]!r} ({len(names)})"
