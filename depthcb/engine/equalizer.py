"""The equal-step control: every layer moves by the same fraction of its norm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from depthcb.adapters import made_weights
from depthcb.engine.step_hooks import StepHooks, checkpoint_errors, warn_replaced
from depthcb.errors import NotFiniteError
from depthcb.stack import LayerStack, half_dtypes
from depthcb.step_ratio import (
    LayerSteps,
    MeanRatios,
    Target,
    all_reduce,
    as_ratios,
    by_layer,
    check_target,
    imposed_ratios,
    layer_norms,
    local,
    matrix_spreads,
    on_device,
    parameters_of,
    rescale,
    rescaled_sums,
    revert,
    step_sums,
    tensor_sums,
)
from depthcb.units import Groups, UnitKind, check_unit, find_units
from depthcb.warn import warn

Outside = Literal["leave", "layer"]
Decay = Literal["inside", "outside"]
#: Cosine of the step with -W above which the step mostly shrinks the layer [ours].
MOSTLY_DECAY = 0.5
#: Relative error of a sum of squares in fp32, on an accelerator, where its order depends on more than the values.
ROUNDING = 1e-6


@dataclass(frozen=True)
class LoggedStep:
    """A step that is yet to be logged.

    Args:
        step: The step number.
        done: Indices of the K controlled layers.
        layers: Their parameters, T in all.
        ratios: (K,) ratios that the optimizer wanted.
        scale: (K,) factors applied.
        sums: (3, T) this process's part of ||before||^2, and of ||now||^2 and ||now - before||^2 as realised.
        shares: As returned by `LayerSteps.shares`.
    """

    step: int
    done: list[int]
    layers: list[list[nn.Parameter]]
    ratios: Tensor
    scale: Tensor
    sums: Tensor
    shares: tuple[float, ...] | None


class StepEqualizer(StepHooks):
    """Rescales every optimizer step so that ||dW|| / ||W|| is equal in all layers [paper].

    `depthcb.EqualStep` does this in a Trainer; its documentation explains the arguments and the logged keys.

    Args:
        layers: The layers, as accepted by `LayerStack.find`; None searches for them.
        target: The ratio to impose, as accepted by `depthcb.step_ratio.imposed_ratios`.
        outside: ``"leave"`` ignores parameters outside the stack; ``"layer"`` treats each module that owns some as a
            layer.
        decay: ``"inside"`` counts weight decay as a part of the step; ``"outside"`` equalizes the rest of it.
        offload: Whether to keep the copy of the parameters in main memory.
        name: Prefix of the logged keys.
        every: Log every n-th step; ignored in a Trainer.
        unit: What gets equal steps: ``"layer"``, ``"matrix"`` or ``"group"``; see `depthcb.units.find_units`. What is
            said of a layer here holds for each unit.
        groups: Globs that name groups.

    Raises:
        ValueError: The target cannot be imposed, or ``outside``, ``decay`` or ``unit`` is unknown.

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
        layers: list[str] | str | None = None,
        target: Target = "mean",
        outside: Outside = "leave",
        name: str = "equal_step",
        every: int = 1,
        decay: Decay = "inside",
        offload: bool = False,
        unit: UnitKind = "layer",
        groups: Groups | None = None,
    ) -> None:
        check_target(target)
        check_unit(unit, groups)
        self.unit: UnitKind = unit
        self.groups = groups
        if decay not in ("inside", "outside"):
            raise ValueError(f"decay={decay!r} is unknown: use 'inside' or 'outside'.")
        self.decay = decay
        if outside not in ("leave", "layer"):
            raise ValueError(f"outside={outside!r} is unknown: use 'leave' or 'layer'.")
        self.layers, self.target, self.outside, self.name, self.every = layers, target, outside, name, every
        self.offload = offload
        #: Names of the controlled layers or other units, available after `prepare`.
        self.names: tuple[str, ...] = ()
        #: Their names in logged keys, and the names of the layers that contain them.
        self.keys: tuple[str, ...] = ()
        self.layer_names: tuple[str, ...] = ()
        self._optimizers: Sequence[Optimizer] = ()
        self._stack: LayerStack
        self._known: list[list[nn.Parameter]] = []
        self._groups: list[list[nn.Parameter]] = []
        self._steps = LayerSteps([])
        self._left: dict[int, tuple[list[nn.Parameter], Tensor]] = {}
        self._moved: list[tuple[int, Tensor]] = []
        self._broken: Tensor | None = None
        self._unlogged: LoggedStep | None = None
        self._kept: dict[Tensor, Any] = {}
        self._shrinking: set[int] = set()
        self._unscalable: dict[Tensor, str] = {}
        self._stepped = self._told = self._apart = False
        self.reset()

    def reset(self) -> None:
        """Resets the step count and the means."""
        #: Mean ratio of each layer over the logged steps: as the optimizer wanted it, and as realised by the control.
        self.mean_wanted, self.mean_realised = MeanRatios(len(self.names)), MeanRatios(len(self.names))
        self.steps_made = 0

    def prepare(self, module: nn.Module, optimizers: Sequence[Optimizer], unfreezes: bool = False) -> None:
        """Finds the layers; those that no optimizer owns yet are controlled from the step on in which one does.

        Args:
            module: The module to be trained.
            optimizers: All optimizers that own parameters of it.
            unfreezes: Whether frozen layers are to be given to an optimizer later.

        Raises:
            ValueError: The layers cannot be found, train adapters or parametrizations, are all 0, or are frozen and
                owned by no optimizer; or ``decay="outside"`` is not supported for an optimizer.
        """
        self._stack = stack = LayerStack.find(module, self.layers)
        units = find_units(stack, self.unit, self.groups, outside=self.outside == "layer")
        groups = {unit.name: unit.parameters for unit in units}
        self.names, self.keys = tuple(groups), tuple(unit.key for unit in units)
        self.layer_names = self.names if self.unit == "layer" else stack.names
        self._known = stack.parameters()
        self._unscalable = _unscalable(stack, groups)
        self._check_scalable(p for p in self._unscalable if p.requires_grad)
        check_target(self.target, len(groups))
        if not unfreezes:
            _check_owners(groups, optimizers)
        _check_weights(groups)
        if self.decay == "outside":
            _check_decoupled(groups, optimizers)
        if len(self.mean_wanted.sums) != len(self.names):  # a different model
            self.reset()
        self._optimizers = optimizers
        self._groups = list(groups.values())
        self._steps = LayerSteps(self._groups, self.offload)
        self._left, self._moved, self._broken, self._unlogged = {}, [], None, None  # an exception may have left some
        self._stepped = self._told = self._apart = False

    def before_step(self, optimizer: Optimizer) -> None:
        """Copies the parameters that this optimizer is about to change, and notes what decay will leave of them."""
        if self.decay == "outside":
            for group in optimizer.param_groups:
                self._kept |= dict.fromkeys(group["params"], 1 - group["lr"] * group["weight_decay"])
        self._steps.begin(optimizer, self._optimizers)
        self._stepped |= bool(self._steps.waiting)
        if self._unscalable:  # unfrozen in mid-training
            self._check_scalable(p for p in parameters_of(optimizer) & self._unscalable.keys() if p.requires_grad)

    def after_step(self, optimizer: Optimizer) -> None:
        """Equalizes the step; steps are numbered from 0."""
        self.equalize(optimizer, self.steps_made, logs=(self.steps_made + 1) % self.every == 0)

    def note_weights(self) -> None:
        """Notes the norms of the weights, so that `check_first_step` and `check_weights` can tell of missed steps."""
        trained = {i: [p for p in group if p.requires_grad] for i, group in enumerate(self._groups)}
        trained = {i: parameters for i, parameters in trained.items() if parameters}
        if trained:
            self._note(trained, _squares(trained.values()))

    def check_first_step(self) -> None:
        """Checks that the first change since `note_weights` was a step that could be controlled.

        Raises:
            ValueError: The weights changed and no step was seen.
        """
        moved = [] if self._stepped else self._moved_layers()
        if moved:
            raise ValueError(
                f"EqualStep: layer {self._list(moved)} changed without a step of an optimizer that owns it, so nothing "
                "can be controlled: change the weights in the `step` of a torch optimizer (for a method of two steps "
                "such as SAM, in that of the optimizer inside), or remove EqualStep."
            )

    def check_weights(self) -> None:
        """Warns once of layers that something other than the steps seen has changed; waits for the device."""
        warn_replaced("EqualStep", self._stack, self._known)
        moved = self._moved_layers()
        if moved and not self._told:
            self._told = True
            warn(
                f"EqualStep: layer {self._list(moved)} also changed outside the optimizers' steps, so the steps are "
                "not the equal ones that are logged: make that change in the optimizer's `step`, or remove it (clipped "
                "weights, another control of the same layer)."
            )

    def _note(self, layers: Mapping[int, list[nn.Parameter]], squares: Tensor) -> None:
        """Notes that these parameters of K layers were left with the (K,) squared norms."""
        self._left |= dict(zip(layers, zip(layers.values(), squares.unbind(), strict=True), strict=True))

    def _compare(self, layers: Mapping[int, list[nn.Parameter]], squares: Tensor) -> None:
        """Notes which of K layers no longer have the norms that they were left with.

        Norms take every number into account, and cost nothing where they are computed anyway. A change that keeps a
        norm to the last bit, as a flip of all signs does, is not seen.
        """
        for (i, parameters), square in zip(layers.items(), squares.unbind(), strict=True):
            known, left = self._left.pop(i, (parameters, square))
            if set(known) == set(parameters):
                tolerance = 0.0 if square.device.type == "cpu" else ROUNDING
                self._moved.append((i, (square - left).abs() > tolerance * left))

    def _moved_layers(self) -> list[int]:
        """Returns the layers that have changed outside the steps seen, since the last call; waits for the device."""
        stepping = self._steps.stepping()
        layers = {i: parameters for i, (parameters, _) in self._left.items() if i not in stepping}
        if layers:  # without a step since
            squares = _squares(layers.values())
            self._compare(layers, squares)
            self._note(layers, squares)
        found, self._moved = self._moved, []
        return sorted({i for i, flag in found if flag})

    def equalize(self, optimizer: Optimizer, step: int, logs: bool) -> bool:
        """Equalizes the round of steps if this optimizer's step completes it.

        Args:
            optimizer: The optimizer that has stepped.
            step: The step number, for the sink.
            logs: Whether this step is logged.

        Returns:
            Whether the round is complete.

        Raises:
            NotFiniteError: On a logged step, if an update since the last logged step was not finite.
        """
        done = self._steps.finish(optimizer)
        if not done:
            return False
        opened = dict(zip(done, self._steps.opened(done), strict=True))
        now, before, shares = self._steps.now(done), self._steps.before(done), self._steps.shares(done)
        # One all-reduce per step: the realised ratios of a logged step are reduced together with the next step's.
        pending = [] if self._unlogged is None else [self._unlogged.sums]
        sums, suspects = tensor_sums(now, before, shares)
        squares = by_layer(sums, now)
        self._compare(opened, squares[0])
        if self.decay == "outside":
            self._decay(before, done, broken=~squares[1].isfinite())
            sums, suspects = tensor_sums(now, before, shares)
            squares = by_layer(sums, now)
        squares, *reduced = all_reduce([squares, *pending], shares)
        if reduced:
            self._log_step(reduced[0])
        ratios, scale, broken = self._scale(as_ratios(squares), done)
        if logs:
            after = rescaled_sums(now, before, scale, shares)
        else:
            rescale(now, before, scale)
        if suspects:
            flags = torch.stack([broken[i] for i in suspects])
            revert([now[i] for i in suspects], [before[i] for i in suspects], flags)
        self._record_broken(broken, done)
        self.steps_made += 1
        if logs:
            self.raise_if_broken()
            layers = list(opened.values())
            self._unlogged = LoggedStep(step, done, layers, ratios, scale, torch.cat([sums[:1], after]), shares)
            if shares is None:
                self._log_step(self._unlogged.sums)
            self.check_weights()
            self._note(opened, by_layer(after, now)[0])
            self._warn_apart(done)
        return True

    def _decay(self, before: list[list[Tensor]], done: list[int], broken: Tensor) -> None:
        """Applies the optimizers' weight decay to the copies, except in ``broken`` layers, (K,) booleans."""
        for copies, parameters, undone in zip(before, self._steps.opened(done), broken.unbind(), strict=True):
            for copy, parameter in zip(copies, parameters, strict=True):
                copy.mul_(torch.where(undone.to(copy.device), 1.0, self._kept[parameter]))

    def log_waiting(self) -> None:
        """Logs the pending step if no later step will do it: before a validation, a checkpoint or the end."""
        if self._unlogged is not None:
            self._log_step(all_reduce([self._unlogged.sums], self._unlogged.shares)[0])

    def finish(self) -> None:
        """Logs the pending step at the end of training.

        Raises:
            NotFiniteError: An update since the last logged step was not finite.
        """
        self.raise_if_broken()
        self.log_waiting()
        self._warn_never_owned()
        if self._steps.waiting:
            names = [type(o).__name__ for o in self._optimizers if not self._steps.waiting.isdisjoint(parameters_of(o))]
            warn(
                f"EqualStep: the last round of steps was not equalized, because optimizer {', '.join(names)} owns "
                "parameters of the layers and did not step in it."
            )

    def _warn_apart(self, done: list[int]) -> None:
        """Warns once if other layers are trained by steps of which this round knows nothing."""
        trained = {
            i for i, layer in enumerate(self._groups) if any(p.requires_grad for p in self._steps.owned & set(layer))
        }
        if trained > set(done) and not self._apart:
            self._apart = True
            warn(
                f"EqualStep: layer {self._list(done)} stepped apart from {self._list(sorted(trained - set(done)))}, so "
                "their steps are not equal: return all optimizers from configure_optimizers, or pass all to attach()."
            )

    def _warn_never_owned(self) -> None:
        owned = self._steps.owned.union(*map(parameters_of, self._optimizers))
        left = [i for i, layer in enumerate(self._groups) if layer and owned.isdisjoint(layer)]
        if left:
            warn(
                f"EqualStep: layer {self._list(left)} was not controlled, because no optimizer ever owned its "
                "parameters: give them to an optimizer, or leave the layer out with layers=[...]."
            )

    def _list(self, layers: Iterable[int]) -> str:
        return ", ".join(self.names[i] for i in layers)

    def _check_scalable(self, trained: Iterable[Tensor]) -> None:
        """Raises an error for the first of these parameters, in depth order, from which weights are made."""
        found = set(trained)
        for parameter, problem in self._unscalable.items():
            if parameter in found:
                raise ValueError(f"EqualStep: {problem}")

    def raise_if_broken(self) -> None:
        """Raises an error if an update or its target was not finite.

        Raises:
            NotFiniteError: Names the affected layers of the first such step.
        """
        if self._broken is not None and self._broken.any():
            names = [name for name, flag in zip(self.names, self._broken.tolist(), strict=True) if flag]
            raise NotFiniteError(
                f"EqualStep: the update or its target was not finite in layer {', '.join(names)}; that update was not "
                "applied. Lower the learning rate, clip gradients or look for NaN in the batch."
            )

    def state_dict(self) -> dict[str, Any]:
        """Returns numbers and lists only."""
        means = {"mean_wanted": self.mean_wanted.state_dict(), "mean_realised": self.mean_realised.state_dict()}
        return {"steps_made": self.steps_made, **means}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores the state.

        Raises:
            ValueError: The state is damaged.
        """
        with checkpoint_errors(f"EqualStep {self.name!r}"):
            self.steps_made = int(state_dict["steps_made"])
            self.mean_wanted.load_state_dict(state_dict["mean_wanted"])
            self.mean_realised.load_state_dict(state_dict["mean_realised"])

    def _scale(self, measured: Tensor, done: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Computes the scale factors of K layers.

        Args:
            measured: (K,) step ratios, NaN if an update was not finite in any process or the layer's norm was 0.
            done: Indices of the layers.

        Returns:
            (K,) ratios, 0 where broken; (K,) factors, 0 where the step is undone; (K,) booleans of broken layers.
        """
        broken = ~measured.isfinite()
        ratios = torch.where(broken, 0.0, measured)
        wanted = self._wanted(ratios, done)
        broken = broken | (~(wanted.isfinite() & (wanted >= 0)) & (ratios > 0))
        scale = torch.where(ratios > 0, wanted / ratios, 1.0)
        return ratios, torch.where(broken, 0.0, scale), broken

    def _wanted(self, ratios: Tensor, done: list[int]) -> Tensor:
        """Returns the (K,) ratios to impose on the given layers; the target is evaluated over all layers."""
        index = on_device(tuple(done), ratios.device, torch.int64)
        all_ratios = torch.zeros(len(self.names), dtype=ratios.dtype, device=ratios.device)
        all_ratios.index_copy_(0, index, ratios)
        return imposed_ratios(self.target, all_ratios, self.steps_made).index_select(0, index)

    def _record_broken(self, broken: Tensor, done: list[int]) -> None:
        """Records, on the device, the broken layers of the first step that has any; ``broken`` is (K,)."""
        if self._broken is None:
            self._broken = torch.zeros(len(self.names), dtype=torch.bool, device=broken.device)
        index = on_device(tuple(done), broken.device, torch.int64)
        flags = torch.zeros_like(self._broken).index_copy_(0, index, broken)
        self._broken = torch.where(self._broken.any(), self._broken, flags)

    def _log_step(self, sums: Tensor) -> None:
        """Logs the pending step, given the globally reduced (3, T) sums of `LoggedStep`."""
        logged, self._unlogged = self._unlogged, None
        assert logged is not None
        of_matrices = matrix_spreads(as_ratios(sums[[0, 2]]).tolist(), logged.layers)
        sums = by_layer(sums, logged.layers)
        columns = torch.stack([logged.ratios, logged.scale, as_ratios(sums[[0, 2]])]).tolist()
        rows = [(i, *row) for i, row in zip(logged.done, zip(*columns, strict=True), strict=True) if row[0] > 0]
        if not rows:
            return
        self._warn_decay(logged.done, sums)
        wanted = [r for _, r, _, _ in rows]
        values = {"target": sum(r * s for _, r, s, _ in rows) / len(rows), "spread": max(wanted) / min(wanted)}
        for i, r, s, actual in rows:
            key = self.keys[i]
            values |= {f"ratio/{key}": r, f"scale/{key}": s, f"realised/{key}": actual}
        for i, spread in zip(logged.done, of_matrices, strict=True):
            if math.isfinite(spread):
                values[f"matrix_spread/{self.keys[i]}"] = spread
        if self.log is not None:
            self.log({f"{self.name}/{key}": value for key, value in values.items()}, logged.step)
        self.mean_wanted.note({i: r for i, r, _, _ in rows})
        self.mean_realised.note({i: actual for i, _, _, actual in rows})

    def _warn_decay(self, done: list[int], sums: Tensor) -> None:
        """Warns once of each layer whose step mostly shrinks it; takes the sums of `LoggedStep`."""
        decays = any(group.get("weight_decay") for o in self._optimizers for group in o.param_groups)
        if self.decay == "outside" or not decays:
            return
        before, now, step = sums
        cosine = (before - now - step) / 2 / (now * step).sqrt()  # <before - now, now>, from the squares of all three
        sure = cosine - ROUNDING * (now / step).sqrt() > MOSTLY_DECAY
        found = zip(done, cosine.tolist(), sure.tolist(), strict=True)
        fresh = {i: c for i, c, flag in found if flag and i not in self._shrinking}
        self._shrinking |= set(fresh)
        if fresh:
            shown = ", ".join(f"{self.names[i]} ({c:.2f})" for i, c in fresh.items())
            warn(
                f"EqualStep: the step mostly shrinks layer {shown} (cosine with -W above {MOSTLY_DECAY:g}). If that is "
                "weight decay, the control amplifies it: set it to 0, or use decay='outside' with AdamW or Muon."
            )


