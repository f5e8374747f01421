"""The ``depthcb`` command line: the library's own subcommands and those registered by other packages."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

import depthcb
from depthcb.style import printable

#: Entry point group for functions that add subcommands; each is called with the return value of ``add_subparsers``.
COMMANDS = "depthcb.commands"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; invalid input prints one line to stderr and returns exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal or pipe in another encoding than UTF-8 shows "?" instead
            stream.reconfigure(errors="replace")
    args, options = parser().parse_known_args(argv)
    if options and not args.takes_options:
        parser().error(f"unrecognized arguments: {' '.join(options)}")
    args.options = options
    try:
        return int(args.run(args) or 0)
    except ModuleNotFoundError as error:
        print(f"depthcb {args.command} needs {error.name}: pip install 'depthcb[{args.extra}]'.", file=sys.stderr)
    except ValueError as error:
        print(printable(f"depthcb {args.command}: {error}"), file=sys.stderr)
    return 2


def parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands, those of other packages too."""
    parser = argparse.ArgumentParser(
        prog="depthcb",
        description="Measure where in depth fine-tuning changes a network, and whether step size explains it.",
    )
    parser.add_argument("--version", action="version", version=f"depthcb {depthcb.__version__}")
    parser.set_defaults(extra="demo", takes_options=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for entry in entry_points(group=COMMANDS):
        entry.load()(commands)
    report = commands.add_parser(
        "report",
        help="write an HTML report on one or more runs",
        description="Write one self-contained HTML page: profiles, step ratios, slopes, numbers and provenance.",
    )
    run_dir = "the folder of a run, or one that contains runs"
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help=run_dir)
    report.add_argument("--out", type=Path, default=Path("depthcb-report.html"), help="the page (default: %(default)s)")
    report.set_defaults(run=_report)
    show = commands.add_parser(
        "show", help="print the latest profile of a run", description="Print the latest profile as one bar per layer."
    )
    show.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help=run_dir)
    show.set_defaults(run=_show)
    workspace = commands.add_parser(
        "workspace",
        help="save a W&B workspace view of the depth profiles",
        description="Save a workspace view 'Depth profiles' in a W&B project and print its URL.",
    )
    workspace.add_argument("--entity", required=True, help="the W&B user or team")
    workspace.add_argument("--project", required=True, help="the W&B project; it must exist")
    workspace.add_argument("--dry-run", action="store_true", help="print the view's specification without saving it")
    workspace.set_defaults(run=_workspace, extra="workspace")
    return parser


def _report(args: argparse.Namespace) -> None:
    from depthcb.report import write_html
    from depthcb.run import read_runs

    try:
        write_html(read_runs(*args.runs), args.out)
    except OSError as error:
        raise ValueError(f"--out {args.out} cannot be written ({error.strerror}): choose another file.") from error
    print(printable(f"{args.out} (open it in a browser)"))


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
