"""The equal-step control: every layer moves by the same fraction of its norm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from depthcb.adapters import adapted_modules
from depthcb.engine.step_hooks import StepHooks, damage_named
from depthcb.engine.warn import warn
from depthcb.errors import NotFiniteError
from depthcb.profile import layer_key
from depthcb.stack import LayerStack, half_dtypes
from depthcb.step_ratio import (
    LayerSteps,
    MeanRatios,
    Target,
    all_reduce,
    as_ratios,
    check_target,
    imposed_ratios,
    layer_norms,
    rescale,
    revert_non_finite,
    step_squares,
)

Outside = Literal["leave", "layer"]


@dataclass(frozen=True)
class LoggedStep:
    """A step to be logged, as far as it is known.

    Args:
        step: Its number.
        done: Indices of the K controlled layers.
        ratios: (K,), what the optimizer wanted.
        scale: (K,), the factors applied.
        squares: (2, K), this process's part of the realised ratios, as `step_squares` gives it.
        shares: As `LayerSteps.shares` gives them.
    """

    step: int
    done: list[int]
    ratios: Tensor
    scale: Tensor
    squares: Tensor
    shares: tuple[float, ...] | None


class StepEqualizer(StepHooks):
    """Rescales every optimizer step so that ||dW|| / ||W|| is equal in all layers [paper].

    `depthcb.EqualStep`, which does this in a Trainer, says what is logged and what the arguments mean.

    Args:
        layers: The layers, as `LayerStack.find` takes them; None finds them.
        target: The ratio to impose, as `depthcb.step_ratio.imposed_ratios` takes it.
        outside: ``"leave"`` parameters outside the stack alone, or treat each module that owns some as a ``"layer"``.
        name: First part of the logged keys.
        every: Steps between logged ones, where no Trainer says which.

    Raises:
        ValueError: A target that cannot be imposed, or an unknown ``outside``.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(3)])
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> rows = []
        >>> with StepEqualizer().attach(model, [optimizer], log=lambda row, step: rows.append(row)):
        ...     model(torch.ones(2, 4)).square().sum().backward()
        ...     _ = optimizer.step()
        >>> spread = [rows[0][f"equal_step/realised/L0{i}"] / rows[0]["equal_step/target"] for i in range(3)]
        >>> [round(s, 4) for s in spread]
        [1.0, 1.0, 1.0]
    """

    def __init__(
        self,
        layers: str | list[str] | None = None,
        target: Target = "mean",
        outside: Outside = "leave",
        name: str = "equal_step",
        every: int = 1,
    ) -> None:
        check_target(target)
        if outside not in ("leave", "layer"):
            raise ValueError(f"outside={outside!r} is unknown: use 'leave' or 'layer'.")
        self.layers, self.target, self.outside, self.name, self.every = layers, target, outside, name, every
        #: Names of the controlled layers, known once it is prepared.
        self.names: tuple[str, ...] = ()
        self._optimizers: Sequence[Optimizer] = ()
        self._steps = LayerSteps([])
        self._broken: Tensor | None = None
        self._unlogged: LoggedStep | None = None
        self.reset()

    def reset(self) -> None:
        """Starts to count and to average anew."""
        #: Mean ratio of each layer over the logged steps: what the optimizer wanted, and what the control made of it.
        self.mean_wanted, self.mean_realised = MeanRatios(len(self.names)), MeanRatios(len(self.names))
        self.steps_made = 0

    def prepare(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Finds the layers.

        Raises:
            ValueError: Layers that cannot be found, that no optimizer owns, that train adapters or are all 0.
        """
        stack = LayerStack.find(module, self.layers)
        groups = dict(zip(stack.names, stack.parameters(), strict=True))
        self._labels = [layer_key(i) for i in range(len(stack))]
        if self.outside == "layer":
            outside = stack.outside()
            groups |= outside
            self._labels += list(outside)
        self.names = tuple(groups)
        _check_adapters(stack)
        check_target(self.target, len(groups))
        _check_weights(groups, optimizers)
        if len(self.mean_wanted.sums) != len(self.names):  # another model than before
            self.reset()
        self._optimizers = optimizers
        self._steps = LayerSteps(list(groups.values()))
        self._broken, self._unlogged = None, None  # left by an exception

    def before_step(self, optimizer: Optimizer) -> None:
        """Copies the parameters that this optimizer is about to change."""
        self._steps.begin(optimizer, self._optimizers)

    def after_step(self, optimizer: Optimizer) -> None:
        """Equalizes the step, numbered from 0."""
        self.equalize(optimizer, self.steps_made, logs=(self.steps_made + 1) % self.every == 0)

    def equalize(self, optimizer: Optimizer, step: int, logs: bool) -> None:
        """Equalizes the round of steps that this optimizer's step is the last of.

        Args:
            optimizer: The optimizer that has stepped.
            step: The step's number, for the sink.
            logs: Whether this step is logged.

        Raises:
            NotFiniteError: On a logged step: an update, now or since the last one, was not finite.
        """
        done = self._steps.finish(optimizer, self._optimizers)
        if not done:
            return
        now, before = self._steps.now(done), self._steps.before(done)
        start = [[t.clone() for t in layer] for layer in before] if logs else []
        broken = revert_non_finite(now, before)
        shares = self._steps.shares(done)
        # Over processes one sum per step: the realised ratios of a logged step wait for the next step's.
        waiting = [] if self._unlogged is None else [self._unlogged.squares]
        own, way_back = step_squares(now, before, shares, broken)
        squares, *late = all_reduce([own, *waiting], shares)
        if late:
            self._log_step(late[0])
        ratios, scale, broken = self._scale(as_ratios(squares), done)
        rescale(now, way_back, scale)
        self._remember(broken, done)
        self.steps_made += 1
        if logs:
            self.raise_if_broken()
            realised, _ = step_squares(now, start, shares)
            self._unlogged = LoggedStep(step, done, ratios, scale, realised, shares)
            if shares is None:
                self._log_step(realised)

    def log_waiting(self) -> None:
        """Logs the last step where no other one takes it along: before a validation, a checkpoint or the end."""
        if self._unlogged is not None:
            self._log_step(all_reduce([self._unlogged.squares], self._unlogged.shares)[0])

    def finish(self) -> None:
        """Ends the training.

        Raises:
            NotFiniteError: An update since the last logged step was not finite.
        """
        self.raise_if_broken()
        self.log_waiting()
        if self._steps.waiting:
            names = [type(self._optimizers[i]).__name__ for i in sorted(self._steps.waiting)]
            warn(
                f"EqualStep: the last round of steps was never controlled, because optimizer {', '.join(names)} owns "
                "parameters of the layers and did not step in it."
            )

    def raise_if_broken(self) -> None:
        """Names the layers of the first step whose update, or its target, was not finite.

        Raises:
            NotFiniteError: There were some.
        """
        if self._broken is not None and self._broken.any():
            names = [name for name, flag in zip(self.names, self._broken.tolist(), strict=True) if flag]
            raise NotFiniteError(
                f"EqualStep: the update or its target was not finite in layer {', '.join(names)}; that update was not "
                "applied. Lower the learning rate, clip gradients or look for NaN in the batch."
            )

    def state_dict(self) -> dict[str, Any]:
        """Numbers and lists only."""
        means = {"mean_wanted": self.mean_wanted.state_dict(), "mean_realised": self.mean_realised.state_dict()}
        return {"steps_made": self.steps_made, **means}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on from a state.

        Raises:
            ValueError: The state is damaged.
        """
        with damage_named(f"EqualStep {self.name!r}"):
            self.steps_made = int(state_dict["steps_made"])
            self.mean_wanted.load_state_dict(state_dict["mean_wanted"])
            self.mean_realised.load_state_dict(state_dict["mean_realised"])

    def _scale(self, measured: Tensor, done: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """What to do with the K layers that are done.

        Args:
            measured: (K,) step ratios, NaN where an update was not finite in any process, or the layer's norm was 0.
            done: Their indices.

        Returns:
            (K,) ratios, 0 where broken; (K,) factors, 0 where the step is taken back; (K,) which ones are broken.
        """
        broken = ~measured.isfinite()
        ratios = torch.where(broken, 0.0, measured)
        wanted = self._wanted(ratios, done)
        broken = broken | (~(wanted.isfinite() & (wanted >= 0)) & (ratios > 0))
        scale = torch.where(ratios > 0, wanted / ratios, 1.0)
        return ratios, torch.where(broken, 0.0, scale), broken

    def _wanted(self, ratios: Tensor, done: list[int]) -> Tensor:
        """(K,) ratios to impose on the layers that are done; the target itself speaks of all layers."""
        index = torch.tensor(done, device=ratios.device)
        every = torch.zeros(len(self.names), dtype=ratios.dtype, device=ratios.device).index_copy_(0, index, ratios)
        return imposed_ratios(self.target, every, self.steps_made).index_select(0, index)

    def _remember(self, broken: Tensor, done: list[int]) -> None:
        """Keeps, on the device, the layers of the first step that broke: ``broken`` is (K,)."""
        if self._broken is None:
            self._broken = torch.zeros(len(self.names), dtype=torch.bool, device=broken.device)
        flags = torch.zeros_like(self._broken).index_copy_(0, torch.tensor(done, device=broken.device), broken)
        self._broken = torch.where(self._broken.any(), self._broken, flags)

    def _log_step(self, squares: Tensor) -> None:
        """Logs the step that waits, given the (2, K) squares of its realised ratios over all processes."""
        logged, self._unlogged = self._unlogged, None
        assert logged is not None
        columns = torch.stack([logged.ratios, logged.scale, as_ratios(squares)]).tolist()
        rows = [(i, *row) for i, row in zip(logged.done, zip(*columns, strict=True), strict=True) if row[0] > 0]
        if not rows:
            return
        wanted = [r for _, r, _, _ in rows]
        values = {"target": sum(r * s for _, r, s, _ in rows) / len(rows), "spread": max(wanted) / min(wanted)}
        for i, r, s, actual in rows:
            label = self._labels[i]
            values |= {f"ratio/{label}": r, f"scale/{label}": s, f"realised/{label}": actual}
        if self.log is not None:
            self.log({f"{self.name}/{key}": value for key, value in values.items()}, logged.step)
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


def _check_weights(groups: Mapping[str, list[nn.Parameter]], optimizers: Sequence[Optimizer]) -> None:
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
        warn(
            f"EqualStep: with {half} weights a small step is rounded away, so the realised ratio "
            "can miss the target by tens of per cent: look at equal_step/realised, or keep fp32 weights ('bf16-mixed')."
        )
