"""Observes the steps of optimizers, whenever and however they were made, and reliably stops.

Torch's hooks for all optimizers see every step of an optimizer that torch's constructor has set up, also of one that is
made in mid-training or kept inside a wrapper. The ``step`` of a wrapper that never called this constructor is replaced
on the instance until the hooks are removed. If a wrapper's step calls another optimizer's, the outermost one counts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from depthcb.stack import LayerStack
from depthcb.step_ratio import parameters_of
from depthcb.warn import warn

#: Receives the measurements of a step: numbers by key, and the step number.
Sink = Callable[[Mapping[str, float], int], object]
Act = Callable[[Optimizer], object]


class Hooked:
    """Acts around the steps of a module's optimizers, once per outermost step, until the hooks are removed."""

    def _hook(self, module: nn.Module, optimizers: Sequence[Optimizer], before: Act, after: Act) -> None:
        """Registers step hooks, replacing existing ones.

        Args:
            module: Steps of any optimizer that owns a parameter of it are reported.
            optimizers: Their steps are reported whatever they own.
            before: Called at the start of ``optimizer.step``.
            after: Called at the end of ``optimizer.step``.
        """
        self._unhook()
        self._outermost = _Outermost(module, before, after)
        self._follow(optimizers)
        self._handles.append(register_optimizer_step_pre_hook(self._outermost.pre))
        self._handles.append(register_optimizer_step_post_hook(self._outermost.post))

    def _follow(self, optimizers: Sequence[Optimizer]) -> bool:
        """Reports the steps of these optimizers from now on; returns whether any of them is new."""
        known = self._outermost.optimizers
        fresh = [o for o in optimizers if not any(o is other for other in known)]
        self._outermost.optimizers = list(optimizers)
        for optimizer in fresh:
            if not getattr(type(optimizer).step, "hooked", False):  # torch marks the steps that run its hooks
                self._handles.append(_ReplacedStep(optimizer, self._outermost))
        return bool(fresh)

    def _unhook(self) -> None:
        while self._handles:
            self._handles.pop().remove()
        self.__dict__.pop("_outermost", None)  # its functions can't be pickled

    @property
    def _handles(self) -> list[Any]:
        # Created on first use, so that subclasses need not call this class's constructor.
        handles: list[Any] = self.__dict__.setdefault("_step_handles", [])
        return handles


