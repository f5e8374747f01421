"""The ``depthcb`` command: what needs the library alone, and what other packages add to it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

import depthcb

#: Entry points of this group are functions that add commands: they get what ``add_subparsers`` returned.
COMMANDS = "depthcb.commands"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; bad input gives one line on stderr and exit code 2."""
    args, options = _parser().parse_known_args(argv)
    if options and not args.takes_options:
        _parser().error(f"unrecognized arguments: {' '.join(options)}")
    args.options = options
    try:
        return int(args.run(args) or 0)
    except ModuleNotFoundError as error:
        print(f"depthcb {args.command} needs {error.name}: pip install 'depthcb[{args.extra}]'.", file=sys.stderr)
    except ValueError as error:
        print(f"depthcb {args.command}: {error}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="depthcb", description="Where in depth fine-tuning changes a network, and whether the step size is why."
    )
    parser.add_argument("--version", action="version", version=f"depthcb {depthcb.__version__}")
    parser.set_defaults(extra="demo", takes_options=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for entry in entry_points(group=COMMANDS):
        entry.load()(commands)
    report = commands.add_parser(
        "report",
        help="one page on a run, or on several side by side",
        description="Writes one self-contained HTML page: profiles, step ratios, slopes, numbers and provenance.",
    )
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="a run's folder, or one that holds some")
    report.add_argument("--out", type=Path, default=Path("depthcb-report.html"), help="the page (default: %(default)s)")
    report.set_defaults(run=_report)
    show = commands.add_parser(
        "show", help="the latest profile of a run in the terminal", description="Prints one bar per layer."
    )
    show.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="a run's folder, or one that holds some")
    show.set_defaults(run=_show)
    workspace = commands.add_parser(
        "workspace",
        help="a view of the depth profiles in a W&B project",
        description="Saves a workspace view 'Depth profiles' in a W&B project and prints its address.",
    )
    workspace.add_argument("--entity", required=True, help="the W&B user or team")
    workspace.add_argument("--project", required=True, help="the W&B project; it must exist")
    workspace.add_argument("--dry-run", action="store_true", help="print the view's specification and save nothing")
    workspace.set_defaults(run=_workspace, extra="workspace")
    return parser


def _report(args: argparse.Namespace) -> None:
    from depthcb.report import write_html
    from depthcb.run import read_runs

    try:
        write_html(read_runs(*args.runs), args.out)
    except OSError as error:
        raise ValueError(f"--out {args.out} cannot be written ({error.strerror}): name another file.") from error
    print(f"{args.out} (open it in a browser)")


def _show(args: argparse.Namespace) -> None:
    from rich.console import Console

    from depthcb.report import print_bars
    from depthcb.run import read_runs

    for run in read_runs(*args.runs):
        print_bars(run, Console())


def _workspace(args: argparse.Namespace) -> None:
    from depthcb.workspace import save, specification

    if args.dry_run:
        print(specification(args.entity, args.project))
    else:
        print(save(args.entity, args.project))
