"""What the tasks of ``depthcb study`` do."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depthcb_recipes.machine import available_cores, free_memory
from depthcb_recipes.stopping import stoppable
from depthcb_recipes.studies.grid import RunConfig, load_study
from depthcb_recipes.studies.store import Store, full_disk, seems_running

#: Bytes that a run takes at least: a process with its libraries and the smallest model [ours].
MEMORY = 1 << 29

if TYPE_CHECKING:
    from depthcb_recipes.studies.pool import Engine


def run_task(args: argparse.Namespace) -> int:
    """Runs one of the study's commands."""
    path = _study_file(args.study)
    study = load_study(path)
    args.deciding = study.deciding
    store = Store(args.out or Path("depthcb-studies") / path.stem)
    tasks = {"run": _run, "status": _status, "table": _table, "claims": _claims, "report": _report,
             "compare-paper": _compare_paper, "fetch": _fetch, "plan": _plan}  # fmt: skip
    return tasks[args.task](args, study.runs, store)


def _study_file(name: str) -> Path:
    folder = Path(__file__).parent
    bundled = folder / f"{name}.yaml"
    if not bundled.is_file() and not Path(name).exists():
        known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        raise ValueError(f"There is no study {name!r}: name a YAML file, or one of {known}.")
    return bundled if bundled.is_file() else Path(name)


def _run(args: argparse.Namespace, configs: Sequence[RunConfig], store: Store) -> int:
    return run_configs(args, configs, store, f"`depthcb study run {args.study}`")


def run_configs(args: argparse.Namespace, configs: Sequence[RunConfig], store: Store, command: str) -> int:
    """Runs what has no result yet, and prints what failed.

    Args:
        args: The command line, with engine, jobs, shard and retry_failed.
        configs: The runs.
        store: Their folder.
        command: What continues after a stop, for a message.

    Returns:
        The exit status: 0 if all runs have figures.
    """
    from depthcb_recipes.studies.pool import run_study
    from depthcb_recipes.studies.progress import shown

    own = in_turns(shard(configs, args.shard))
    if args.jobs is not None and args.jobs < 1:
        raise ValueError(f"--jobs {args.jobs}: it must be at least 1.")
    check_writable(store.root)
    if args.retry_failed:
        store.forget_failures(own)
    message = f"Stopped. The same command continues: {command}."
    try:
        with stoppable(lambda: print(message, flush=True)):
            engine = _engine(args, own)
            settle_precision(configs, store, engine)
            with shown() as report:
                progress = run_study(fitting(own, engine), store, engine, report)
    except OSError as error:
        if not full_disk(error):
            raise
        raise ValueError(
            f"The disk of {store.root} is full: free some space and repeat the command. Finished runs are kept."
        ) from error
    for config in own:
        result = store.result(config)
        if result is not None and not result.finished:
            print(f"{result.status}: {config.name}: {result.message} ({store.folder(config)})")
    print(f"{progress.done} of {len(own)} runs have figures, {progress.failed} failed.")
    return 0 if progress.done == len(own) else 1


def check_writable(folder: Path) -> None:
    """Raises a ValueError if a study's folder cannot be written."""
    existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(f"--out {folder} cannot be written ({error.strerror}): name another folder.") from error


