"""Looks up the sink of a logger; depthcb's own sinks are imported on first use."""

from __future__ import annotations

import importlib
import importlib.util

from lightning.pytorch.loggers import Logger

from depthcb.sinks.base import SINKS, LoggerSink

#: Package of Lightning's loggers: the sink for loggers of ``<package>.wandb`` is in ``depthcb/sinks/wandb.py``.
_LIGHTNING = "lightning.pytorch.loggers"


def sink_of(logger: Logger) -> LoggerSink:
    """Returns the sink registered for the logger's class or its nearest base class, else a sink that does nothing."""
    for kind in type(logger).__mro__:
        package, _, name = kind.__module__.rpartition(".")
        sink_module = f"{__package__}.{name}"
        if kind not in SINKS and package == _LIGHTNING and importlib.util.find_spec(sink_module):
            importlib.import_module(sink_module)
        if kind in SINKS:
            return SINKS[kind](logger)
    return LoggerSink(logger)
