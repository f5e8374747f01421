"""Writes and reads the records of a run on disk.

Each callback appends JSON lines to its own file, ``<run folder>/depthcb/<name>.jsonl``: a header at the start of a fit,
then one row per log event. Nothing is rewritten, so a killed run loses at most its last line. The records of a folder
belong to one fit: a fit from step 0 makes all earlier rows of all files void, a resumed fit those after its checkpoint.
For duplicate steps, the last row wins. Reports read only these files, and see the logged values in full precision;
rows of numbers alone are kept as arrays, so that 100,000 of them need little memory.

What cannot be read is named in a warning and left out; the rest is read. Files of version 0.1 have no version and no
history of their fit, so their runs are read but never paired.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib.metadata
import itertools
import math
import os
import platform
import re
import subprocess
import sys
import warnings
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args
from urllib.parse import quote, unquote

import numpy as np

from depthcb.plain import UNKNOWN, dumps, loads, plain
from depthcb.profile import FloatArray, Profile, Profiles, layer_key
from depthcb.style import printable
from depthcb.unit_grid import UnitGrid, small_unit
from depthcb.worth import RestoreProfile

if TYPE_CHECKING:
    from depthcb.null import Null

FOLDER = "depthcb"
#: Version of the headers; those of depthcb 0.1 do not say theirs.
VERSION = 2
_PACKAGES = ("lightning", "torch", "transformers", "accelerate", "trl", "datasets", "peft", "wandb", "depthcb")

#: Names of the records of nulls in place of a callback's class. Their rows are draws of noise instead of steps.
NULLS = ("null_profiles", "matched_null_profiles")

Row = Mapping[str, Any]
#: The optimizer's own steps, or steps of equal relative size in all layers.
Control = Literal["standard", "equal-step"]
CONTROLS: tuple[Control, ...] = get_args(Control)


class NumberRow(Mapping[str, float]):
    """A row of a step number and floats, in an array.

    Args:
        index: Position of each key.
        numbers: The values.
    """

    __slots__ = ("_index", "_numbers")

    def __init__(self, index: Mapping[str, int], numbers: array[float]) -> None:
        self._index, self._numbers = index, numbers

    def __getitem__(self, key: str) -> float:
        number = self._numbers[self._index[key]]
        return int(number) if key == "step" else number

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)


@dataclass(frozen=True)
class Record:
    """The record of one callback in a run.

    Args:
        callback: Name of the callback's depthcb class.
        settings: The callback's resolved settings.
        fit: The Trainer's and the module's settings.
        provenance: Versions, seed, git commit and date.
        rows: One row per logged step, ordered by step.
        end: The row written at the end of the fit; None if it was interrupted or is still running.
        parts: What the fit was made of, in order: from which step on it had which callbacks (name: class and settings
            that steer the training), and a hash of the hyperparameters. One part unless it was resumed; none in files
            of version 0.1.
    """

    callback: str
    settings: Row
    fit: Row
    provenance: Row
    rows: tuple[Row, ...] = ()
    end: Row | None = None
    parts: tuple[Row, ...] = ()


@dataclass(frozen=True)
class Run:
    """One run, as read from its folder.

    Args:
        name: A name that distinguishes it from the runs it was read with.
        records: The callbacks' records, by the callback's ``name``.

    Example:
        >>> from depthcb.run import read_runs
        >>> for run in read_runs("lightning_logs"):  # doctest: +SKIP
        ...     print(run.name, run.control, run.profiles["cka"][-1].slope)
    """

    name: str
    records: Mapping[str, Record]

    def record(self, callback: str) -> Record | None:
        """Returns the (first) record of a callback of this class."""
        return next((r for r in self.records.values() if r.callback == callback), None)

    @property
    def control(self) -> Control | Literal["mixed"]:
        """``"equal-step"`` if `EqualStep` controlled the steps, else ``"standard"``; ``"mixed"`` as `mixed` says."""
        if self.mixed:
            return "mixed"
        return "equal-step" if self.record("EqualStep") else "standard"

    @cached_property
    def mixed(self) -> str:
        """What a resume changed: callbacks, settings of the control or hyperparameters; empty if nothing."""
        parts = max((record.parts for record in self.records.values()), key=len, default=())
        told = [f"what came before step {parts[0]['step']} is not known"] if parts and parts[0]["step"] else []
        for before, after in itertools.pairwise(parts):
            old, new = before["callbacks"], after["callbacks"]
            for name in sorted(old.keys() | new.keys()):
                if old.get(name) != new.get(name):
                    what = "added" if name not in old else "removed" if name not in new else "changed"
                    told.append(f"{(new.get(name) or old[name])[0]} {name!r} {what} at step {after['step']}")
            if before["hparams"] != after["hparams"]:
                told.append(f"hyperparameters changed at step {after['step']}")
        return "; ".join(told)

    @property
    def unpaired(self) -> str:
        """Why the run cannot be compared with a twin as a pair; empty if it can."""
        if self._depth is None:
            return "it has no DepthProfile"
        if self.mixed:
            return f"it is a mixed run ({self.mixed})"
        if self._depth.provenance.get("seed") is None:
            return "no seed: add pl.seed_everything(0) before the model is built (depthcb.watch: pass seed=)"
        if not self._depth.fit.get("initial_weights"):
            return "its initial weights are not known (recorded, or begun, by depthcb 0.1)"
        if f'"{UNKNOWN}"' in dumps(self._depth.fit):
            return "a hyperparameter has no value that can be compared: pass numbers, text or a dataclass instead"
        return ""

    @property
    def finished(self) -> bool:
        """Whether the fit finished: it was not interrupted and is not still running."""
        return all(record.end is not None for record in self.records.values() if record.callback == "DepthProfile")

    @property
    def layers(self) -> list[str]:
        """Names of the layers, input side first; none without `DepthProfile`."""
        return list(self._depth.settings.get("layers", ())) if self._depth else []

    @property
    def effective_rank(self) -> list[float]:
        """Effective rank of each layer in the reference; none without `DepthProfile`."""
        return list(self._depth.settings.get("effective_rank", ())) if self._depth else []

    @property
    def definitions(self) -> dict[str, str]:
        """Definition of each measure; none without `DepthProfile`."""
        return dict(self._depth.settings.get("measures", {})) if self._depth else {}

    @cached_property
    def profiles(self) -> dict[str, Profiles]:
        """The profiles by measure, oldest first; of a resumed run, those of the measures that it still had."""
        found = _profiles(self._depth, self.name)
        return {m: found[m] for m in self.definitions or found if m in found}

    @cached_property
    def sites(self) -> dict[str, dict[str, Profiles]]:
        """The profiles of the sites inside the layers, by site and measure; empty if none were measured."""
        names = self._depth.settings.get("sites", {}) if self._depth else {}
        return {site: _profiles(self._depth, self.name, site) for site in names}

    @cached_property
    def null(self) -> dict[str, Profiles]:
        """The null profiles by measure, one per draw of noise; empty if they were not measured."""
        return _profiles(self.record("null_profiles"), self.name)

    @cached_property
    def matched_null(self) -> dict[str, Profiles]:
        """The same of noise that changes the representations as much; empty if no scale was found that does."""
        return _profiles(self.record("matched_null_profiles"), self.name)

    @cached_property
    def worth(self) -> RestoreProfile | None:
        """What each layer's change was worth at the end of the fit; None if it was not measured."""
        saved = (self._depth.end or {}).get("worth") if self._depth else None
        return None if saved is None else RestoreProfile.from_dict(saved)

    @cached_property
    def metrics(self) -> dict[str, list[tuple[int, float]]]:
        """Other metrics logged at each measurement: (step, value) pairs by key."""
        found: dict[str, list[tuple[int, float]]] = {}
        for row in self._depth.rows if self._depth else ():
            for key, value in row.get("metrics", {}).items():
                found.setdefault(key, []).append((row["step"], value))
        return found

    @property
    def validation_loss(self) -> list[tuple[int, float]]:
        """The validation loss at each measurement: the first metric with "val" and "loss" in its name."""
        found = [points for key, points in self.metrics.items() if "val" in key and "loss" in key]
        return found[0] if found else []

    @cached_property
    def step_ratio(self) -> StepRatios:
        """The realised step ratios, from `EqualStep` after rescaling, or else from `UpdateRatioMonitor`."""
        return self._ratios("realised")

    @cached_property
    def wanted_ratio(self) -> StepRatios:
        """The step ratios that the optimizer wanted; the same as `step_ratio` without `EqualStep`."""
        return self._ratios("ratio")

    @cached_property
    def matrix_spread(self) -> list[float | None]:
        """Max / min of the step ratio over each layer's matrices, averaged over the steps; none if not measured."""
        found = self._ratios("matrix_spread", "matrix_spread/")
        return found.mean if found.by_layer else []

    @property
    def layer_ratio(self) -> StepRatios:
        """`step_ratio` if its units are layers, else none."""
        return self.step_ratio if self.step_ratio.by_layer else NO_RATIOS

    @property
    def unit_ratio(self) -> StepRatios:
        """`wanted_ratio` if its units are smaller than layers, else none: under a control the others are all equal."""
        return NO_RATIOS if self.wanted_ratio.by_layer else self.wanted_ratio

    @property
    def controlled(self) -> Row:
        """The settings of `EqualStep`, what they are equal in among them; none without it."""
        control = self.record("EqualStep")
        return control.settings if control else {}

    def to_dict(self) -> dict[str, Any]:
        """Returns the run as JSON-serialisable data."""
        records = {
            name: {f.name: getattr(r, f.name) for f in fields(r)} | {"rows": [dict(row) for row in r.rows]}
            for name, r in self.records.items()
        }
        found: dict[str, Any] = plain({"name": self.name, "records": records})
        return found

    @classmethod
    def from_dict(cls, saved: Row) -> Run:
        """Recreates a run from `to_dict`."""
        saved = loads(dumps(saved))  # NaN and infinity are numbers again
        tuples = ("rows", "parts")
        return cls(
            saved["name"],
            {n: Record(**r | {k: tuple(r.get(k, ())) for k in tuples}) for n, r in saved["records"].items()},
        )

    @property
    def _depth(self) -> Record | None:
        return self.record("DepthProfile")

    def _ratios(self, kind: str, watched: str = "") -> StepRatios:
        """Reads a kind of column that `EqualStep` logs, or, without it, what `UpdateRatioMonitor` calls ``watched``."""
        control = next(((n, r) for n, r in self.records.items() if r.callback == "EqualStep"), None)
        watch = next(((n, r) for n, r in self.records.items() if r.callback == "UpdateRatioMonitor"), None)
        if control:
            return StepRatios.read(control[1], f"{control[0]}/{kind}/")
        return StepRatios.read(watch[1], f"{watch[0]}/{watched}") if watch else NO_RATIOS


