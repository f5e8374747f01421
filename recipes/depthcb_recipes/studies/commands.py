"""``depthcb study run|status|table|claims|report``."""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depthcb_recipes.machine import available_cores
from depthcb_recipes.stopping import stoppable
from depthcb_recipes.studies.grid import RunConfig, read_study
from depthcb_recipes.studies.store import Store, full_disk, seems_running

if TYPE_CHECKING:
    from depthcb_recipes.studies.pool import Engine


def add_parser(commands: Any) -> None:
    """Adds the command and its own commands."""
    study = commands.add_parser(
        "study",
        help="run a grid of fits, and decide the paper's claims by them",
        description="A study is a YAML file with a grid of runs; its folder is all the state there is.",
    )
    study.set_defaults(run=_run_task)
    tasks = study.add_subparsers(dest="task", required=True)
    run = tasks.add_parser("run", help="make the runs that are missing", description="Makes what the folder lacks.")
    _common(run)
    run.add_argument("--engine", choices=("pool", "ray"), default="pool", help="this machine, or a Ray cluster")
    run.add_argument("--jobs", type=int, help="runs at once (default: as many as there is room for)")
    run.add_argument("--shard", default="1/1", metavar="I/N", help="the i-th of n parts, for arrays of jobs")
    run.add_argument("--retry-failed", action="store_true", help="run again what ended without figures")
    status = tasks.add_parser("status", help="how many runs are done", description="Counts the runs by how they ended.")
    _common(status)
    table = tasks.add_parser("table", help="one row per pair of runs", description="Prints the table, or exports it.")
    _common(table)
    table.add_argument("--export", type=Path, action="append", default=[], help="also write it: .csv or .parquet")
    _common(tasks.add_parser("claims", help="what the runs decide", description="Decides the paper's claims C1-C5."))
    report = tasks.add_parser("report", help="one page on the study", description="Writes one self-contained page.")
    _common(report)
    report.add_argument("--page", type=Path, help="the page (default: report.html in the study's folder)")


def _run_task(args: argparse.Namespace) -> int:
    """Runs one of the study's commands."""
    path = _study_file(args.study)
    configs = read_study(path)
    store = Store(args.out or Path("depthcb-studies") / path.stem)
    tasks = {"run": _run, "status": _status, "table": _table, "claims": _claims, "report": _report}
    return tasks[args.task](args, configs, store)


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "study", help="a YAML file, or the name of a bundled study (paper, paper-sgd, mini, mini-smoke)"
    )
    parser.add_argument("--out", type=Path, help="the study's folder (default: depthcb-studies/NAME)")


def _study_file(name: str) -> Path:
    bundled = Path(__file__).parent / f"{name}.yaml"
    return bundled if bundled.is_file() else Path(name)


def _run(args: argparse.Namespace, configs: Sequence[RunConfig], store: Store) -> int:
    from depthcb_recipes.studies.pool import run_study
    from depthcb_recipes.studies.progress import shown

    own = in_turns(shard(configs, args.shard))
    if args.jobs is not None and args.jobs < 1:
        raise ValueError(f"--jobs {args.jobs}: run one at least.")
    if args.retry_failed:
        store.forget_failures(own)
    told = f"Stopped. The same command goes on: `depthcb study run {args.study}`."
    try:
        with stoppable(lambda: print(told, flush=True)):
            engine = _engine(args, own)
            settle_precision(configs, store, engine)
            with shown() as report:
                progress = run_study(fitting(own, engine), store, engine, report)
    except OSError as error:
        if not full_disk(error):
            raise
        raise ValueError(
            f"The disk of {store.root} is full: free some of it and give the same command again. What is done is kept."
        ) from error
    for config in own:
        result = store.result(config)
        if result is not None and result["status"] != "finished":
            print(f"{result['status']}: {config.name}: {result['message']} ({store.folder(config)})")
    print(f"{progress.done} of {len(own)} runs have figures, {progress.failed} ended without.")
    return 0 if progress.done == len(own) else 1


