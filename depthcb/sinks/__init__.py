"""What the loggers of a Trainer can do beyond scalars: one class for each kind, found through a registry."""

from depthcb.sinks.base import LoggerSink as LoggerSink
from depthcb.sinks.base import register as register
from depthcb.sinks.finding import sink_of as sink_of