@dataclass(frozen=True, eq=False)
class StepRatios:
    """Step ratios over time and depth, of layers or of smaller units.

    Args:
        steps: The S logged steps.
        table: (S, L); NaN where a layer had no update.
        units: The keys of the L units in depth order: ``L00``, ``L01``, ... or, of smaller ones, ``L00/attention``, ...
    """

    steps: tuple[int, ...]
    table: FloatArray
    units: tuple[str, ...] = ()

    @property
    def by_layer(self) -> bool:
        """Whether the units are layers, so that the position in the table is that in the stack."""
        return not any(map(small_unit, self.units))

    @classmethod
    def read(cls, record: Record, prefix: str) -> StepRatios:
        """Reads the columns ``<prefix>L00``, ``<prefix>L01``, ... of a record, or ``<prefix>L00/attention``, ..."""
        unit = re.compile(re.escape(prefix) + r"(L(\d+)(/.+)?)")

        @functools.cache  # there are few different ones
        def columns(keys: tuple[str, ...]) -> dict[str, str]:
            return {m[1]: key for key in keys if (m := unit.fullmatch(key))}

        rows = [row for row in record.rows if columns(tuple(row))]
        found = list(dict.fromkeys(key for row in rows for key in columns(tuple(row))))
        numbers = [int(key.partition("/")[0][1:]) for key in found]
        if any(map(small_unit, found)):  # a unit without an update has no column
            found = [key for _, key in sorted(zip(numbers, found, strict=True), key=lambda pair: pair[0])]
        else:
            found = [layer_key(i) for i in range(1 + max(numbers, default=-1))]
        position = {key: i for i, key in enumerate(found)}
        table = np.full((len(rows), len(found)), np.nan)
        for ratios, row in zip(table, rows, strict=True):
            for key, column in columns(tuple(row)).items():
                ratios[position[key]] = row[column]
        return cls(tuple(row["step"] for row in rows), table, tuple(found))

    @property
    def ratios(self) -> tuple[tuple[float | None, ...], ...]:
        """The table as S tuples of L ratios; None where a layer had no update."""
        return tuple(tuple(None if math.isnan(r) else r for r in row) for row in self.table.tolist())

    @cached_property
    def mean(self) -> list[float | None]:
        """Mean ratio of each layer over the steps that updated it; None if no step did."""
        known = ~np.isnan(self.table)
        sums = np.where(known, self.table, 0.0).sum(axis=0).tolist()
        return [total / count if count else None for total, count in zip(sums, known.sum(axis=0).tolist(), strict=True)]

    @property
    def grid(self) -> UnitGrid:
        """The mean ratios of units smaller than layers, by layer and kind."""
        return UnitGrid.of({key: r for key, r in zip(self.units, self.mean, strict=True) if r})

    @property
    def spread(self) -> float | None:
        """Largest divided by smallest mean ratio, over the layers that were updated; None if none was."""
        known = [r for r in self.mean if r]
        return max(known) / min(known) if known else None