def _check_decoupled(groups: Mapping[str, list[nn.Parameter]], optimizers: Sequence[Optimizer]) -> None:
    """Raises an error if an optimizer of the layers does not apply W <- (1 - lr * weight_decay) W on its own."""
    parameters = {p for group in groups.values() for p in group}
    for optimizer in optimizers:
        owned = [g for g in optimizer.param_groups if not parameters.isdisjoint(g["params"])]
        if not all(g.get("decoupled_weight_decay") or isinstance(optimizer, torch.optim.Muon) for g in owned):
            raise ValueError(
                f"EqualStep: decay='outside' is not supported for {type(optimizer).__name__}, whose weight decay is "
                "not known to be decoupled: use torch's AdamW or Muon, or decay='inside'."
            )


def _unscalable(stack: LayerStack, groups: Mapping[str, list[nn.Parameter]]) -> dict[Tensor, str]:
    """Returns the parameters from which weights of the layers are made, with what to say if they are trained."""
    layers: dict[Tensor, str] = {p: name for name, group in groups.items() for p in group}
    return {
        p: f"layer {layers[p]} {made.how}. Its weight is not linear in their parameters, so scaling the step cannot "
        f"set its ratio: {made.remedy}, or use UpdateRatioMonitor."
        for made in made_weights(stack.root)
        for p in made.parameters
        if p in layers
    }


