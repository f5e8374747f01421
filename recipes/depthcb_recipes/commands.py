"""The subcommands provided by the recipes: demo, fit, compare, restore, pretrain, study, advise, recipes, backbones."""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

from depthcb_recipes.advice import parser as advice
from depthcb_recipes.machine import use_threads_politely
from depthcb_recipes.studies import parser as study


def add_commands(commands: Any) -> None:
    """Adds the subcommands to the ``depthcb`` command.

    Args:
        commands: The return value of `argparse.ArgumentParser.add_subparsers`.
    """
    demo = commands.add_parser(
        "demo",
        help="fine-tune a real model four times and compare its depth profiles",
        description="Fine-tunes a pretrained model on code with AdamW and SGD, each standard and with equal-step.",
    )
    demo.add_argument("--quick", action="store_true", help="use a 6-layer encoder; takes about 1 minute instead of 7")
    demo.add_argument("--minutes", type=_minutes, help="time budget (default: 7, or 1 with --quick)")
    demo.add_argument("--sizes", metavar="NAME", help="use exactly this size, such as smollm2-3")
    demo.add_argument("--backbone", help="backbone: smollm2-135m, minilm, a hub id or a local folder")
    demo.add_argument("--steps", type=int, help="optimizer steps per fit")
    demo.add_argument("--precision", default="auto", help="as Lightning's Trainer takes it (default: %(default)s)")
    demo.add_argument("--out", type=Path, default=Path("depthcb-demo"), help="output folder (default: %(default)s)")
    demo.set_defaults(run=_demo)
    compare = commands.add_parser(
        "compare",
        help="compute the depth profile between two models, or of a run's checkpoints",
        description="Measures how much each layer's output differs between models A and B on a text, without training. "
        "Several B are taken as the checkpoints of one run, in the order of their steps.",
    )
    compare.add_argument("reference", metavar="A", help="the pretrained model: a name, hub id or folder")
    compare.add_argument(
        "models",
        metavar="B",
        nargs="+",
        help="the fine-tuned model: a name, hub id, folder, .ckpt or .safetensors file; or a folder of these",
    )
    compare.add_argument("--text", type=Path, help="text file to probe with (default: Python library source)")
    compare.add_argument("--rows", default="mean", choices=("mean", "tokens", "last", "first"), help="what a row is")
    compare.add_argument("--json", type=Path, help="also write the profiles to this JSON file")
    compare.add_argument("--out", type=Path, help="also leave a record here, for `depthcb report` and `depthcb show`")
    compare.add_argument("--backbone", metavar="NAME", help="what the weights in files go into (default: A)")
    compare.add_argument("--module", metavar="FILE:CLASS", help="a class that the weights in files go into instead")
    compare.add_argument("--tokenizer", metavar="NAME", help="the model whose tokenizer to use (default: A)")
    compare.add_argument("--stream", action="store_true", help="read weights layer by layer, to need little memory")
    compare.set_defaults(run=_compare)
    restore = commands.add_parser(
        "restore",
        help="measure what the change of each layer is worth to the loss",
        description="Puts each layer of model B back to its weights in A, and measures the language-model loss.",
    )
    restore.add_argument("reference", metavar="A", help="the pretrained model: a name, hub id or folder")
    restore.add_argument("model", metavar="B", help="the fine-tuned model: a name, hub id or folder")
    restore.add_argument("--text", type=Path, help="text file for the loss (default: Python library source)")
    restore.add_argument("--json", type=Path, help="also write the figures to this JSON file")
    restore.set_defaults(run=_restore)
    fit = commands.add_parser(
        "fit",
        help="train any objective on any backbone, configured by a YAML file",
        description="Takes the options of LightningCLI: --config FILE, --model.backbone NAME, --trainer.max_steps N …",
        add_help=False,
    )
    fit.set_defaults(run=_fit, takes_options=True)
    study.add_parser(commands)
    advice.add_parser(commands)
    pretrain = commands.add_parser(
        "pretrain",
        help="pretrain a small model of the mini zoo on this machine, about 6 minutes",
        description="Trains a small model on the source of the Python standard library and caches it on disk.",
    )
    pretrain.add_argument(
        "--minutes", type=_minutes, default=6.0, help="time budget of the training steps (default: %(default)g)"
    )
    pretrain.add_argument("--model", required=True, help="a name listed by `depthcb backbones`, such as gpt2-mini")
    pretrain.set_defaults(run=_pretrain)
    recipes = commands.add_parser("recipes", help="list the objectives and their YAML files")
    recipes.set_defaults(run=_recipes)
    backbones = commands.add_parser("backbones", help="list the available backbones, or describe the given ones")
    backbones.add_argument("names", nargs="*", metavar="NAME", help="a name, hub id or local folder")
    backbones.set_defaults(run=_backbones)


def _minutes(text: str) -> float:
    """Parses a positive number of minutes."""
    minutes = float(text)
    if not 0 < minutes < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: must be above 0")
    return minutes


def _demo(args: argparse.Namespace) -> None:
    started = time.monotonic()  # before the imports, whose duration counts too
    use_threads_politely()
    from rich.console import Console

    from depthcb_recipes.demo.demo import run_demo
    from depthcb_recipes.demo.sizes import MINUTES, QUICK_MINUTES, chosen

    sizes = chosen(args.sizes, quick=args.quick, backbone=args.backbone, steps=args.steps, precision=args.precision)
    usual = QUICK_MINUTES if args.quick else MINUTES
    minutes = usual if args.minutes is None else args.minutes
    run_demo(sizes, args.out, Console(), minutes=minutes, started=started, replicate=not args.quick)


def _compare(args: argparse.Namespace) -> None:
    use_threads_politely()
    from rich.console import Console

    from depthcb_recipes.compare_backbones import Opening, compare_backbones

    opening = Opening(args.backbone, args.module, args.stream)
    more = {"out": args.out, "tokenizer": args.tokenizer, "opening": opening}
    compare_backbones(args.reference, args.models, args.text, args.rows, args.json, Console(), **more)


def _restore(args: argparse.Namespace) -> None:
    use_threads_politely()
    from rich.console import Console

    from depthcb_recipes.restore_backbones import restore_backbones

    console = Console(width=max(Console().width, 150))  # no figure is truncated, in a file either
    restore_backbones(args.reference, args.model, args.text, args.json, console)


def _fit(args: argparse.Namespace) -> None:
    use_threads_politely()
    from depthcb_recipes.fit import run_fit

    run_fit(args.options)


def _pretrain(args: argparse.Namespace) -> None:
    use_threads_politely()
    from depthcb_recipes.stopping import stoppable

    message = f"Stopped; nothing was saved. `depthcb pretrain --model {args.model}` starts over."
    with stoppable(lambda: print(message, flush=True)):
        from depthcb_recipes.backbones.pretraining import pretrain
        from depthcb_recipes.backbones.zoo import ZOO

        if args.model not in ZOO:
            raise ValueError(f"{args.model!r} is not in the mini zoo: use one of {', '.join(ZOO)}.")
        print(pretrain(args.model, ZOO[args.model], args.minutes))


def _recipes(args: argparse.Namespace) -> None:
    from rich.console import Console

    from depthcb_recipes.backbones.catalogue import objectives_table

    Console().print(objectives_table())


def _backbones(args: argparse.Namespace) -> None:
    from rich.console import Console

    from depthcb_recipes.backbones.catalogue import backbones_table

    table, problems = backbones_table(args.names)
    if table.row_count:
        Console().print(table)
    if problems:
        raise ValueError(" ".join(problems))
