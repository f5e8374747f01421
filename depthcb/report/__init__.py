"""What people look at after a run: figures, one page that needs no network, and tables in the terminal.

All are drawn from the runs' own records. Pairing them and wording the verdict happen once, in `depthcb.report.groups`,
so that they never tell different stories. A run that was interrupted before its first validation is named as not
measured and never drawn.
"""

from depthcb.report.figure import figure, write_png
from depthcb.report.page import read_html, write_html
from depthcb.report.terminal import print_bars, print_runs

__all__ = ["figure", "print_bars", "print_runs", "read_html", "write_html", "write_png"]