def _check_owners(groups: Mapping[str, list[nn.Parameter]], optimizers: Sequence[Optimizer]) -> None:
    """Raises an error if no layer will ever be trained, and warns if none is trained yet."""
    parameters = {p for group in groups.values() for p in group}
    if not parameters.isdisjoint(p for o in optimizers for p in parameters_of(o)):
        return
    problem = f"EqualStep: no optimizer owns a parameter of the layers {', '.join(groups)}"
    if not any(p.requires_grad for p in parameters):
        raise ValueError(
            f"{problem}, and all of them are frozen: pass layers= to name the layers that are trained. If they are "
            "unfrozen later, use a callback such as BackboneFinetuning, or give them to the optimizer while frozen."
        )
    warn(f"{problem}: they are controlled once one does. If other layers are trained, name these with layers=.")


def _squares(layers: Iterable[list[nn.Parameter]]) -> Tensor:
    """Returns the (K,) squared norms, in this process, of the parameters of K layers as they are now."""
    weights = [[local(p) for p in parameters] for parameters in layers]
    return step_sums(weights, weights)[0][0]


def _check_weights(groups: Mapping[str, list[nn.Parameter]]) -> None:
    """Raises an error if a layer's step ratio is undefined; called once before the first step."""
    trained = {name: [p for p in group if p.requires_grad] for name, group in groups.items()}
    trained = {name: group for name, group in trained.items() if group}
    norms = layer_norms(list(trained.values())).tolist() if trained else []
    zero = [name for name, norm in zip(trained, norms, strict=True) if norm == 0]
    if zero:
        raise ValueError(
            f"EqualStep: the trainable parameters of layer {', '.join(zero)} are all 0, so ||dW|| / ||W|| is "
            "undefined: exclude it with layers=[...], or count it with others by a larger unit=."
        )
    half = half_dtypes(p for group in groups.values() for p in group)
    if half:
        warn(
            f"EqualStep: with {half} weights a small step is rounded away, so the realised ratio can miss the target "
            "by tens of per cent: check equal_step/realised, or keep the weights in fp32 ('bf16-mixed')."
        )
