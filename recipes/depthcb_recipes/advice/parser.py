"""The command line of ``depthcb advise``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """Adds ``depthcb advise``."""
    advise = commands.add_parser(
        "advise",
        help="propose which layers to train within a budget, and test it by training",
        description="Prints the layers that several named rules choose from a run's record, or from the first steps "
        "of a training that has not been made. It concludes nothing unless --test trains the proposals: a depth "
        "profile alone is no placement rule.",
    )
    advise.add_argument(
        "source", metavar="RUN_DIR|MODEL", help="the folder of a run; or a model, as `depthcb fit` takes it"
    )
    about = "what MODEL would be trained on: a configuration as `depthcb fit` takes it, whose options may follow"
    advise.add_argument("--config", metavar="NAME|FILE", help=about)
    advise.add_argument(
        "--budget", default="25%", metavar="N%", help="share of the layers' parameters to train (default: %(default)s)"
    )
    advise.add_argument("--rules", metavar="A,B", help="only these rules, separated by commas")
    advise.add_argument("--json", type=Path, help="also write everything to this JSON file")
    test = advise.add_argument_group("test by training (a run must be of `depthcb fit` or of a study)")
    test.add_argument("--test", action="store_true", help="train what the rules propose, and compare")
    test.add_argument("--modes", default="full,lora", metavar="A,B", help="full, lora (default: %(default)s)")
    test.add_argument("--seeds", type=int, default=4, help="trainings of each proposal (default: %(default)s)")
    test.add_argument("--draws", type=int, help="random sets per seed (default: as many as contain each layer once)")
    test.add_argument("--lora-rank", type=int, default=8, help="rank of the adapters (default: %(default)s)")
    test.add_argument("--steps", type=int, help="optimizer steps (default: those of the run)")
    test.add_argument("--threads", type=int, default=1, help="CPU threads of each training (default: %(default)s)")
    test.add_argument("--gpus", type=int, default=0, help="GPUs of each training (default: %(default)s, the CPU)")
    test.add_argument("--jobs", type=int, help="simultaneous trainings (default: as many as fit)")
    test.add_argument("--out", type=Path, help="folder of the trainings (default: depthcb-advice/NAME)")
    test.add_argument("--engine", choices=("pool", "ray"), default="pool", help="this machine, or a Ray cluster")
    test.add_argument("--shard", default="1/1", metavar="I/N", help="the i-th of n parts, for job arrays")
    test.add_argument("--retry-failed", action="store_true", help="train again what failed")
    advise.set_defaults(run=_advise, extra="demo,lora", takes_options=True)


def _advise(args: argparse.Namespace) -> int:
    from depthcb_recipes.advice.commands import advise

    return advise(args)