def _engine(args: argparse.Namespace, configs: Sequence[RunConfig]) -> Engine:
    """What makes the runs."""
    if args.engine == "ray":
        from depthcb_recipes.studies.ray import RayEngine

        return RayEngine(args.jobs)
    from depthcb_recipes.studies.pool import Pool

    gpus = _gpus() if any(config.gpus for config in configs) else []
    threads = max(config.threads for config in configs)
    return Pool(args.jobs or max(1, available_cores() // threads), gpus)


def settle_precision(configs: Sequence[RunConfig], store: Store, engine: Engine) -> None:
    """Has the study keep one precision for all its runs on a kind of device: the two of a pair must share it.

    What was chosen is said once, and where this machine would choose otherwise.

    Args:
        configs: The runs; those that name a precision stay as they are.
        store: Where the study's choice is kept.
        engine: Where the runs are made, which decides if nothing is kept yet.
    """
    for device, example in {c.device: c for c in configs if c.precision == "auto" and engine.fits(c)}.items():
        kept = store.precision(device)
        of_device = [config for config in configs if config.device == device]
        if kept and all(store.result(config) for config in of_device):
            continue  # nothing is to be made
        here = engine.precision(example)
        if kept is None:
            older = any(store.result(config) for config in of_device)
            of_old = {"precision": "bf16-mixed", "reason": "the runs that it has already were made in it"}
            kept = store.settle_precision(device, of_old if older else here)
            print(f"Precision {kept['precision']} for the runs on {device}: {kept['reason']}.", flush=True)
        if kept["precision"] != here["precision"]:
            print(
                f"This study keeps precision {kept['precision']} for all its runs on {device}, so that pairs share it; "
                f"{engine.place} would choose {here['precision']}: {here['reason']}.",
                flush=True,
            )


def fitting(configs: Sequence[RunConfig], engine: Engine) -> list[RunConfig]:
    """The runs that can be made here; the others are named.

    Raises:
        ValueError: None can.
    """
    too_large = [config for config in configs if not engine.fits(config)]
    if not too_large:
        return list(configs)
    needs = f"{too_large[0].name} needs {too_large[0].gpus} GPUs and {too_large[0].threads} threads"
    message = f"{len(too_large)} of {len(configs)} runs don't fit on {engine.place} ({needs}, as the study says)"
    if len(too_large) == len(configs):
        raise ValueError(f"{message}: run them on a larger machine, or on a cluster with --engine ray.")
    print(f"{message}: they are left out.", flush=True)
    return [config for config in configs if engine.fits(config)]


def _gpus() -> list[str]:
    """The GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def shard(configs: Sequence[RunConfig], part: str) -> list[RunConfig]:
    """The i-th of n parts of a study, such as ``"2/3"``: every n-th run, so that all parts take about as long.

    Raises:
        ValueError: Not of this form, or i is not in 1..n.
    """
    first, slash, last = part.partition("/")
    if not (slash and first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise ValueError(f"--shard {part}: give the part's number and how many there are, such as 2/3.")
    return list(configs[int(first) - 1 :: int(last)])


def in_turns(configs: Sequence[RunConfig]) -> list[RunConfig]:
    """The runs with the models in turns.

    What is wrong with a model is then known early, and those that must be pretrained first are so side by side.

    Example:
        >>> runs = [RunConfig(model, "causal_lm", "sgd", "standard", seed) for model in "ab" for seed in (0, 1)]
        >>> [(run.model, run.seed) for run in in_turns(runs)]
        [('a', 0), ('b', 0), ('a', 1), ('b', 1)]
    """
    models: dict[str, list[RunConfig]] = {}
    for config in configs:
        models.setdefault(config.model, []).append(config)
    return [run for turn in itertools.zip_longest(*models.values()) for run in turn if run is not None]


def _status(args: argparse.Namespace, configs: Sequence[RunConfig], store: Store) -> int:
    counts: dict[str, int] = {}
    for config in configs:
        result = store.result(config)
        if result is None:
            status = "running" if seems_running(store.folder(config)) else "missing"
        else:
            status = result["status"]
        counts[status] = counts.get(status, 0) + 1
    print(", ".join(f"{count} {status}" for status, count in sorted(counts.items())) + f" of {len(configs)} runs")
    return 0


def _tables(configs: Sequence[RunConfig], store: Store) -> Any:
    from depthcb_recipes.studies.analysis import pairs_table, runs_table

    results = [result for config in configs if (result := store.result(config)) is not None]
    runs = runs_table(results)
    if runs.empty:
        raise ValueError(f"{store.root} has no finished run of this study: make some with `depthcb study run`.")
    return runs, pairs_table(runs)


def _table(args: argparse.Namespace, configs: Sequence[RunConfig], store: Store) -> int:
    from rich.console import Console

    from depthcb_recipes.studies.page import terminal_table

    _, pairs = _tables(configs, store)
    for path in args.export:
        if path.suffix not in (".csv", ".parquet"):
            raise ValueError(f"--export {path}: name a .csv or a .parquet file.")
        pairs.to_csv(path, index=False) if path.suffix == ".csv" else pairs.to_parquet(path, index=False)
    Console(width=max(Console().width, 140)).print(terminal_table(pairs))  # no figure is cut, in a file neither
    return 0


def _claims(args: argparse.Namespace, configs: Sequence[RunConfig], store: Store) -> int:
    from depthcb_recipes.studies.analysis import claims
    from depthcb_recipes.studies.page import claim_lines

    runs, _ = _tables(configs, store)
    for optimizer, own in runs.groupby("optimizer"):
        print(f"{optimizer}, {len(own)} runs")
        for claim in claims(own):
            print("\n".join(claim_lines(claim)))
    return 0


def _report(args: argparse.Namespace, configs: Sequence[RunConfig], store: Store) -> int:
    from depthcb_recipes.studies.page import write_study

    runs, pairs = _tables(configs, store)
    page = args.page or store.root / "report.html"
    write_study(runs, pairs, page, title=store.root.name)
    print(f"{page} (open it in a browser)")
    return 0
