"""Finds the sink of a logger, and imports those of depthcb's own when such a logger is met."""

from __future__ import annotations

import importlib

from lightning.pytorch.loggers import Logger

from depthcb.sinks.base import SINKS, LoggerSink

#: Homes of the sinks that come with depthcb, by the class of the logger.
BUILT_IN = {
    "lightning.pytorch.loggers.wandb.WandbLogger": "depthcb.sinks.wandb",
    "lightning.pytorch.loggers.tensorboard.TensorBoardLogger": "depthcb.sinks.tensorboard",
    "lightning.pytorch.loggers.mlflow.MLFlowLogger": "depthcb.sinks.mlflow",
}


def sink_of(logger: Logger) -> LoggerSink:
    """The sink of a logger: that of its class or the nearest of its base classes; a silent one where there is none."""
    for kind in type(logger).__mro__:
        home = BUILT_IN.get(f"{kind.__module__}.{kind.__qualname__}")
        if kind not in SINKS and home is not None:
            importlib.import_module(home)
        if kind in SINKS:
            return SINKS[kind](logger)
    return LoggerSink(logger)
