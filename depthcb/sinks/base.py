"""What a sink can do, and the registry of sinks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from lightning.pytorch.loggers import Logger

from depthcb.profile import Profile

#: The sinks by the class of the logger.
SINKS: dict[type[Any], type[LoggerSink]] = {}


class LoggerSink:
    """What one kind of logger does beyond scalars: nothing, unless a subclass says so.

    Args:
        logger: The logger; scalars reach it through Lightning.
    """

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def configure(self, name: str, settings: Mapping[str, Any], control: str) -> None:
        """Puts what a callback measures by, or does, into the run's configuration.

        Args:
            name: The callback's name.
            settings: As the callback's record has them.
            control: ``"standard"`` or ``"equal-step"``, by which runs can be grouped.
        """

    def pictures(self, name: str, by_measure: Mapping[str, Sequence[Profile]], step: int) -> None:
        """Shows the profiles so far as pictures.

        Args:
            name: First part of the pictures' keys.
            by_measure: The profiles so far of each measure, oldest first.
            step: The step of the latest ones.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """


Sink = TypeVar("Sink", bound=type[LoggerSink])


def register(kind: type[Logger]) -> Callable[[Sink], Sink]:
    """Has a sink serve a kind of logger, its subclasses included.

    Args:
        kind: The logger's class.

    Example:
        >>> from lightning.pytorch.loggers import CSVLogger
        >>> class Titled(CSVLogger):
        ...     title = ""
        >>> @register(Titled)
        ... class TitleSink(LoggerSink):
        ...     def configure(self, name, settings, control):
        ...         self.logger.title = f"{name}, {control}"
        >>> from depthcb.sinks import sink_of
        >>> logger = Titled("logs")
        >>> sink_of(logger).configure("depth", {}, "standard")
        >>> logger.title
        'depth, standard'
    """

    def add(sink: Sink) -> Sink:
        SINKS[kind] = sink
        return sink

    return add
