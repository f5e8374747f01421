"""Monitors ||dW|| / ||W|| per layer in a Trainer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import lightning.pytorch as pl
from torch.optim import Optimizer

from depthcb.callbacks.depth_profile import pretrained_of
from depthcb.callbacks.logging import LogSteps, logged_step
from depthcb.callbacks.recorded import RecordedCallback, open_record
from depthcb.callbacks.step_events import OptimizerStepCallback
from depthcb.callbacks.unit_pictures import UnitPictures
from depthcb.engine.step_ratio_meter import StepRatioMeter
from depthcb.plain import SECRETS
from depthcb.step_extras import Extra
from depthcb.step_ratio import MeanRatios
from depthcb.units import Groups, UnitKind, unit_settings


class UpdateRatioMonitor(RecordedCallback, OptimizerStepCallback):
    """Logs each layer's step ratio ||dW|| / ||W|| [paper], after the optimizer and all earlier callbacks.

    A layer with adapters is measured by its merged weights, W0 + BA for LoRA, and one with parametrizations (weight or
    spectral norm) by the weights that they make [ours]. Placed after `EqualStep` in the
    Trainer's list of callbacks it sees the controlled step, placed before it the optimizer's own step. It does nothing
    between log steps. Memory: one copy of the layers' parameters from the first log step on.

    ==================================  ==============================================================================
    logged key                          meaning (every ``log_every_n_steps``, or at the next step of the layers'
                                        optimizer; layers without an update are left out)
    ==================================  ==============================================================================
    ``update_ratio/L00``                realised step ratio of layer 0 (fraction of the layer's norm)
    ``update_ratio/spread``             max / min over the layers
    ``update_ratio/matrix_spread/L00``  max / min over the matrices of layer 0
    ``update_ratio/grad_norm/L00``      norm of the layer's gradient g, as the optimizer got it
    ``update_ratio/cos_gradient/L00``   cosine of the step and -g: 1 for plain SGD
    ``update_ratio/cos_weight/L00``     cosine of the step and -W: 1 if it only shrinks the weights, as decay does
    ``update_ratio/unchanged/L00``      share of the layer's numbers that the step left as they were: rounded away in
                                        bf16 or fp16 weights, or without a gradient
    ``update_ratio/net_change/L00``     ||W - W0|| / ||W0|| since pretraining, after the step; needs a `DepthProfile`
                                        that keeps the pretrained weights (``pretrained="cpu"``)
    ==================================  ==============================================================================

    The last five are logged if ``extras`` names them.
    With ``unit="group"`` or ``"matrix"``, the keys end in ``L00/attention`` or ``L00/mlp.c_fc.weight`` instead of
    ``L00``, and what is said of layers holds for these units. Loggers with pictures (W&B, TensorBoard, MLflow, Comet)
    get a heatmap of the ratios at each validation instead of these columns, ``<name>/units``; the record has all.

    Args:
        layers: The layers, as accepted by `LayerStack.find`; None searches for them.
        name: Prefix of the logged keys; must be unique if a Trainer has several monitors.
        redact: Hyperparameters whose values are kept out of the record, see `DepthProfile`.
        unit: What is measured: ``"layer"`` (default); ``"matrix"``, each tensor of two or more dimensions, with all
            vectors of a layer as one more unit; or ``"group"``, attention, MLP and norms in each layer (a mixer and
            norms in Mamba, which has no attention), found by structure [ours].
        groups: Groups named by globs over the names of a layer's parameters, such as ``{"experts": "*.experts.*"}``,
            for ``unit="group"``; what none of them matches is found by structure.
        extras: Which of ``"grad_norm"``, ``"cos_gradient"``, ``"cos_weight"``, ``"unchanged"`` and ``"net_change"`` to
            log; none by default, because at a logged step they need one more pass over the weights, in pieces
            [all ours]. Gradients are those that the step has left: unscaled and clipped, of LBFGS those of its last
            evaluation.

    Raises:
        ValueError: An extra or the unit is unknown; at fit start, the layers cannot be found, the groups in them can't
            be told apart, or an extra cannot be measured.

    Example:
        >>> import lightning.pytorch as pl
        >>> from depthcb import UpdateRatioMonitor
        >>> trainer = pl.Trainer(callbacks=[UpdateRatioMonitor()], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        layers: list[str] | str | None = None,
        name: str = "update_ratio",
        redact: Collection[str] = SECRETS,
        unit: UnitKind = "layer",
        groups: Groups | None = None,
        extras: Sequence[Extra] = (),
    ) -> None:
        self.name, self.redact = name, redact
        #: The underlying meter, which works without a Trainer.
        self.meter = StepRatioMeter(layers, name, unit=unit, groups=groups, extras=extras)
        self._pictures: UnitPictures | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the monitored layers or other units, available from fit start."""
        return self.meter.names

    @property
    def mean(self) -> MeanRatios:
        """Mean ratio of each layer or other unit over the logged steps."""
        return self.meter.mean

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not later: after a forward, FSDP exposes gathered parameters instead of the shards that the optimizer owns.
        if "net_change" in self.meter.extras:
            self.meter.pretrained = pretrained_of(trainer, pl_module)
        self.meter.prepare(pl_module, trainer.optimizers)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == 0 or len(self.mean.sums) != len(self.names):  # not resumed, or a new model
            self.meter.reset()
        self._pictures = UnitPictures(self, trainer, f"{self.name}/")
        self.meter.log = self._pictures.log
        self._logs = LogSteps(trainer)
        settings = {"layers": self.meter.layer_names, **unit_settings(self.meter.unit, self.meter.groups)}
        open_record(self, trainer, pl_module, settings)
        super().on_train_start(trainer, pl_module)

    def on_new_optimizers(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.meter.prepare(pl_module, trainer.optimizers)

    def on_before_optimizer_closure(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self.meter.measuring or self._logs.due(logged_step(trainer) + 1):
            self.meter.begin(optimizer)

    def on_after_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        if self.meter.measure(optimizer, logged_step(trainer)):
            self._logs.note(logged_step(trainer) + 1)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._pictures is not None:
            self._pictures.draw()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._pictures is not None:
            self._pictures.draw(end=True)

    def state_dict(self) -> dict[str, Any]:
        return self.meter.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.meter.load_state_dict(state_dict)