#: The step ratios of a run that has none.
NO_RATIOS = StepRatios((), np.empty((0, 0)))


def write_header(
    folder: Path,
    name: str,
    callback: str,
    step: int,
    settings: Row | None = None,
    fit: Row | None = None,
    parts: Sequence[Row] = (),
    seed: object = None,
    named: str = "",
) -> None:
    """Starts a callback's record of a fit.

    Args:
        folder: The run's folder; created if missing.
        name: The callback's ``name``.
        callback: Name of its class.
        step: Number of the last step before this fit; existing rows of later steps become invalid (0: all rows).
        settings: See `Record`.
        fit: See `Record`.
        parts: See `Record`.
        seed: The seed, where Lightning's ``seed_everything`` did not set it.
        named: The name by which the logger shows the run, if that is not its folder's.

    Raises:
        ValueError: There is a file where the folder should be.
        OSError: The disk is full or cannot be written.
    """
    head = {"version": VERSION, "callback": callback, "step": step, "settings": settings or {}, "fit": fit or {}}
    try:
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(
            f"{callback} cannot write its record to {folder}: {error.strerror or error}. Pass another save_dir to the "
            "logger, or logger=False to the Trainer to disable records."
        ) from error
    _end_torn_line(_file(folder, name))
    known = provenance(seed) | ({"name": named} if named else {})
    write_row(folder, name, {**head, "parts": parts, "provenance": known})


