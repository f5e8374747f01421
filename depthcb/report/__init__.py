"""Reports on finished runs: figures, a self-contained HTML page, and tables in the terminal.

All reports are based on the runs' records, and share the pairing of runs and the text of verdicts in
`depthcb.report.groups`, so that they are consistent. A run that was interrupted before its first validation is listed
as not measured and is not plotted.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from depthcb.report.page import read_html as read_html
    from depthcb.report.page import write_html as write_html
    from depthcb.report.paper_figure import write_figure as write_figure
    from depthcb.report.static_figure import figure as figure
    from depthcb.report.static_figure import write_png as write_png
    from depthcb.report.terminal import print_bars as print_bars
    from depthcb.report.terminal import print_runs as print_runs

_MODULES = {
    "figure": "static_figure",
    "print_bars": "terminal",
    "print_runs": "terminal",
    "read_html": "page",
    "write_figure": "paper_figure",
    "write_html": "page",
    "write_png": "static_figure",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:  # lazily: the terminal needs neither matplotlib nor plotly
    if name in _MODULES:
        return getattr(importlib.import_module(f"depthcb.report.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'depthcb.report' has no attribute {name!r}")
