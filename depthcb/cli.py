"""The front door: every ``depthcb`` command."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import depthcb
from depthcb.machine import use_threads_politely
from depthcb.study import cli as study


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; bad input gives one line on stderr and exit code 2."""
    args, options = _parser().parse_known_args(argv)
    if options and args.command != "fit":
        _parser().error(f"unrecognized arguments: {' '.join(options)}")
    args.options = options
    if args.command in ("demo", "fit", "compare", "pretrain"):
        use_threads_politely()
    try:
        return COMMANDS[args.command](args)
    except ModuleNotFoundError as error:
        extra = "workspace" if args.command == "workspace" else "demo"
        print(f"depthcb {args.command} needs {error.name}: pip install 'depthcb[{extra}]'.", file=sys.stderr)
    except ValueError as error:
        print(f"depthcb {args.command}: {error}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="depthcb", description="Where in depth fine-tuning changes a network, and whether the step size is why."
    )
    parser.add_argument("--version", action="version", version=f"depthcb {depthcb.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="fine-tune a real model four times and compare its depth profiles",
        description="Fine-tunes a pretrained model on code with AdamW and SGD, each standard and under equal-step.",
    )
    demo.add_argument("--quick", action="store_true", help="a 6-layer encoder, about 1 minute instead of 7")
    demo.add_argument("--minutes", type=_minutes, help="what the whole may take (default: 7, with --quick 1)")
    demo.add_argument("--sizes", metavar="NAME", help="exactly this size, such as smollm2-3: no timing decides")
    demo.add_argument("--backbone", help="another backbone: smollm2-135m, minilm, a hub id or a local folder")
    demo.add_argument("--steps", type=int, help="optimizer steps of each fit")
    demo.add_argument("--precision", default="auto", help="as Lightning's Trainer takes it (default: %(default)s)")
    demo.add_argument("--out", type=Path, default=Path("depthcb-demo"), help="where files go (default: %(default)s)")
    compare = commands.add_parser(
        "compare",
        help="the depth profile between two models or checkpoints",
        description="Measures how far each layer of model B is from model A on a text, without training.",
    )
    compare.add_argument("reference", metavar="A", help="the pretrained side: a backbone name, hub id or folder")
    compare.add_argument("model", metavar="B", help="the fine-tuned side: the same")
    compare.add_argument("--text", type=Path, help="a text file to probe with (default: the Python library's code)")
    compare.add_argument("--rows", default="mean", choices=("mean", "tokens", "last", "first"), help="what a row is")
    compare.add_argument("--json", type=Path, help="also write the profiles to this file")
    commands.add_parser(
        "fit",
        help="train any objective on any backbone, as a YAML file says",
        description="Options are those of LightningCLI: --config FILE, --model.backbone NAME, --trainer.max_steps N …",
        add_help=False,
    )
    report = commands.add_parser(
        "report",
        help="one page on a run, or on several side by side",
        description="Writes one self-contained HTML page: profiles, step ratios, slopes, numbers and provenance.",
    )
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="a run's folder, or one that holds some")
    report.add_argument("--out", type=Path, default=Path("depthcb-report.html"), help="the page (default: %(default)s)")
    show = commands.add_parser(
        "show", help="the latest profile of a run in the terminal", description="Prints a bar a layer."
    )
    show.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="a run's folder, or one that holds some")
    workspace = commands.add_parser(
        "workspace",
        help="a view of the depth profiles in a W&B project",
        description="Saves a workspace view 'Depth profiles' in a W&B project and prints its address.",
    )
    workspace.add_argument("--entity", required=True, help="the W&B user or team")
    workspace.add_argument("--project", required=True, help="the W&B project; it must exist")
    workspace.add_argument("--dry-run", action="store_true", help="print the view's specification and save nothing")
    study.add_parser(commands)
    pretrain = commands.add_parser(
        "pretrain",
        help="pretrain a small model of the mini zoo on this machine, about 6 minutes",
        description="Trains a small model on the text of the installed Python libraries and keeps it in the cache.",
    )
    pretrain.add_argument("--minutes", type=_minutes, default=6.0, help="for its steps (default: %(default)g)")
    pretrain.add_argument("--model", required=True, help="a name out of `depthcb backbones`, such as gpt2-mini")
    commands.add_parser("recipes", help="list the objectives and their YAML files")
    backbones = commands.add_parser("backbones", help="list the networks to start from, or describe some")
    backbones.add_argument("names", nargs="*", metavar="NAME", help="a name, hub id or local folder")
    return parser


def _minutes(text: str) -> float:
    """A number of minutes, as the parser takes it."""
    minutes = float(text)
    if not 0 < minutes < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: give a number above 0")
    return minutes


def _demo(args: argparse.Namespace) -> int:
    started = time.monotonic()  # what importing takes is the user's time too
    from rich.console import Console

    from depthcb_recipes.demo import run_demo
    from depthcb_recipes.demo_sizes import MINUTES, QUICK_MINUTES, chosen

    sizes = chosen(args.sizes, quick=args.quick, backbone=args.backbone, steps=args.steps, precision=args.precision)
    usual = QUICK_MINUTES if args.quick else MINUTES
    minutes = usual if args.minutes is None else args.minutes
    run_demo(sizes, args.out, Console(), minutes=minutes, started=started)
    return 0


def _compare(args: argparse.Namespace) -> int:
    from rich.console import Console

    from depthcb_recipes.compare import compare_backbones

    compare_backbones(args.reference, args.model, args.text, args.rows, args.json, Console())
    return 0


def _fit(args: argparse.Namespace) -> int:
    from depthcb_recipes.fit import run_fit

    run_fit(args.options)
    return 0


def _report(args: argparse.Namespace) -> int:
    from depthcb.report import write_html
    from depthcb.run import read_runs

    try:
        write_html(read_runs(*args.runs), args.out)
    except OSError as error:
        raise ValueError(f"--out {args.out} cannot be written ({error.strerror}): name another file.") from error
    print(f"{args.out} (open it in a browser)")
    return 0


def _show(args: argparse.Namespace) -> int:
    from rich.console import Console

    from depthcb.report import print_bars
    from depthcb.run import read_runs

    for run in read_runs(*args.runs):
        print_bars(run, Console())
    return 0


def _workspace(args: argparse.Namespace) -> int:
    from depthcb.workspace import save, specification

    if args.dry_run:
        print(specification(args.entity, args.project))
    else:
        print(save(args.entity, args.project))
    return 0


def _pretrain(args: argparse.Namespace) -> int:
    from depthcb.stopping import stoppable

    told = f"Stopped; nothing is kept. `depthcb pretrain --model {args.model}` starts again."
    with stoppable(lambda: print(told, flush=True)):
        from depthcb_recipes.mini_zoo import load_or_pretrain

        print(load_or_pretrain(args.model, args.minutes))
    return 0


def _recipes(args: argparse.Namespace) -> int:
    from rich.console import Console

    from depthcb_recipes.catalogue import objectives_table

    Console().print(objectives_table())
    return 0


def _backbones(args: argparse.Namespace) -> int:
    from rich.console import Console

    from depthcb_recipes.catalogue import backbones_table

    Console().print(backbones_table(args.names))
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "demo": _demo,
    "fit": _fit,
    "compare": _compare,
    "report": _report,
    "show": _show,
    "workspace": _workspace,
    "study": study.run_task,
    "pretrain": _pretrain,
    "recipes": _recipes,
    "backbones": _backbones,
}