def void_records(folder: Path, step: int) -> None:
    """Makes void what the records of a folder have of other fits than the one that starts or continues now.

    Args:
        folder: The run's folder.
        step: Number of the last step before this fit; rows of later steps become invalid (0: everything).

    Raises:
        ValueError: A record cannot be written, so that its rows would be taken for this fit's.
    """
    for path in sorted((folder / FOLDER).glob("*.jsonl")):
        try:
            _end_torn_line(path)
            _append(path, {"step": step, "void": True})
        except OSError as error:
            raise ValueError(
                f"{path} has rows of an earlier fit and cannot be written ({error.strerror or error}): make it "
                "writable, remove it, or pass another save_dir to the logger."
            ) from error


def write_row(folder: Path, name: str, row: Row) -> None:
    """Appends one row to a callback's record.

    Raises:
        OSError: The row cannot be written; the record is as before.
    """
    _append(_file(folder, name), row)


def profile_row(
    profiles: Mapping[str, Profile], sites: Mapping[str, Mapping[str, Profile]] | None = None
) -> dict[str, Any]:
    """Returns the profiles of one step, by measure, and by site and measure, as a row of the run's record."""
    first = next(iter(profiles.values()))
    row = {"step": first.step, "epoch": first.epoch, "profiles": {m: p.to_dict() for m, p in profiles.items()}}
    inside = {site: {m: p.to_dict() for m, p in by_measure.items()} for site, by_measure in (sites or {}).items()}
    return row | ({"sites": inside} if inside else {})


def null_names(name: str) -> tuple[str, str]:
    """Returns the names of the records of a callback's two nulls."""
    return f"{name}/null", f"{name}/matched_null"


