"""The equal-step control: every layer moves by the same fraction of its norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from depthcb.adapters import adapted_modules
from depthcb.callbacks.logged import is_log_step, log_row, logged_step, open_record
from depthcb.callbacks.step_events import OptimizerStepCallback, damage_named
from depthcb.errors import NotFiniteError
from depthcb.stack import LayerStack, half_dtypes
from depthcb.step_ratio import (
    LayerSteps,
    MeanRatios,
    Target,
    as_ratios,
    check_target,
    everywhere,
    imposed_ratios,
    layer_norms,
    rescale,
    revert_non_finite,
    step_squares,
)


@dataclass(frozen=True)
class LoggedStep:
    """A step to be logged, as far as it is known.

    Args:
        step: The step that Lightning counts.
        done: Numbers of the controlled layers.
        ratios: What the optimizer wanted, (layers,).
        scale: The factors applied, (layers,).
        squares: This process's part of what came of it, as `step_squares` gives it.
        shares: As `LayerSteps.shares` gives them.
    """

    step: int
    done: list[int]
    ratios: Tensor
    scale: Tensor
    squares: Tensor
    shares: tuple[float, ...] | None


class EqualStep(OptimizerStepCallback):
    r"""Rescales every optimizer step so that ||dW|| / ||W|| is equal in all layers [paper].

    After each real step, every layer with a non-zero update becomes ``before + (r* / r) (after - before)``: its
    direction is kept, its size is set. Layers without an update (frozen, no gradient, a skipped step) stay as they
    are and don't count in r*. Optimizer state is left alone. A non-finite update is not applied, and an error at the
    next log names its layer. Memory: one more copy of the controlled parameters, and a second one during log steps.

    ========================  =====================================================================================
    logged key                meaning (every ``log_every_n_steps``; layers without an update are left out)
    ========================  =====================================================================================
    ``equal_step/ratio/L00``    step ratio r that the optimizer wanted
    ``equal_step/scale/L00``    r* / r, the factor on the layer's step
    ``equal_step/realised/L00`` step ratio measured after rescaling, rounding included
    ``equal_step/target``       mean of the imposed ratios r*
    ``equal_step/spread``       max r / min r: what the control had to remove (1: nothing)
    ========================  =====================================================================================

    Args:
        layers: The layers, as `LayerStack.find` takes them; None finds them.
        target: r*: ``"mean"`` (default), ``"median"``, ``"min"`` or ``"geometric_mean"`` of the layers' ratios; a
            float; one weight per layer, which imposes that depth profile of step sizes at the mean ratio; or a
            callable ``(ratios, step) -> ratios`` on (L,) tensors.
        outside: ``"leave"`` parameters outside the stack alone, or treat each module that owns some as a further
            ``"layer"`` [ours].
        name: First part of the logged keys; two controls in one Trainer (an encoder's and a decoder's) need two names.

    Raises:
        ValueError: A target that cannot be imposed, layers that cannot be found, a layer without trainable or
            with all-zero parameters (at fit start); a layer whose update was not finite (at the next log).

    Example:
        >>> import lightning.pytorch as pl
        >>> from depthcb import EqualStep
        >>> trainer = pl.Trainer(callbacks=[EqualStep()], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        layers: str | list[str] | None = None,
        target: Target = "mean",
        outside: Literal["leave", "layer"] = "leave",
        name: str = "equal_step",
    ) -> None:
        check_target(target)
        if outside not in ("leave", "layer"):
            raise ValueError(f"outside={outside!r} is unknown: use 'leave' or 'layer'.")
        self.layers = layers
        self.target = target
        self.outside = outside
        self.name = name
        #: Names of the controlled layers, known from fit start on.
        self.names: tuple[str, ...] = ()
        #: Mean ratio of each layer over the logged steps: what the optimizer wanted, and what came of it.
        self.mean_wanted, self.mean_realised = MeanRatios(0), MeanRatios(0)
        self._steps_made = 0
        self._unlogged: LoggedStep | None = None

    @property
    def state_key(self) -> str:
        return self._generate_state_key(name=self.name)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not later: after a forward, FSDP shows gathered parameters in place of the shards that the optimizer owns.
        stack = LayerStack.find(pl_module, self.layers)
        groups = dict(zip(stack.names, stack.parameters(), strict=True))
        self._labels = [f"L{i:02d}" for i in range(len(stack))]
        if self.outside == "layer":
            outside = stack.outside()
            groups |= outside
            self._labels += list(outside)
        self.names = tuple(groups)
        _check_adapters(stack)
        check_target(self.target, len(groups))
        _check_weights(groups, trainer.optimizers)
        self._steps = LayerSteps(list(groups.values()))
        self._broken: Tensor | None = None
        self._unlogged = None  # what an exception left

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == 0 or len(self.mean_wanted.sums) != len(self.names):  # not resumed, or another model
            self.mean_wanted, self.mean_realised = MeanRatios(len(self.names)), MeanRatios(len(self.names))
            self._steps_made = 0
        settings = {"layers": self.names, "target": self.target, "outside": self.outside}
        open_record(self, "EqualStep", trainer, pl_module, settings)
        super().on_train_start(trainer, pl_module)

    def on_before_optimizer_closure(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        self._steps.begin(optimizer, trainer.optimizers)

    def on_after_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        done = self._steps.finish(optimizer, trainer.optimizers)
        if not done:
            return
        now, before = self._steps.now(done), self._steps.before(done)
        logs = is_log_step(trainer)
        start = [[t.clone() for t in layer] for layer in before] if logs else []
        broken = revert_non_finite(now, before)
        shares = self._steps.shares(done)
        # Over processes one sum a step: what came of a logged step waits for the next step's.
        waiting = [] if self._unlogged is None else [self._unlogged.squares]
        squares, *late = everywhere([step_squares(now, before, shares, broken), *waiting], shares)
        if late:
            self._log(trainer, late[0])
        ratios = as_ratios(squares)
        broken = ~ratios.isfinite()  # in any process; or the layer's norm was 0
        ratios = torch.where(broken, 0.0, ratios)
        wanted = self._wanted(ratios, done)
        broken |= ~(wanted.isfinite() & (wanted >= 0)) & (ratios > 0)
        scale = torch.where(ratios > 0, wanted / ratios, 1.0)
        scale = torch.where(broken, 0.0, scale)  # not applied: back to where the layer was
        rescale(now, before, scale)
        self._remember(broken, done)
        self._steps_made += 1
        if logs:
            self._raise_if_broken()
            came = step_squares(now, start, shares)
            self._unlogged = LoggedStep(logged_step(trainer), done, ratios, scale, came, shares)
            if shares is None:
                self._log(trainer, came)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._log_waiting(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._log_waiting(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._raise_if_broken()
        self._log_waiting(trainer)
        if self._steps.waiting:
            names = [type(trainer.optimizers[i]).__name__ for i in sorted(self._steps.waiting)]
            rank_zero_warn(
                f"EqualStep: the last round of steps was never controlled, because optimizer {', '.join(names)} owns "
                "parameters of the layers and did not step in it."
            )

    def state_dict(self) -> dict[str, Any]:
        means = {"mean_wanted": self.mean_wanted.state_dict(), "mean_realised": self.mean_realised.state_dict()}
        return {"steps_made": self._steps_made, **means}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        with damage_named(self):
            self._steps_made = int(state_dict["steps_made"])
            self.mean_wanted.load_state_dict(state_dict["mean_wanted"])
            self.mean_realised.load_state_dict(state_dict["mean_realised"])

    def _wanted(self, ratios: Tensor, done: list[int]) -> Tensor:
        """The ratios to impose on the layers that are done; the target itself speaks of all layers."""
        index = torch.tensor(done, device=ratios.device)
        every = torch.zeros(len(self.names), dtype=ratios.dtype, device=ratios.device).index_copy_(0, index, ratios)
        return imposed_ratios(self.target, every, self._steps_made).index_select(0, index)

    def _remember(self, broken: Tensor, done: list[int]) -> None:
        """Keeps, on the device, the layers of the first step that broke."""
        if self._broken is None:
            self._broken = torch.zeros(len(self.names), dtype=torch.bool, device=broken.device)
        flags = torch.zeros_like(self._broken).index_copy_(0, torch.tensor(done, device=broken.device), broken)
        self._broken = torch.where(self._broken.any(), self._broken, flags)

    def _raise_if_broken(self) -> None:
        if self._broken is not None and self._broken.any():
            names = [name for name, flag in zip(self.names, self._broken.tolist(), strict=True) if flag]
            raise NotFiniteError(
                f"EqualStep: the update or its target was not finite in layer {', '.join(names)}; that update was not "
                "applied. Lower the learning rate, clip gradients or look for NaN in the batch."
            )

    def _log_waiting(self, trainer: pl.Trainer) -> None:
        """Logs the last step where no other one takes it along: before a validation, a checkpoint or the end."""
        if self._unlogged is not None:
            self._log(trainer, everywhere([self._unlogged.squares], self._unlogged.shares)[0])

    def _log(self, trainer: pl.Trainer, squares: Tensor) -> None:
        """Logs the step that waits, given what came of it in all processes."""
        logged, self._unlogged = self._unlogged, None
        assert logged is not None
        done = logged.done
        columns = torch.stack([logged.ratios, logged.scale, as_ratios(squares)]).tolist()
        rows = [(i, *row) for i, row in zip(done, zip(*columns, strict=True), strict=True) if row[0] > 0]
        if not rows:
            return
        wanted = [r for _, r, _, _ in rows]
        values = {"target": sum(r * s for _, r, s, _ in rows) / len(rows), "spread": max(wanted) / min(wanted)}
        for i, r, s, actual in rows:
            label = self._labels[i]
            values |= {f"ratio/{label}": r, f"scale/{label}": s, f"realised/{label}": actual}
        log_row(self, trainer, {f"{self.name}/{key}": value for key, value in values.items()}, logged.step)
        self.mean_wanted.note({i: r for i, r, _, _ in rows})
        self.mean_realised.note({i: actual for i, _, _, actual in rows})


def _check_adapters(stack: LayerStack) -> None:
    """Refuses layers that train adapters."""
    for name, layer in zip(stack.names, stack.modules, strict=True):
        if any(p.requires_grad for m in adapted_modules(layer) for p in m.parameters()):
            raise ValueError(
                f"EqualStep: layer {name} trains adapters. Its weight, W0 + BA with LoRA, is not linear in them, so no "
                "factor on the step sets its ratio: train the weights themselves, or watch with UpdateRatioMonitor."
            )


def _check_weights(groups: dict[str, list[torch.nn.Parameter]], optimizers: list[Optimizer]) -> None:
    """Refuses layers whose step ratio cannot be defined, once, before the first step."""
    parameters = [p for group in groups.values() for p in group]
    trained = {name: [p for p in group if p.requires_grad] for name, group in groups.items()}
    trained = {name: group for name, group in trained.items() if group}
    if {p for o in optimizers for g in o.param_groups for p in g["params"]}.isdisjoint(parameters):
        raise ValueError(
            f"EqualStep: no optimizer owns a parameter of the layers {', '.join(groups)}: pass layers= to name those "
            "that are trained."
        )
    norms = layer_norms(list(trained.values())).tolist() if trained else []
    zero = [name for name, norm in zip(trained, norms, strict=True) if norm == 0]
    if zero:
        raise ValueError(
            f"EqualStep: the trainable parameters of layer {', '.join(zero)} are all 0, so ||dW|| / ||W|| is not "
            "defined: leave it out with layers=[...]."
        )
    half = half_dtypes(parameters)
    if half:
        rank_zero_warn(
            f"EqualStep: with {half} weights a small step is rounded away, so the realised ratio "
            "can miss the target by tens of per cent: look at equal_step/realised, or keep fp32 weights ('bf16-mixed')."
        )
