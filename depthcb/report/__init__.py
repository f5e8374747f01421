"""Reports on finished runs: figures, a self-contained HTML page, and tables in the terminal.

All reports are based on the runs' records, and share the pairing of runs and the text of verdicts in
`depthcb.report.groups`, so that they are consistent. A run that was interrupted before its first validation is listed
as not measured and is not plotted.
"""

from depthcb.report.figure import figure, write_png
from depthcb.report.page import read_html, write_html
from depthcb.report.terminal import print_bars, print_runs

__all__ = ["figure", "print_bars", "print_runs", "read_html", "write_html", "write_png"]