def write_null(folder: Path, null: Null, name: str = "depth") -> None:
    """Writes the null profiles to a run's folder, one row per draw of noise.

    Args:
        folder: The run's folder.
        null: The null.
        name: Name of the `DepthProfile` that measured it.
    """
    draws, matched = null_names(name)
    kinds = {
        draws: (NULLS[0], null.draws, {}),
        matched: (NULLS[1], null.matched, {"scale": null.scale, "message": null.message}),
    }
    for record, (callback, profiles, settings) in kinds.items():
        write_header(folder, record, callback, 0, {"of": name, "draws": len(profiles), **settings})
        for index, draw in enumerate(profiles):
            write_row(folder, record, {"step": index, "profiles": {m: p.to_dict() for m, p in draw.items()}})


def read_runs(*folders: str | Path) -> list[Run]:
    """Reads all runs at or below the given folders, with one result for each `DepthProfile` of a run.

    Args:
        folders: Folders of runs, or folders that contain them at any depth.

    Raises:
        ValueError: A folder does not exist or contains no run.
    """
    found: dict[Path, None] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise ValueError(
                f"{folder} is not a folder: pass the folder of a run (its logger's, such as lightning_logs/version_0), "
                "or one that contains several."
            )
        below = sorted(_run_folders(folder), key=natural)
        if not below:
            raise ValueError(
                f"{folder} contains no depthcb run (no {FOLDER}/*.jsonl at any depth): train with DepthProfile, "
                "EqualStep or UpdateRatioMonitor and any logger."
            )
        found |= dict.fromkeys(path.resolve() for path in below)
    records = [dict(_records(path)) for path in found]
    names = _names(list(found))
    given = [next((str(r.provenance["name"]) for r in own.values() if "name" in r.provenance), "") for own in records]
    shown = [  # a logger's name for the run, with its folder where several have the same
        name if not own else own if given.count(own) == 1 and own not in names else f"{own} ({name})"
        for own, name in zip(given, names, strict=True)
    ]
    return [run for own, name in zip(records, shown, strict=True) for run in _runs(own, name)]


