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
#: The order of the help, in which people come to need them; those of other packages follow.
ORDER = ("demo", "fit", "show", "report", "compare", "study", "figure", "restore", "advise", "recipes", "backbones")


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
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
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
    figure = commands.add_parser(
        "figure",
        help="draw a figure of runs for a paper",
        description="Draw a figure for a paper, and write the numbers that it shows beside it as CSV.",
    )
    figure.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help=run_dir)
    figure.add_argument("--kind", choices=("profile", "evolution", "pair", "study"), default="profile",
                        help="latest profiles; all validations; a pair with its null and step ratios; the slopes of "
                        "many pairs (default: %(default)s)")  # fmt: skip
    figure.add_argument("--output", type=Path, required=True, metavar="FILE", help="the figure")
    figure.add_argument("--format", choices=("pdf", "svg", "png"), help="default: by FILE's suffix")
    figure.add_argument("--columns", type=int, choices=(1, 2), default=2, help="3.3 or 6.9 inches wide (default: 2)")
    figure.add_argument(
        "--measure", metavar="NAME", help="such as cka_normalized (default: the first that was recorded)"
    )
    figure.set_defaults(run=_figure, extra="report")
    workspace = commands.add_parser(
        "workspace",
        help="save a W&B workspace view of the depth profiles",
        description="Save a workspace view 'Depth profiles' in a W&B project and print its URL.",
    )
    workspace.add_argument("--entity", required=True, help="the W&B user or team")
    workspace.add_argument("--project", required=True, help="the W&B project; it must exist")
    workspace.add_argument("--dry-run", action="store_true", help="print the view's specification without saving it")
    workspace.set_defaults(run=_workspace, extra="workspace")
    commands._choices_actions.sort(key=lambda listed: (*ORDER, listed.dest).index(listed.dest))
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


def _figure(args: argparse.Namespace) -> None:
    from depthcb.report import write_figure
    from depthcb.run import read_runs

    more = {"format": args.format, "columns": args.columns, "measure": args.measure}
    try:
        beside = write_figure(read_runs(*args.runs), args.kind, args.output, **more)
    except OSError as error:
        raise ValueError(
            f"--output {args.output} cannot be written ({error.strerror}): choose another file."
        ) from error
    print(printable(f"{args.output}, its numbers in {beside}"))


def _workspace(args: argparse.Namespace) -> None:
    from depthcb.workspace import save, specification

    if args.dry_run:
        print(specification(args.entity, args.project))
    else:
        print(save(args.entity, args.project))
