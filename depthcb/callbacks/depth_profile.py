"""Measures in a Trainer how far each layer's representations have moved from the pretrained model."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.utils.data import DataLoader

from depthcb.callbacks.logging import (
    callbacks_of,
    deserves_pictures,
    log_pictures,
    logged_step,
    record_row,
    write_record,
)
from depthcb.callbacks.recorded import RecordedCallback, open_record
from depthcb.callbacks.step_events import refuse_sharding
from depthcb.callbacks.validation_loss import validation_loss
from depthcb.engine.profile_recorder import ProfileRecorder
from depthcb.engine.step_hooks import checkpoint_errors
from depthcb.feeding import Call, validation_call
from depthcb.isolation import isolated
from depthcb.null import DRAWS
from depthcb.plain import SECRETS
from depthcb.pretrained import PretrainedWeights
from depthcb.probe import Forward, Mask, Probe, Rows
from depthcb.profile import Profiles
from depthcb.recording import past_rows, profile_settings
from depthcb.reference import Reference
from depthcb.restore import FEWEST_BATCHES, restore_profile
from depthcb.run import profile_row, write_null
from depthcb.similarity import Measure
from depthcb.site_names import BLOCK, Site
from depthcb.stack import LayerStack
from depthcb.warn import warn
from depthcb.worth import RestoreProfile


class DepthProfile(RecordedCallback):
    """Measures at every validation how far each layer has moved from the pretrained model [paper].

    The reference is recorded at train start, before the first step, and saved in checkpoints: a resumed run still
    compares with the pretrained model, and so does another fit with the same object (`reset` clears it). Measuring has
    no side effects: weights, optimizer state, random states and train/eval flags stay bit-for-bit the same.

    ===============================  ==============================================================================
    logged key, for each measure     meaning (once per validation, in the row of ``val/...``)
    ===============================  ==============================================================================
    ``depth/cka/L00``                change of layer 0 (unit: the measure's; 0 is unchanged)
    ``depth/cka/mean``               mean change
    ``depth/cka/slope``              locality gradient: change per whole depth; bounds in ``slope_low``, ``slope_high``
    ``depth/cka/relative_slope``     slope / mean
    ``depth/cka/spearman``           rank correlation of change with depth
    ``depth/cka/centre``             centre of mass of the change, 0 input side, 1 output side
    ``depth/cka/width``              fraction of the layers that the change is spread over
    ``depth/attention/cka/L00`` ...  all of these for what attention writes to the residual stream, with ``sites``
    ``depth/mlp/cka/L00`` ...        and for what the MLP writes
    ``depth/net_change/L00``         ||W - W0|| / ||W0|| of layer 0 since pretraining, if ``pretrained`` is set
    ``depth/heatmap``                plot, where the logger has a sink: layer x validation, one panel per measure
    ``depth/curves``                 plot, likewise: the curves of all validations, the latest with its band
    ``depth/sites``                  plot, likewise, with ``sites``: their latest curves by the first measure, and a
                                     heatmap of layer x head
    ===============================  ==============================================================================

    A record in the logger's folder can be read by `depthcb.run.read_runs` and ``depthcb report``.

    Args:
        probe: Inputs to measure on: a batch, a list of batches, a Dataset or a DataLoader; None draws a seeded random
            sample of the (first) validation dataset, collated by its loader's ``collate_fn``. A `Probe` is used as is.
        layers: The layers, as accepted by `LayerStack.find`; None searches for them.
        measures: Names from `depthcb.similarity.MEASURES`, or custom `depthcb.similarity.Measure` objects; `profiles`
            holds those of the first one.
        rows: How rows are formed: ``"mean"``, ``"tokens"``, ``"last"`` or ``"first"``; see `Probe`.
        every_n_validations: Measure at every n-th validation.
        name: Prefix of the logged keys; must be unique if a Trainer has several profiles.
        probe_rows: Maximum number of examples taken from a dataset, and of token rows.
        forward: ``(pl_module, batch) -> anything``: how to run the module on a probe batch. By default as its
            ``validation_step`` does, where that can be told; else ``pl_module(...)``, or the child that holds the
            layers if the module does not define ``forward``. Batches go through the batch transfer hooks of the module
            and the data module in any case.
        causal: Whether later positions depend on earlier ones only; None finds it. See `Probe`.
        axes: The dimensions of the layers' outputs, such as ``"TBD"``; None finds them. See `Probe`.
        mask: ``batch -> (examples, positions) tensor`` that is 0 at padding, or False; None finds it. See `Probe`.
        pretrained: ``"cpu"`` keeps a copy of the pretrained weights in main memory (all parameters and buffers once),
            taken before any checkpoint is loaded. The null profiles are then measured at the end of the fit, which
            takes about 2 x ``null_draws`` + 7 passes over the probe and one more copy of the weights for that time, and
            each layer's net change at every validation. `depthcb.pretrained.PretrainedWeights` of the same model are
            used as they are.
        null_draws: Draws of noise for each of the two nulls, see `depthcb.null.null_profiles`.
        sites: Where to measure: ``("block", "attention", "mlp")`` adds what attention and the MLP of each layer write
            to the residual stream, which tells where in a block its change arises [ours]. In a parallel block both
            write at once. ``"head"`` adds each head of attention, by its part of the output projection's input; heads
            are in the record and in pictures, not among the logged keys. Memory: one more n x n matrix per layer and
            site, or head. The modules are found by measuring one forward; the nulls are those of the blocks.
        worth: Whether to measure at the end of the fit what each layer's change is worth, by `depthcb.restore_profile`
            with the loss that ``validation_step`` returns on the probe's batches. Needs ``pretrained`` and at least 2
            batches; takes 4 L + 1 passes over the probe.
        redact: Hyperparameters and settings with these words in their names have their values replaced in the record
            (and so in reports) and in W&B's configuration, as far as depthcb writes it; see `depthcb.plain.plain`. An
            empty tuple keeps everything.

    Raises:
        ValueError: At construction, an argument is invalid; at train start, the probe cannot be built or run, the
            layers cannot be found, or the reference is missing or does not match on resume; when measuring,
            activations are not finite.

    Example:
        >>> import lightning.pytorch as pl
        >>> from depthcb import DepthProfile
        >>> watch = DepthProfile(every_n_validations=2)
        >>> trainer = pl.Trainer(callbacks=[watch], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        probe: Any = None,
        layers: list[str] | str | None = None,
        measures: Sequence[str | Measure] = ("cka", "cka_normalized"),
        rows: Rows = "mean",
        every_n_validations: int = 1,
        name: str = "depth",
        probe_rows: int = 256,
        forward: Forward | None = None,
        causal: bool | None = None,
        axes: str | None = None,
        mask: Mask | None = None,
        pretrained: PretrainedWeights | Literal["cpu"] | None = None,
        null_draws: int = DRAWS,
        sites: Sequence[Site] = (BLOCK,),
        worth: bool = False,
        redact: Collection[str] = SECRETS,
    ) -> None:
        if every_n_validations < 1:
            raise ValueError(f"every_n_validations={every_n_validations}: it must be at least 1.")
        if worth and pretrained is None:
            raise ValueError("DepthProfile(worth=True) needs the pretrained weights: pass pretrained='cpu' too.")
        self._worth = worth
        self.name, self.redact = name, redact
        self.every_n_validations = every_n_validations
        #: The underlying recorder, which works without a Trainer.
        self.recorder = ProfileRecorder(
            probe,
            layers,
            measures,
            rows,
            name,
            probe_rows,
            forward,
            causal,
            axes,
            mask,
            pretrained=pretrained,
            null_draws=null_draws,
            sites=sites,
        )
        self._loading: Any = None
        self.reset()

    def reset(self) -> None:
        """Clears the reference and the profiles: the next fit records a new reference."""
        self.recorder.reset()
        self._validations = 0
        self._unpublished, self._drawn = False, True
        #: What each layer's change was worth at the end of the last fit, if ``worth`` is set.
        self.worth: RestoreProfile | None = None

    @property
    def measures(self) -> list[Measure]:
        """The measures of change."""
        return self.recorder.measures

    @property
    def seconds(self) -> float:
        """Wall-clock time spent on measuring so far."""
        return self.recorder.seconds

    @property
    def fixed_probe(self) -> Probe | None:
        """The collected probe, available from train start."""
        return self.recorder.fixed_probe

    @property
    def reference(self) -> Reference | None:
        """The recorded pretrained model, available from train start; if set, the next fit compares with it."""
        return self.recorder.reference

    @reference.setter
    def reference(self, reference: Reference | None) -> None:
        self.recorder.reference = reference

    @property
    def profiles(self) -> Profiles:
        """The first measure's profiles so far, oldest first."""
        return self.recorder.profiles

    @property
    def profiles_by_measure(self) -> dict[str, Profiles]:
        """All profiles so far, by measure."""
        return self.recorder.profiles_by_measure

    def deserves_pictures(self, measurements: int) -> bool:
        """Returns whether to log plots with this measurement: the first 32, then every 2nd, 4th, ... as runs double.

        A run of a million validations thus uploads two files 270 times; W&B accepts about 1,000 per run. Override this
        method for a different schedule; the last measurement of a fit is always plotted.

        Args:
            measurements: Number of measurements so far, including this one.
        """
        return deserves_pictures(measurements)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        refuse_sharding(self, trainer)
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.recorder.pretrained is not None and self._loading is None:
            hook = pl_module.register_load_state_dict_pre_hook  # a checkpoint is loaded after this and before the fit
            self._loading = hook(lambda module, *_: self.recorder.take_weights(module))  # type: ignore[no-untyped-call]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._loading is not None:
            self._loading.remove()
            self._loading = None
        self.recorder.take_weights(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._began, self._unpublished = time.perf_counter(), False  # an earlier fit may have left it True
        self._check_resumed_reference(trainer)
        source = None
        if self.recorder.probe is None:
            source = _validation_loader(trainer)
        elif trainer.val_dataloaders is None:
            warn(f"DepthProfile {self.name!r}: this Trainer never validates, so no profile is measured.")
        self.recorder.transfer = functools.partial(_transferred, trainer, pl_module)
        self.recorder.feed = _fed
        with _probing(trainer, pl_module):
            self.recorder.prepare(pl_module, source=source)
            if self._worth:
                self._check_worth(pl_module)
        self._open_record(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING or self.reference is None:
            return
        self._validations += 1
        if self._validations % self.every_n_validations:
            return
        with _probing(trainer, pl_module):
            profiles = self.recorder.measure(logged_step(trainer), trainer.current_epoch)
        shown = f"{self.name}/{self.measures[0].name}/slope"
        for key, value in self.recorder.row(profiles).items():
            # Every rank computes the same values, so sync_dist only avoids Lightning's warning for each key; a maximum
            # leaves them unchanged and needs half the collectives of a mean.
            pl_module.log(key, value, prog_bar=key == shown, sync_dist=True, reduce_fx="max")
        self._unpublished = True

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._unpublished:
            return
        self._unpublished = False
        start = time.perf_counter()
        latest = {measure: profiles[-1] for measure, profiles in self.profiles_by_measure.items()}
        record_row(self, trainer, profile_row(latest, self.recorder.latest_sites) | self._beside(trainer))
        self._drawn = self.deserves_pictures(len(self.profiles))
        if self._drawn:
            self._log_pictures(trainer)
        self.recorder.seconds += time.perf_counter() - start

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.profiles and not self._drawn:
            self._log_pictures(trainer)
        with _probing(trainer, pl_module):
            null = self.recorder.measure_null()
            worth = self._measure_worth(pl_module) if self._worth else None
        if null is not None:
            write_record(self, trainer, lambda folder: write_null(folder, null, self.name))
        end: dict[str, Any] = {"seconds": time.perf_counter() - self._began, "probe_seconds": self.seconds}
        if worth is not None:
            self.worth = worth
            end["worth"] = worth.to_dict()
        if self.lost:
            end["lost"] = dict(self.lost)
        record_row(self, trainer, {"step": logged_step(trainer), "end": end})

    def _check_worth(self, pl_module: pl.LightningModule) -> None:
        """Raises a ValueError if the module's validation step gives no loss on the probe."""
        probe = self._worth_probe()
        with isolated(pl_module):
            validation_loss(self._transfer)(pl_module, probe.batches[0])

    def _measure_worth(self, pl_module: pl.LightningModule) -> RestoreProfile:
        weights = self.recorder.weights
        assert weights is not None
        batches = self._worth_probe().batches
        return restore_profile(
            weights, pl_module, batches, validation_loss(self._transfer), layers=self.recorder.layers
        )

    def _worth_probe(self) -> Probe:
        probe = self.fixed_probe
        assert probe is not None
        if len(probe.batches) < FEWEST_BATCHES:
            raise ValueError(
                f"DepthProfile(worth=True): the probe has {len(probe.batches)} batch, and an interval needs at least "
                f"{FEWEST_BATCHES}: pass a list of batches, or a loader with a smaller batch size."
            )
        return probe

    def _transfer(self, batch: Any) -> Any:
        assert self.recorder.transfer is not None
        return self.recorder.transfer(batch)

    def state_dict(self) -> dict[str, Any]:
        return {**self.recorder.state_dict(), "validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.recorder.load_state_dict(state_dict)
        with checkpoint_errors(f"DepthProfile {self.name!r}"):
            self._validations = int(state_dict["validations"])

    def _check_resumed_reference(self, trainer: pl.Trainer) -> None:
        if self.reference is None and trainer.ckpt_path is not None and trainer.global_step > 0:
            # Lightning's tuners restore their own checkpoint, at step 0.
            raise ValueError(
                f"DepthProfile {self.name!r}: {trainer.ckpt_path} contains no reference for this callback, and the "
                "resumed weights are not the pretrained ones: resume from a full checkpoint of a run with this "
                "callback, or compare two checkpoints with depthcb.depth_profile."
            )

    def _open_record(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        open_record(self, trainer, pl_module, profile_settings(self.recorder))
        for row in past_rows(self.recorder) if trainer.global_step else ():  # a resumed run may use another folder
            record_row(self, trainer, row)

    def _beside(self, trainer: pl.Trainer) -> dict[str, Any]:
        """Returns what a record's row has besides the profiles: net changes, and the metrics logged by others."""
        known = {key: float(value) for key, value in trainer.callback_metrics.items()}
        metrics = {key: value for key, value in known.items() if not key.startswith(f"{self.name}/")}
        return {"metrics": metrics} | ({"net_change": self.recorder.net_change} if self.recorder.net_change else {})

    def _log_pictures(self, trainer: pl.Trainer) -> None:
        self._drawn = True
        first = self.measures[0].name
        sites = {site: latest[first] for site, latest in self.recorder.latest_sites.items()}
        log_pictures(self, trainer, self.profiles_by_measure, self.profiles[-1].step, sites)


@contextlib.contextmanager
def _probing(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[None]:
    """Lets hooks and steps of the module run with the probe at any time: as in validation, but logging nothing."""
    attributes: dict[str, Any] = vars(pl_module)
    before, stage = dict(attributes), trainer.state.stage
    attributes |= {name: lambda *args, **kwargs: None for name in ("log", "log_dict")}
    trainer.state.stage = RunningStage.VALIDATING
    try:
        yield
    finally:
        trainer.state.stage = stage
        for name in ("log", "log_dict"):
            del attributes[name]
            if name in before:
                attributes[name] = before[name]


def _transferred(trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> Any:
    """Returns a batch as a validation step gets it: converted, moved, and through the user's batch hooks."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _fed(module: nn.Module, stack: LayerStack, batch: Any) -> Call | None:
    """Returns the call of the model in the module's validation step, if it has one of its own."""
    if not is_overridden("validation_step", module, parent=pl.LightningModule):
        return None
    return validation_call(module, stack, batch)


def pretrained_of(trainer: pl.Trainer, pl_module: pl.LightningModule) -> PretrainedWeights | None:
    """Returns the pretrained weights that a `DepthProfile` of the Trainer keeps, from fit start; None if none does."""
    for callback in callbacks_of(trainer):
        if isinstance(callback, DepthProfile) and callback.recorder.pretrained is not None:
            callback.recorder.take_weights(pl_module)
            return callback.recorder.weights
    return None


def first_validation_loader(trainer: pl.Trainer) -> Any:
    """Returns the Trainer's (first) validation loader; None if it does not validate."""
    loader = trainer.val_dataloaders
    if isinstance(loader, dict):
        loader = list(loader.values())
    if isinstance(loader, (list, tuple)):
        loader = loader[0] if loader else None
    return loader


def _validation_loader(trainer: pl.Trainer) -> DataLoader[Any]:
    """Returns the validation loader whose dataset provides the probe."""
    loader = first_validation_loader(trainer)
    if loader is None:
        raise ValueError(
            "DepthProfile: no validation loader (or limit_val_batches=0) and no probe: pass probe= with a batch, a "
            "dataset or a loader, and let the Trainer validate."
        )
    if not isinstance(loader, DataLoader):
        raise ValueError(
            f"DepthProfile: the validation data is a {type(loader).__name__}, and iterating it would advance its "
            "random state: pass probe= with a batch, a dataset or a DataLoader."
        )
    return loader
