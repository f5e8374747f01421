"""The commands that need the recipes: demo, fit, compare, pretrain, study, recipes and backbones."""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

from depthcb_recipes.machine import use_threads_politely
from depthcb_recipes.studies import commands as study


def add_commands(commands: Any) -> None:
    """Adds them to the ``depthcb`` command.

    Args:
        commands: What `argparse.ArgumentParser.add_subparsers` returned.
    """
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
    demo.set_defaults(run=_demo)
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
    compare.set_defaults(run=_compare)
    fit = commands.add_parser(
        "fit",
        help="train any objective on any backbone, as a YAML file says",
        description="Options are those of LightningCLI: --config FILE, --model.backbone NAME, --trainer.max_steps N …",
        add_help=False,
    )
    fit.set_defaults(run=_fit, takes_options=True)
    study.add_parser(commands)
    pretrain = commands.add_parser(
        "pretrain",
        help="pretrain a small model of the mini zoo on this machine, about 6 minutes",
        description="Trains a small model on the text of the installed Python libraries and keeps it in the cache.",
    )
    pretrain.add_argument("--minutes", type=_minutes, default=6.0, help="for its steps (default: %(default)g)")
    pretrain.add_argument("--model", required=True, help="a name out of `depthcb backbones`, such as gpt2-mini")
    pretrain.set_defaults(run=_pretrain)
    recipes = commands.add_parser("recipes", help="list the objectives and their YAML files")
    recipes.set_defaults(run=_recipes)
    backbones = commands.add_parser("backbones", help="list the networks to start from, or describe some")
    backbones.add_argument("names", nargs="*", metavar="NAME", help="a name, hub id or local folder")
    backbones.set_defaults(run=_backbones)


def _minutes(text: str) -> float:
    """A number of minutes, as the parser takes it."""
    minutes = float(text)
    if not 0 < minutes < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: give a number above 0")
    return minutes


def _demo(args: argparse.Namespace) -> None:
    started = time.monotonic()  # what importing takes is the user's time too
    use_threads_politely()
    from rich.console import Console

    from depthcb_recipes.demo.demo import run_demo
    from depthcb_recipes.demo.sizes import MINUTES, QUICK_MINUTES, chosen

    sizes = chosen(args.sizes, quick=args.quick, backbone=args.backbone, steps=args.steps, precision=args.precision)
    usual = QUICK_MINUTES if args.quick else MINUTES
    minutes = usual if args.minutes is None else args.minutes
    run_demo(sizes, args.out, Console(), minutes=minutes, started=started)


def _compare(args: argparse.Namespace) -> None:
    use_threads_politely()
    from rich.console import Console

    from depthcb_recipes.compare_backbones import compare_backbones

    compare_backbones(args.reference, args.model, args.text, args.rows, args.json, Console())


def _fit(args: argparse.Namespace) -> None:
    use_threads_politely()
    from depthcb_recipes.fit import run_fit

    run_fit(args.options)


def _pretrain(args: argparse.Namespace) -> None:
    use_threads_politely()
    from depthcb_recipes.stopping import stoppable

    told = f"Stopped; nothing is kept. `depthcb pretrain --model {args.model}` starts again."
    with stoppable(lambda: print(told, flush=True)):
        from depthcb_recipes.backbones.pretraining import pretrain
        from depthcb_recipes.backbones.zoo import ZOO

        if args.model not in ZOO:
            raise ValueError(f"{args.model!r} is not in the mini zoo: take one of {', '.join(ZOO)}.")
        print(pretrain(args.model, ZOO[args.model], args.minutes))


def _recipes(args: argparse.Namespace) -> None:
    from rich.console import Console

    from depthcb_recipes.backbones.catalogue import objectives_table

    Console().print(objectives_table())


def _backbones(args: argparse.Namespace) -> None:
    from rich.console import Console

    from depthcb_recipes.backbones.catalogue import backbones_table

    Console().print(backbones_table(args.names))
