"""Attaches to optimizers by torch's step hooks, and always lets go of them again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from torch import nn
from torch.optim import Optimizer

#: Takes what was measured at a step: a row of numbers by their keys, and the step's number.
Sink = Callable[[Mapping[str, float], int], object]


class Hooked:
    """Holds hooks around the steps of some optimizers, at most one pair on each, until it lets go of them."""

    def _hook(
        self,
        optimizers: Sequence[Optimizer],
        before: Callable[[Optimizer], object],
        after: Callable[[Optimizer], object],
    ) -> None:
        """Hooks the steps, in place of what was hooked.

        Args:
            optimizers: The optimizers.
            before: Called first thing in ``optimizer.step``.
            after: Called when the step is done.
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
        # Made on first use, so that a subclass need not call this class's constructor.
        handles: list[Any] = self.__dict__.setdefault("_step_handles", [])
        return handles


class StepHooks(Hooked):
    """Base of the engine's objects: hooks that torch calls around every real step of some optimizers.

    They fire once per step that an optimizer really makes: not for accumulated batches, not for steps that an AMP
    scaler skips, and once for LBFGS however often it calls its closure.

    Subclasses override `before_step` and `after_step`, and `prepare` to learn what they are attached to.
    """

    #: Where rows go; None keeps none.
    log: Sink | None = None

    def prepare(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Gets ready to act on a module and its optimizers, and refuses what cannot be acted on.

        Raises:
            ValueError: What is wrong, before any step.
        """

    def before_step(self, optimizer: Optimizer) -> None:
        """Called first thing in ``optimizer.step``: the weights are those before the step."""

    def after_step(self, optimizer: Optimizer) -> None:
        """Called when ``optimizer.step`` has changed the weights."""

    def finish(self) -> None:
        """Called when the training has come to its end: hands over what still waits."""

    def attach(self, module: nn.Module, optimizers: Sequence[Optimizer], log: Sink | None = None) -> Self:
        """Starts to act on a training loop; attaching again, in the middle of it too, lets go of what was before.

        Args:
            module: What is trained.
            optimizers: All optimizers that own parameters of it.
            log: Where rows go.

        Raises:
            ValueError: As `prepare` does.
        """
        self.detach()
        self.log = log
        self.prepare(module, optimizers)
        self._hook(optimizers, self.before_step, self.after_step)
        return self

    def detach(self) -> None:
        """Removes all hooks; does nothing where there are none."""
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
def damage_named(whose: str) -> Iterator[None]:
    """Says whose part of a checkpoint is damaged.

    Args:
        whose: The name of what reads its state inside.

    Raises:
        ValueError: In place of what reading a state without its parts, or with others, raises.
    """
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"The checkpoint's state of {whose} is damaged ({error!r}): resume from another checkpoint."
        ) from error
