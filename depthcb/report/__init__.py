"""What people look at after a run: a figure, one page that needs no network, and tables in the terminal.

All three are drawn from one JSON-able ``summary`` of up to four arms (optimizer x control). Reading it and wording the
verdict happen once, in `depthcb.report.summary`, so that the three never tell different stories. An arm that was
interrupted before its first validation is named as not measured and never drawn.
"""

from depthcb.report.figure import figure, write_png
from depthcb.report.page import read_summary, write_html
from depthcb.report.terminal import print_summary

__all__ = ["figure", "print_summary", "read_summary", "write_html", "write_png"]
