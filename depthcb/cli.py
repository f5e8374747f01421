"""The front door: ``depthcb demo`` and ``depthcb compare``."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import depthcb


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; bad input gives one line on stderr and exit code 2."""
    args = _parser().parse_args(argv)
    try:
        command = {"demo": _demo, "compare": _compare}[args.command]
        return command(args)
    except ModuleNotFoundError as error:
        print(f"depthcb {args.command} needs {error.name}: pip install 'depthcb[demo]'.", file=sys.stderr)
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
    demo.add_argument("--backbone", help="another backbone: smollm2-135m, minilm, a hub id or a local folder")
    demo.add_argument("--steps", type=int, help="optimizer steps of each fit")
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
    return parser


def _demo(args: argparse.Namespace) -> int:
    from rich.console import Console

    from recipes.demo import QUICK, Settings, run_demo

    settings = QUICK if args.quick else Settings()
    if args.backbone is not None:
        settings = dataclasses.replace(settings, backbone=args.backbone)
    if args.steps is not None:
        every = max(1, min(settings.validate_every, args.steps // 2))
        settings = dataclasses.replace(settings, steps=args.steps, validate_every=every)
    run_demo(settings, args.out, Console())
    return 0


def _compare(args: argparse.Namespace) -> int:
    from rich.console import Console

    from recipes.compare import compare_backbones

    compare_backbones(args.reference, args.model, args.text, args.rows, args.json, Console())
    return 0