@contextlib.contextmanager
def writing(option: str, path: Path) -> Iterator[None]:
    """Turns an error of writing a file into one sentence that names its option."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{option} {path} cannot be written ({error.strerror or error}): name another file."
        ) from error


def _engine(args: argparse.Namespace, configs: Sequence[RunConfig]) -> Engine:
    """Returns the engine that the command line asks for."""
    if args.engine == "ray":
        from depthcb_recipes.studies.ray import RayEngine

        return RayEngine(args.jobs)
    from depthcb_recipes.studies.pool import Pool

    gpus = _gpus() if any(config.gpus for config in configs) else []
    threads = max(config.threads for config in configs)
    check_memory(min(args.jobs or 1, len(configs)), free_memory())
    return Pool(args.jobs or max(1, available_cores() // threads), gpus)


def check_memory(jobs: int, free: int) -> None:
    """Raises a ValueError if so many simultaneous runs need more memory than is free, however small their models."""
    most = max(1, free // MEMORY)
    if jobs > most:
        raise ValueError(
            f"--jobs {jobs}: each run takes at least {MEMORY / 2**30:g} GB of memory and {free / 2**30:.1f} GB are "
            f"free: give {most} or fewer, or leave it out for one run per core."
        )


def settle_precision(configs: Sequence[RunConfig], store: Store, engine: Engine) -> None:
    """Chooses one precision for all runs of the study on a kind of device, since the two of a pair must share it.

    The choice is printed once; so is a warning if this machine would choose another one.

    Args:
        configs: The runs; those that name a precision keep it.
        store: The study's folder, where the choice is stored.
        engine: Where the study runs; it chooses if nothing is stored yet.
    """
    for device, example in {c.device: c for c in configs if c.precision == "auto" and engine.fits(c)}.items():
        settled = store.precision(device)
        of_device = [config for config in configs if config.device == device]
        if settled and all(store.result(config) for config in of_device):
            continue  # nothing to run
        here = engine.precision(example)
        if settled is None:
            older = any(store.result(config) for config in of_device)
            of_old = {"precision": "bf16-mixed", "reason": "its earlier runs used it"}
            settled = store.settle_precision(device, of_old if older else here)
            print(f"Precision {settled['precision']} for the runs on {device}: {settled['reason']}.", flush=True)
        if settled["precision"] != here["precision"]:
            print(
                f"This study uses precision {settled['precision']} for all its runs on {device}, so that pairs share "
                f"it; {engine.place} would choose {here['precision']}: {here['reason']}.",
                flush=True,
            )


def fitting(configs: Sequence[RunConfig], engine: Engine) -> list[RunConfig]:
    """Returns the runs that fit on the engine, and prints how many do not.

    Raises:
        ValueError: None fits.
    """
    too_large = [config for config in configs if not engine.fits(config)]
    if not too_large:
        return list(configs)
    needs = f"{too_large[0].name} needs {too_large[0].gpus} GPUs and {too_large[0].threads} threads"
    message = f"{len(too_large)} of {len(configs)} runs do not fit on {engine.place} ({needs}, as the study says)"
    if len(too_large) == len(configs):
        raise ValueError(f"{message}: run them on a larger machine, or on a cluster with --engine ray.")
    print(f"{message}: they are skipped.", flush=True)
    return [config for config in configs if engine.fits(config)]


def _gpus() -> list[str]:
    """Returns the GPUs that this process may use, named as in ``CUDA_VISIBLE_DEVICES``."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def shard(configs: Sequence[RunConfig], part: str) -> list[RunConfig]:
    """Returns the i-th of n parts of a study: every n-th run, so that all parts take about equally long.

    Args:
        configs: The runs.
        part: ``"i/n"``, such as ``"2/3"``.

    Raises:
        ValueError: Not of this form, or i is not in 1..n.
    """
    first, slash, last = part.partition("/")
    if not (slash and first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise ValueError(f"--shard {part}: give the part's number and how many there are, such as 2/3.")
    return list(configs[int(first) - 1 :: int(last)])


def in_turns(configs: Sequence[RunConfig]) -> list[RunConfig]:
    """Returns the runs with the models in turns.

    Errors in a model show early, and models that must be pretrained first are pretrained in parallel.

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
        without = "running" if result is None and seems_running(store.folder(config)) else "missing"
        status = result.status if result else without
        counts[status] = counts.get(status, 0) + 1
    print(", ".join(f"{count} {status}" for status, count in sorted(counts.items())) + f" of {len(configs)} runs")
    for result in store.older(configs):
        print(
            f"older, version {result.version}: {result.config.name}: the hash of its configuration has changed since; "
            "table and report include it, and `depthcb study run` runs it again."
        )
    return 0


def _tables(args: argparse.Namespace, configs: Sequence[RunConfig], store: Store) -> Any:
    """Returns the tables of runs and of pairs by the deciding measure, and what the other measures say."""
    from depthcb_recipes.studies.measures import agreement_lines, tables_by_measure
    from depthcb_recipes.studies.tables import pairs_table

    results = [result for config in configs if (result := store.result(config)) is not None]
    tables = tables_by_measure([*results, *store.older(configs)], args.by or args.deciding)
    if not tables:
        raise ValueError(f"{store.root} has no finished run of this study: start it with `depthcb study run`.")
    runs = next(iter(tables.values()))
    return runs, pairs_table(runs), list(agreement_lines(tables))


def _table(args: argparse.Namespace, configs: Sequence[RunConfig], store: Store) -> int:
    from rich.console import Console

    from depthcb_recipes.studies.page import terminal_table

    runs, pairs, notes = _tables(args, configs, store)
    for path in args.export:
        if path.suffix not in (".csv", ".parquet"):
            raise ValueError(f"--export {path}: name a .csv or a .parquet file.")
        with writing("--export", path):
            pairs.to_csv(path, index=False) if path.suffix == ".csv" else pairs.to_parquet(path, index=False)
    Console(width=max(Console().width, 140)).print(terminal_table(runs))  # no figure is truncated, in a file either
    print("\n".join(notes))
    return 0


def _claims(args: argparse.Namespace, configs: Sequence[RunConfig], store: Store) -> int:
    from depthcb_recipes.studies.claims import claims
    from depthcb_recipes.studies.page import claim_lines

    runs, _, notes = _tables(args, configs, store)
    for optimizer, own in runs.groupby("optimizer"):
        print(f"{optimizer}, {len(own)} runs")
        for claim in claims(own):
            print("\n".join(claim_lines(claim)))
    print("\n".join(notes))
    return 0


def _compare_paper(args: argparse.Namespace, configs: Sequence[RunConfig], store: Store) -> int:
    from depthcb_recipes.studies.paper import comparison

    runs, _, notes = _tables(args, configs, store)
    for line in (*notes, *comparison(runs, configs, args.by or args.deciding)):
        print(line)
    return 0


def _fetch(args: argparse.Namespace, configs: Sequence[RunConfig], store: Store) -> int:
    from depthcb_recipes.studies.fetch import fetch

    check_writable(store.root)
    with stoppable(lambda: print(f"Stopped. The same command continues: `depthcb study fetch {args.study}`.")):
        fetch(configs, store.root)
    return 0


def _plan(args: argparse.Namespace, configs: Sequence[RunConfig], store: Store) -> int:
    from rich.console import Console

    from depthcb_recipes.studies.plan import calibrate, gpus_of, plan_table

    if args.gpu_memory is not None and not args.gpu_memory > 0:
        raise ValueError(f"--gpu-memory {args.gpu_memory}: it must be a positive number of GB.")
    with stoppable(lambda: print("Stopped: nothing was started.", flush=True)):
        print("Timing a training step and a probe pass on this machine.", flush=True)
        costs, calibrated = calibrate()
        gpus, gpu_memory, where = gpus_of(args.gpu_memory)
        print(where, flush=True)
        table, problems = plan_table(configs, costs, calibrated, gpu_memory, gpus, free_memory())
    Console(width=max(Console().width, 160)).print(table)
    print("GB; the largest of a model's objectives. Hours are this machine's, in proportion to parameters and tokens.")
    print("\n".join(problems) or "All runs fit.")
    return 0


def _report(args: argparse.Namespace, configs: Sequence[RunConfig], store: Store) -> int:
    from depthcb_recipes.studies.page import write_study

    runs, pairs, notes = _tables(args, configs, store)
    page = args.page or store.root / "report.html"
    with writing("--page", page):
        write_study(runs, pairs, page, store.root.name, notes)
    print(f"{page} (open it in a browser)")
    if args.wandb:
        from depthcb_recipes.studies.page import all_cells
        from depthcb_recipes.studies.wandb_summary import publish

        print(f"{publish(all_cells(runs), store.root.name, args.wandb)} runs logged to W&B project {args.wandb}")
    return 0
