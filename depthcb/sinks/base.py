"""The base class and the registry of logger sinks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from lightning.pytorch.loggers import Logger

from depthcb.profile import Profile
from depthcb.unit_grid import UnitGrid

#: Registered sinks by logger class.
SINKS: dict[type[Any], type[LoggerSink]] = {}


class LoggerSink:
    """Logger-specific output beyond scalars; the base class does nothing.

    Args:
        logger: The logger; scalars are logged through Lightning.
    """

    #: Whether `units` draws: the loggers then get no scalars of units smaller than layers.
    draws = False

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def run_name(self) -> str:
        """Returns the name by which the logger's page shows the run, if that is not its folder's; else nothing."""
        return ""

    def configure(self, name: str, settings: Mapping[str, Any], control: str) -> None:
        """Adds a callback's settings to the run's configuration.

        Args:
            name: The callback's name.
            settings: The settings, as in the callback's record.
            control: ``"standard"`` or ``"equal-step"``, for grouping runs.
        """

    def pictures(self, name: str, by_measure: Mapping[str, Sequence[Profile]], step: int) -> None:
        """Logs plots of the profiles so far.

        Args:
            name: Prefix of the plots' keys.
            by_measure: The profiles so far of each measure, oldest first.
            step: The step of the latest profiles.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """

    def units(self, name: str, grid: UnitGrid, step: int) -> None:
        """Logs a heatmap of the step ratios of units smaller than layers.

        Args:
            name: Prefix of the plot's key.
            grid: The ratios at this step, by layer and kind of unit.
            step: The step.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """

    def sites(self, name: str, latest: Mapping[str, Profile], step: int) -> None:
        """Logs a plot of the latest profiles at several sites of the layers.

        Args:
            name: Prefix of the plot's key.
            latest: The profiles by site, that of the blocks first.
            step: Their step.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """


Sink = TypeVar("Sink", bound=type[LoggerSink])


def register(kind: type[Logger]) -> Callable[[Sink], Sink]:
    """Returns a class decorator that registers a sink for a logger class and its subclasses.

    Args:
        kind: The logger class.

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