def provenance(seed: object = None) -> dict[str, Any]:
    """Returns the provenance of a run: versions, the seed (by default Lightning's), git commit and date."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        if name in sys.modules:
            try:
                versions[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:  # importable without being installed
                continue
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions,
        "seed": os.environ.get("PL_GLOBAL_SEED") if seed is None else str(seed),  # None: not known
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    """Returns the commit of the working directory, marked if files differ from it; None outside a git repository."""
    try:
        asked = {"capture_output": True, "text": True, "timeout": 10}
        commit = subprocess.run(["git", "rev-parse", "HEAD"], **asked)  # type: ignore[call-overload]
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], **asked)  # type: ignore[call-overload]
    except (OSError, subprocess.SubprocessError):
        return None
    if commit.returncode:
        return None
    return str(commit.stdout.strip()) + (" with changes" if changed.stdout.strip() else "")


def _append(path: Path, row: Row) -> None:
    line = (dumps(row) + "\n").encode()
    end = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "ab") as file:
            file.write(line)
    except OSError:
        with contextlib.suppress(OSError):
            os.truncate(path, end)  # a full disk takes a part of a line
        raise


def _file(folder: Path, name: str) -> Path:
    return folder / FOLDER / f"{quote(name, safe='')}.jsonl"


def _end_torn_line(path: Path) -> None:
    """Terminates a line that a killed process left incomplete, so that the next row starts on a new line."""
    if not path.exists() or not path.stat().st_size:
        return
    with open(path, "rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read() != b"\n":
            file.write(b"\n")


def _profiles(record: Record | None, run: str, site: str = "") -> dict[str, Profiles]:
    found: dict[str, Profiles] = {}
    for row in record.rows if record else ():
        for measure, saved in (row.get("sites", {}).get(site, {}) if site else row.get("profiles", {})).items():
            try:
                found.setdefault(measure, Profiles()).append(Profile.from_dict(saved))
            except ValueError as error:
                _warn(f"{run}: the {measure} profile of step {row['step']} is damaged and left out: {error}")
    return found


def _run_folders(folder: Path) -> set[Path]:
    """Returns the folders of runs at or below a folder, also behind links."""
    found, seen = set(), set()
    for at, below, _ in os.walk(folder, followlinks=True):
        real = os.path.realpath(at)
        below[:] = [] if real in seen else below  # a link to a folder above
        seen.add(real)
        if Path(at).name == FOLDER and any(Path(at).glob("*.jsonl")):
            found.add(Path(at).parent)
    return found


def _runs(records: Mapping[str, Record], name: str) -> list[Run]:
    measured = [n for n, record in records.items() if record.callback == "DepthProfile"]
    if len(measured) < 2:
        return [Run(name, records)]

    def belongs(record: str, own: str) -> bool:
        of = records[record].settings.get("of", own) if records[record].callback in NULLS else own
        return of == own and (record == own or record not in measured)

    return [Run(f"{name}:{own}", {n: r for n, r in records.items() if belongs(n, own)}) for own in measured]


def _records(folder: Path) -> Iterator[tuple[str, Record]]:
    for path in sorted((folder / FOLDER).glob("*.jsonl")):
        record = _read(path)
        if record is not None:
            yield unquote(path.stem), record


def _read(path: Path) -> Record | None:
    """Reads the last fit recorded in a file; returns None if the file has no readable header of it."""
    try:
        with open(path, encoding="utf-8", errors="replace") as lines:
            return _record_of(path, lines)
    except OSError as error:
        _warn(f"{path} cannot be read and is left out: {error.strerror or error}.")
        return None


def _record_of(path: Path, lines: Iterable[str]) -> Record | None:
    head: dict[str, Any] | None = None
    rows: dict[int, Row] = {}
    end: dict[str, Any] | None = None
    without_head = 0
    indices: dict[tuple[str, ...], dict[str, int]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = loads(line)
            step = int(row["step"])
            if "callback" in row:
                _check_header(row)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            _warn(f"{path}, line {number} is damaged, perhaps by a killed process: it is ignored.")
            continue
        if "callback" in row or "void" in row:
            head, end = _continued(head, row, step), None
            rows = {s: r for s, r in rows.items() if s <= step} if step and head else {}
        elif head is None:
            without_head = without_head or number
        elif "end" in row:
            end = row["end"]
        else:  # optimizers that step in turn share a step number
            rows[step] = _compact({**rows[step], **row} if step in rows else row, indices)
    if head is not None and head.get("version", 1) > VERSION:
        _warn(
            f"{path} is left out: it has version {head['version']}, and this depthcb reads up to {VERSION}: update "
            "depthcb."
        )
        return None
    if head is None:
        if without_head:
            _warn(f"{path} is left out: line {without_head} is a row without a preceding header.")
        return None
    ordered = tuple(rows[step] for step in sorted(rows))
    parts = tuple(head.get("parts", ()))
    return Record(head["callback"], head["settings"], head["fit"], head["provenance"], ordered, end, parts)


def _compact(row: Row, indices: dict[tuple[str, ...], dict[str, int]]) -> Row:
    """Returns a row as an array if its values are numbers; rows with the same keys share their index."""
    kinds = list(map(type, row.values()))
    if kinds.count(float) < len(kinds) - 1 or type(row["step"]) is not int or abs(row["step"]) >= 2**53:
        return row
    keys = tuple(row)
    if keys not in indices:
        indices[keys] = {key: i for i, key in enumerate(keys)}
    return NumberRow(indices[keys], array("d", row.values()))


def _check_header(row: dict[str, Any]) -> None:
    """Raises an error for a header that lacks something."""
    if row.get("version", 1) <= VERSION and not all(
        isinstance(row[k], dict) for k in ("settings", "fit", "provenance")
    ):
        raise TypeError


def _continued(head: dict[str, Any] | None, row: dict[str, Any], step: int) -> dict[str, Any] | None:
    """Returns the header that holds after a row that starts a fit: its own, or what it leaves of the one before."""
    if "callback" in row:
        return row
    if head is None or not step or head["callback"] in NULLS:
        return None
    return head | {"parts": [part for part in head.get("parts", ()) if part["step"] < step]}


def _warn(message: str) -> None:
    warnings.warn(printable(message), stacklevel=2)


def _names(paths: Sequence[Path]) -> list[str]:
    """Returns the paths without their common parent; for a single path, its last part, or two if it is a version."""
    if len(paths) == 1:
        parts = paths[0].parts
        return ["/".join(parts[-2:] if parts[-1].startswith("version_") else parts[-1:])]
    shared = Path(os.path.commonpath(paths))
    return [str(path.relative_to(shared)) if path != shared else path.name for path in paths]


def natural(path: Path) -> list[tuple[int, str]]:
    """Returns a sort key that orders version_10 after version_9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(path))]
