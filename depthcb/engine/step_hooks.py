"""Registers torch's optimizer step hooks and reliably removes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from torch import nn
from torch.optim import Optimizer

#: Receives the measurements of a step: numbers by key, and the step number.
Sink = Callable[[Mapping[str, float], int], object]


class Hooked:
    """Manages step hooks on optimizers: at most one pair per optimizer, until they are removed."""

    def _hook(
        self,
        optimizers: Sequence[Optimizer],
        before: Callable[[Optimizer], object],
        after: Callable[[Optimizer], object],
    ) -> None:
        """Registers step hooks, replacing existing ones.

        Args:
            optimizers: The optimizers.
            before: Called at the start of ``optimizer.step``.
            after: Called at the end of ``optimizer.step``.
        """

        def pre(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            before(optimizer)

        def post(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            after(optimizer)

        self._unhook()
        for optimizer in optimizers:
            self._handles.append(optimizer.register_step_pre_hook(pre))
            self._handles.append(optimizer.register_step_post_hook(post))

    def _unhook(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    @property
    def _handles(self) -> list[Any]:
        # Created on first use, so that subclasses need not call this class's constructor.
        handles: list[Any] = self.__dict__.setdefault("_step_handles", [])
        return handles


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
        self._hook(optimizers, self.before_step, self.after_step)
        return self

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