class _Outermost:
    """Calls ``before`` and ``after`` once around each outermost step of the optimizers in question."""

    def __init__(self, module: nn.Module, before: Act, after: Act) -> None:
        self.module, self.before, self.after = module, before, after
        self.optimizers: list[Optimizer] = []
        self._stepping: object = None

    def pre(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """The hook that torch calls before a step."""
        self.enter(optimizer, optimizer)

    def post(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """The hook that torch calls after a step."""
        self.leave(optimizer, optimizer)

    def enter(self, source: object, optimizer: Optimizer) -> None:
        """Notes the start of a step; ``source`` distinguishes a replaced step from the hooks of the same optimizer."""
        # A source that enters twice was left by an exception, after which torch calls no hook.
        if (self._stepping is None or self._stepping is source) and self._reports(optimizer):
            self._stepping = source
            self.before(optimizer)

    def leave(self, source: object, optimizer: Optimizer) -> None:
        """Notes the end of a step."""
        if self._stepping is source:
            self._stepping = None
            self.after(optimizer)

    def abandon(self, source: object) -> None:
        """Notes that an exception has ended a step."""
        if self._stepping is source:
            self._stepping = None

    def _reports(self, optimizer: Optimizer) -> bool:
        if any(optimizer is other for other in self.optimizers):
            return True
        return not parameters_of(optimizer).isdisjoint(self.module.parameters())


class _ReplacedStep:
    """Replaces the ``step`` of one optimizer until removed, for classes in which torch's hooks don't run."""

    def __init__(self, optimizer: Optimizer, steps: _Outermost) -> None:
        own = vars(optimizer).get("step")  # as a scheduler's wrapper

        @functools.wraps(optimizer.step)
        def step(*args: Any, **kwargs: Any) -> Any:
            # The class is asked again each time: torch may give its step hooks later, in zero_grad.
            inner = own or functools.partial(type(optimizer).step, optimizer)
            if self.removed:
                return inner(*args, **kwargs)
            steps.enter(self, optimizer)
            try:
                result = inner(*args, **kwargs)
            except BaseException:
                steps.abandon(self)
                raise
            steps.leave(self, optimizer)
            return result

        self.removed = False
        self._optimizer, self._own, self._step = optimizer, own, step
        step.replaced = self  # type: ignore[attr-defined]
        optimizer.step = step  # type: ignore[method-assign]

    def remove(self) -> None:
        """Puts the original ``step`` back, as soon as nothing that has wrapped it since is in the way."""
        self.removed = True
        while top := getattr(vars(self._optimizer).get("step"), "replaced", None):
            if not top.removed or top._step is not vars(self._optimizer)["step"]:
                break
            del self._optimizer.step
            if top._own is not None:
                self._optimizer.step = top._own  # type: ignore[method-assign]


def warn_replaced(who: str, stack: LayerStack, known: list[list[nn.Parameter]]) -> None:
    """Warns once of layers whose parameters are other objects than at the start, and takes them for known then.

    Args:
        who: The callback, for the message.
        stack: The layers.
        known: Their parameters at the start; those of the layers concerned are replaced.
    """
    names = stack.replaced(known)
    if names:
        known[: len(stack)] = stack.parameters()
        warn(
            f"{who}: layer {', '.join(names)} has got new parameters since the fit began, whose steps are not seen: "
            "change the values of a parameter instead of replacing it, or make a new optimizer for the new ones."
        )


class StepHooks(Hooked):
    """Base class of the engine's objects, with hooks around every real step of the attached optimizers.

    The hooks fire once per step that an optimizer really takes: not for accumulated batches, not for steps that an AMP
    scaler skips, and once for LBFGS regardless of how often it calls its closure.

    Subclasses override `before_step` and `after_step`, and `prepare` to set up for a module and its optimizers.
    """

    #: Receives logged rows; None discards them.
    log: Sink | None = None

    def prepare(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Sets up for a module and its optimizers, and validates them.

        Raises:
            ValueError: The module or the optimizers are not supported.
        """

    def before_step(self, optimizer: Optimizer) -> None:
        """Called at the start of ``optimizer.step``, before the weights change."""

    def after_step(self, optimizer: Optimizer) -> None:
        """Called at the end of ``optimizer.step``, after the weights have changed."""

    def finish(self) -> None:
        """Called at the end of training; logs anything still pending."""

    def attach(self, module: nn.Module, optimizers: Sequence[Optimizer], log: Sink | None = None) -> Self:
        """Attaches to a training loop; if already attached, detaches first.

        Args:
            module: The module to be trained.
            optimizers: All optimizers that own parameters of it.
            log: Receives logged rows.

        Raises:
            ValueError: See `prepare`.
        """
        self.detach()
        self.log = log
        self.prepare(module, optimizers)
        self.listen(module, optimizers)
        return self

    def listen(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Registers the hooks alone, after `prepare`, where a trainer says when a step begins and ends."""
        self._hook(module, optimizers, self.before_step, self.after_step)

    def detach(self) -> None:
        """Removes all hooks, if any."""
        self._unhook()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.finish()
        finally:
            self.detach()


@contextmanager
def checkpoint_errors(owner: str) -> Iterator[None]:
    """Converts errors while restoring a state into one that names the owner of the damaged state.

    Args:
        owner: The name of the object whose state is restored.

    Raises:
        ValueError: Replaces an AttributeError, KeyError, TypeError or ValueError.
    """
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"The checkpoint's state of {owner} is damaged ({error!r}): resume from another checkpoint."
        ) from error
