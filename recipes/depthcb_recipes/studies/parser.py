"""The parser of ``depthcb study``; separate from what its commands do, whose imports are slow."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """Adds ``depthcb study`` and its subcommands."""
    study = commands.add_parser(
        "study",
        help="run a grid of fits, and decide the paper's claims by them",
        description="A study is a grid of runs in a YAML file; all of its state is in its folder.",
    )
    study.set_defaults(run=_run_task)
    tasks = study.add_subparsers(dest="task", required=True)
    run = tasks.add_parser("run", help="run what is missing", description="Runs what has no result yet.")
    _common(run)
    run.add_argument("--engine", choices=("pool", "ray"), default="pool", help="this machine, or a Ray cluster")
    run.add_argument("--jobs", type=int, help="simultaneous runs (default: as many as fit)")
    run.add_argument("--shard", default="1/1", metavar="I/N", help="the i-th of n parts, for job arrays")
    run.add_argument("--retry-failed", action="store_true", help="run failed runs again")
    status = tasks.add_parser("status", help="how many runs are done", description="Counts the runs by status.")
    _common(status)
    table = tasks.add_parser(
        "table", help="one row per model and objective", description="Prints it, or exports the pairs of runs."
    )
    _by(_common(table))
    table.add_argument("--export", type=Path, action="append", default=[], help="also write it: .csv or .parquet")
    _by(_common(tasks.add_parser("claims", help="what the runs decide", description="Decides the paper's claims.")))
    told = "Prints what the paper reports beside what this study found, and how their methods differ."
    _by(_common(tasks.add_parser("compare-paper", help="what the paper reports beside it", description=told)))
    told = "Downloads all models and data sets of the study from the hub; its runs then need no network."
    _common(tasks.add_parser("fetch", help="download what the runs need", description=told))
    told = "Prints the memory and time of the runs, by a short calibration on this machine."
    plan = tasks.add_parser("plan", help="memory and time, before anything starts", description=told)
    _common(plan)
    plan.add_argument("--gpu-memory", type=float, metavar="GB", help="of each GPU (default: this machine's, or 80)")
    report = tasks.add_parser("report", help="one page on the study", description="Writes one self-contained page.")
    _by(_common(report))
    report.add_argument("--page", type=Path, help="the page (default: report.html in the study's folder)")
    report.add_argument("--wandb", metavar="PROJECT", help="also log one W&B run per model and objective")


def _run_task(args: argparse.Namespace) -> int:
    from depthcb_recipes.studies.commands import run_task

    return run_task(args)


def _by(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--by", metavar="MEASURE", help="the measure that decides (default: as the study says)")


def _common(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument(
        "study", help="a YAML file, or the name of a bundled study (paper, paper-ours, paper-sgd, mini, mini-smoke)"
    )
    parser.add_argument("--out", type=Path, help="the study's folder (default: depthcb-studies/NAME)")
    return parser
