"""What ``depthcb advise`` does."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from depthcb.advice import DRAWS, LAST, RANDOM, RULES, Proposal, affordable, parse_budget, propose, sizes
from depthcb.advice_formats import as_dict
from depthcb.run import Run, read_runs
from depthcb.style import printable
from depthcb_recipes.advice.arms import Arm, Mode, arms, parse_modes
from depthcb_recipes.advice.printed import print_proposals, print_trained
from depthcb_recipes.advice.source import fit_command, training_named, training_of, without_a_run
from depthcb_recipes.advice.trained import Trained, trained_table
from depthcb_recipes.studies.commands import run_configs, writing
from depthcb_recipes.studies.grid import RunConfig
from depthcb_recipes.studies.store import Store


def advise(args: argparse.Namespace) -> int:
    """Prints what the rules propose; with ``--test`` trains it, and prints what the trainings say."""
    share, wanted, modes = parse_budget(args.budget), _rules(args.rules), parse_modes(args.modes)
    source = _of_run(args) if args.config is None else _of_model(args, wanted)
    run = source.run
    layers = len(sizes(run))
    args.draws = layers // affordable(layers, share) if args.draws is None else args.draws
    if args.test and min(args.seeds, args.draws, args.lora_rank) < 1:
        raise ValueError("--seeds, --draws and --lora-rank must be at least 1.")
    found = source.proposals(share, wanted)
    console = Console(width=max(Console().width, 180))  # no figure is truncated, in a file either
    print_proposals(run, found, share, console)
    written = {"run": run.name, "budget": share, "rules": [_as_dict(run, p) for p in found]}
    status = 0
    if args.test:
        status, tables, page = _test(args, source, share, wanted, modes)
        print(printable(f"{page} (open it in a browser)"))
        print_trained(tables, console)
        written["tested"] = [dataclasses.asdict(table) | {"conclusion": str(table.conclusion)} for table in tables]
    if args.json is not None:
        with writing("--json", args.json):
            args.json.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    return status


@dataclass(frozen=True)
class Source:
    """What is advised on.

    Args:
        run: The record that rules read: of a run, or of the first steps of a training.
        training: Returns the training that a test repeats.
        name: Of the folder of a test's trainings.
        fit: The command that makes a finished run, where the record is of none; else empty.
    """

    run: Run
    training: Callable[[], RunConfig]
    name: str
    fit: str = ""

    def proposals(self, share: float, wanted: Sequence[str], draws: Sequence[int] = range(DRAWS)) -> list[Proposal]:
        """Returns what the wanted rules propose."""
        found = [p for p in propose(self.run, share, draws) if p.rule.name in wanted]
        return without_a_run(found, self.fit) if self.fit else found


def _of_run(args: argparse.Namespace) -> Source:
    folder = Path(args.source)
    if args.options:
        raise ValueError(f"unrecognized arguments: {' '.join(args.options)}")
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is not the folder of a run; for a model, name what it would be trained on: --config masked_lm, "
            "or another one of `depthcb recipes`."
        )
    runs = read_runs(folder)
    if len(runs) > 1:
        raise ValueError(f"{folder} has {len(runs)} runs ({', '.join(r.name for r in runs[:3])}, ...): name one.")
    return Source(runs[0], lambda: training_of(folder), folder.resolve().name)


def _of_model(args: argparse.Namespace, wanted: Sequence[str]) -> Source:
    from depthcb_recipes.advice.start import first_steps  # slow: it imports torch

    base = training_named(args.source, args.config, args.options)
    run, training = first_steps(dataclasses.replace(base, threads=args.threads, gpus=args.gpus), wanted)
    fit = fit_command(args.source, args.config, args.options)
    return Source(run, lambda: training, f"{Path(base.model).name}-{base.objective}", fit)


def _rules(text: str | None) -> list[str]:
    """Returns the names of the rules to ask; random sets and the last layers are always among them."""
    asked = list(RULES) if text is None else [name.strip() for name in text.split(",")]
    unknown = [name for name in asked if name not in RULES]
    if unknown:
        raise ValueError(f"--rules: there is no rule {unknown[0]!r}: use some of {', '.join(RULES)}.")
    return [name for name in RULES if name in (*asked, LAST, RANDOM)]


def _as_dict(run: Run, proposal: Proposal) -> dict[str, Any]:
    depth = run.record("DepthProfile")
    assert depth is not None
    forms = [as_dict(run.layers, chosen, depth.settings["linear"]) for chosen in proposal.sets]
    rule = proposal.rule
    return {"rule": rule.name, "needs": rule.cost, "sets": forms, "missing": proposal.missing}


def _test(
    args: argparse.Namespace, source: Source, share: float, wanted: Sequence[str], modes: Sequence[Mode]
) -> tuple[int, list[Trained], Path]:
    """Trains what is missing, and returns the exit status, one table per mode, and the page."""
    if "lora" in modes and importlib.util.find_spec("peft") is None:
        raise ModuleNotFoundError("peft is not installed", name="peft")
    from depthcb_recipes.advice.page import write_tested  # plotly is slow to import

    base = source.training()
    options = dict(base.options) | ({} if args.steps is None else {"trainer.max_steps": args.steps})
    base = dataclasses.replace(base, threads=args.threads, gpus=args.gpus, options=options)
    proposals = source.proposals(share, wanted, range(args.seeds * args.draws))
    planned = arms(base, proposals, len(sizes(source.run)), modes, args.seeds, args.draws, args.lora_rank)
    store = Store(args.out or Path("depthcb-advice") / source.name)
    status = run_configs(args, _distinct(planned), store, "`depthcb advise` with the same arguments")
    tables = [trained_table(proposals, [a for a in planned if a.mode == mode], store) for mode in modes]
    title = f"Which layers to train: {source.run.name}"
    return status, tables, write_tested(store.root, base.hash, share, tables, title)


def _distinct(planned: Sequence[Arm]) -> list[RunConfig]:
    """Returns the trainings in order, each once: rules that choose the same layers share theirs."""
    return list({arm.config.hash: arm.config for arm in planned}.values())
