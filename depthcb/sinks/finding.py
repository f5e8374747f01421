"""Finds the sink of a logger; one of depthcb's own is imported when such a logger is met."""

from __future__ import annotations

import importlib
import importlib.util

from lightning.pytorch.loggers import Logger

from depthcb.sinks.base import SINKS, LoggerSink

#: Home of Lightning's own loggers: the sink of ``<home>.wandb`` is in a file of the same name beside this one.
_LIGHTNING = "lightning.pytorch.loggers"


def sink_of(logger: Logger) -> LoggerSink:
    """The sink of a logger: that of its class or the nearest of its base classes; a silent one where there is none."""
    for kind in type(logger).__mro__:
        home, _, name = kind.__module__.rpartition(".")
        ours = f"{__package__}.{name}"
        if kind not in SINKS and home == _LIGHTNING and importlib.util.find_spec(ours):
            importlib.import_module(ours)
        if kind in SINKS:
            return SINKS[kind](logger)
    return LoggerSink(logger)
