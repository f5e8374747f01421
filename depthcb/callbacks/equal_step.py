"""The equal-step control in a Trainer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import lightning.pytorch as pl
from torch.optim import Optimizer

from depthcb.callbacks.depth_profile import DepthProfile
from depthcb.callbacks.logging import LogSteps, callbacks_of, logged_step, rows_of
from depthcb.callbacks.recorded import RecordedCallback, open_record
from depthcb.callbacks.step_events import OptimizerStepCallback
from depthcb.callbacks.unit_pictures import UnitPictures
from depthcb.engine.equalizer import Decay, Outside, StepEqualizer
from depthcb.plain import SECRETS
from depthcb.signposts import is_a
from depthcb.step_ratio import MeanRatios, Target
from depthcb.units import Groups, UnitKind, unit_settings


class EqualStep(RecordedCallback, OptimizerStepCallback):
    r"""Rescales every optimizer step so that ||dW|| / ||W|| is equal in all layers [paper].

    After each real step, every layer with a non-zero update becomes ``before + (r* / r) (after - before)``: the step
    keeps its direction and gets the target size. Layers without an update (frozen, no gradient, a skipped step) are
    left unchanged and don't count towards r*; layers that no optimizer owns yet are waited for. Optimizer state is not
    modified. A non-finite update is not applied, and
    the next log step raises an error that names its layer. Memory: one copy of the controlled parameters.

    Equal steps are equal paths, not equal net changes: where steps point the same way a layer gets further than where
    they turn (spread of the paths 1.000, of the net changes 1.35 after 200 steps in one run). Weight decay is a part of
    the step unless ``decay="outside"``: a layer without a gradient is then moved by its decay alone, amplified to the
    size of the others' steps. A tensor that several layers share counts for the first of them.

    ================================  =================================================================================
    logged key                        meaning (every ``log_every_n_steps``, or at the next step of the layers'
                                      optimizer; layers without an update are left out)
    ================================  =================================================================================
    ``equal_step/ratio/L00``          step ratio r that the optimizer wanted
    ``equal_step/scale/L00``          r* / r, the factor on the layer's step
    ``equal_step/realised/L00``       step ratio measured after rescaling, rounding included
    ``equal_step/matrix_spread/L00``  max / min of the step ratio over the matrices of layer 0, which get one factor
    ``equal_step/target``             mean of the imposed ratios r*
    ``equal_step/spread``             max r / min r: what the control had to remove (1: nothing)
    ``equal_step/net_spread``         max / min of the layers' net changes since pretraining, at each validation where
                                      a `DepthProfile` keeps the pretrained weights (``pretrained="cpu"``)
    ================================  =================================================================================

    With ``unit="group"`` or ``"matrix"``, the keys end in ``L00/attention`` or ``L00/mlp.c_fc.weight`` instead of
    ``L00``, and what is said of layers holds for these units. Loggers with pictures (W&B, TensorBoard, MLflow, Comet)
    get a heatmap of the ratios at each validation instead of these columns, ``<name>/units``; the record has all.

    Args:
        layers: The layers, as accepted by `LayerStack.find`; None searches for them.
        target: r*: ``"mean"`` (default), ``"median"``, ``"min"`` or ``"geometric_mean"`` of the layers' ratios; a
            float; one weight per layer, which imposes that depth profile of step sizes at the mean ratio; or a
            callable ``(ratios, step) -> ratios`` on (L,) tensors.
        outside: ``"leave"`` ignores parameters outside the stack; ``"layer"`` treats each module that owns some as an
            additional layer [ours].
        name: Prefix of the logged keys; must be unique if a Trainer has several controls (for an encoder and a
            decoder).
        decay: ``"inside"`` (default) counts weight decay as a part of the step, with a warning if it makes up most of
            it; ``"outside"`` equalizes dW + lr * weight_decay * W and leaves the decay as it is, for optimizers of
            torch with decoupled decay (AdamW, Muon) [ours].
        offload: Whether to keep the copy of the controlled parameters in main memory, pinned, instead of on the GPU,
            which makes steps slower: each moves the parameters to main memory once and back twice.
        redact: Hyperparameters whose values are kept out of the record, see `DepthProfile`.
        unit: What gets equal steps: ``"layer"`` (default) [paper]; ``"matrix"``, each tensor of two or more dimensions,
            with all vectors of a layer as one more unit; or ``"group"``, attention, MLP and norms in each layer (a
            mixer and norms in Mamba, which has no attention), found by structure [ours].
        groups: Groups named by globs over the names of a layer's parameters, such as ``{"experts": "*.experts.*"}``,
            for ``unit="group"``; what none of them matches is found by structure.

    Raises:
        ValueError: At fit start, the target cannot be imposed, the layers cannot be found, all are frozen, or one has
            only zeros or makes its weights from adapters or a parametrization; after the first batch, the weights
            changed without a step of an optimizer; at the next log step, a layer's update was not finite.

    Example:
        >>> import lightning.pytorch as pl
        >>> from depthcb import EqualStep
        >>> trainer = pl.Trainer(callbacks=[EqualStep()], logger=False, enable_checkpointing=False)
    """

    control = "equal-step"

    def __init__(
        self,
        layers: list[str] | str | None = None,
        target: Target = "mean",
        outside: Outside = "leave",
        name: str = "equal_step",
        decay: Decay = "inside",
        offload: bool = False,
        redact: Collection[str] = SECRETS,
        unit: UnitKind = "layer",
        groups: Groups | None = None,
    ) -> None:
        self.name, self.redact = name, redact
        #: The underlying equalizer, which works without a Trainer.
        self.equalizer = StepEqualizer(
            layers, target, outside, name, decay=decay, offload=offload, unit=unit, groups=groups
        )
        self._seen: list[float] | None = None
        self._pictures: UnitPictures | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the controlled layers or other units, available from fit start."""
        return self.equalizer.names

    @property
    def mean_wanted(self) -> MeanRatios:
        """Mean ratio of each layer over the logged steps, as the optimizer wanted it."""
        return self.equalizer.mean_wanted

    @property
    def mean_realised(self) -> MeanRatios:
        """Mean ratio of each layer over the logged steps, as realised by the control."""
        return self.equalizer.mean_realised

    @property
    def steering(self) -> Mapping[str, Any]:
        """The layers, units, target and treatment of other parameters and of weight decay."""
        control = self.equalizer
        return {
            "layers": control.layer_names,
            "target": control.target,
            "outside": control.outside,
            "decay": control.decay,
            **unit_settings(control.unit, control.groups),
        }

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not later: after a forward, FSDP exposes gathered parameters instead of the shards that the optimizer owns.
        self._prepare(trainer, pl_module)

    def _prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        unfreezes = any(is_a(callback, "BaseFinetuning") for callback in callbacks_of(trainer))
        self.equalizer.prepare(pl_module, trainer.optimizers, unfreezes)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == 0 or len(self.mean_wanted.sums) != len(self.names):  # not resumed, or a new model
            self.equalizer.reset()
        self._pictures = UnitPictures(self, trainer, f"{self.name}/ratio/")
        self.equalizer.log = self._pictures.log
        self._logs = LogSteps(trainer)
        open_record(self, trainer, pl_module, self.steering)
        super().on_train_start(trainer, pl_module)

    def on_new_optimizers(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.equalizer.log_waiting()
        self._prepare(trainer, pl_module)
        self._logs = LogSteps(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if logged_step(trainer) == self._logs.start:
            self.equalizer.note_weights()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        batches = logged_step(trainer)
        if batches == self._logs.start + 1:
            self.equalizer.check_first_step()
        if self._logs.due(batches) and batches % self._logs.every == 0:  # and no step was logged in this batch
            self.equalizer.check_weights()

    def on_before_optimizer_closure(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        self.equalizer.before_step(optimizer)

    def on_after_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        batches = logged_step(trainer) + 1
        due = self._logs.due(batches)
        if self.equalizer.equalize(optimizer, logged_step(trainer), due) and due:
            self._logs.note(batches)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.equalizer.log_waiting()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._pictures is not None:
            self._pictures.draw()
        known = (c.recorder.net_change for c in callbacks_of(trainer) if isinstance(c, DepthProfile))
        net = next((changes for changes in known if changes is not None), None)
        if net is None or net is self._seen:  # not measured at this validation
            return
        self._seen = net
        moved = [change for change in net if change > 0]
        if moved:
            rows_of(self, trainer)({f"{self.name}/net_spread": max(moved) / min(moved)}, logged_step(trainer))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.equalizer.log_waiting()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.equalizer.finish()
        if self._pictures is not None:
            self._pictures.draw(end=True)

    def state_dict(self) -> dict[str, Any]:
        return self.equalizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.equalizer.load_state_dict(state_dict)
