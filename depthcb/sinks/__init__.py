"""Logger-specific output beyond scalars: one sink class per logger type, looked up in a registry."""

from depthcb.sinks.base import LoggerSink as LoggerSink
from depthcb.sinks.base import register as register
from depthcb.sinks.finding import sink_of as sink_of
