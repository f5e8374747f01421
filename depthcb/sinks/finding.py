"""Looks up the sink of a logger; depthcb's own sinks are imported on first use."""

from __future__ import annotations

import importlib
import importlib.util

from lightning.pytorch.loggers import Logger

from depthcb.sinks.base import SINKS, LoggerSink

#: Packages of Lightning's loggers: the sink for loggers of ``<package>.wandb`` is in ``depthcb/sinks/wandb.py``.
_LIGHTNING = ("lightning.pytorch.loggers", "pytorch_lightning.loggers")


def sink_of(logger: Logger) -> LoggerSink:
    """Returns the sink registered for the logger's class or its nearest base class, else a sink that does nothing."""
    for kind in type(logger).__mro__:
        package, _, name = kind.__module__.rpartition(".")
        sink_module = f"{__package__}.{name}"
        if kind not in SINKS and package in _LIGHTNING and importlib.util.find_spec(sink_module):
            importlib.import_module(sink_module)
            kind = getattr(importlib.import_module(_LIGHTNING[0]), kind.__name__, kind)  # the same class of either
        if kind in SINKS:
            return SINKS[kind](logger)
    return LoggerSink(logger)
