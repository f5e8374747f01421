"""Writes and reads the records of a run on disk.

Each callback appends JSON lines to its own file, ``<run folder>/depthcb/<name>.jsonl``: a header at the start of a fit,
then one row per log event. Nothing is rewritten, so a killed run loses at most its last line. A fit from step 0
invalidates all earlier rows, a resumed fit those after its checkpoint; for duplicate steps, the last row wins. Reports
read only these files, and see the logged values in full precision.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args
from urllib.parse import quote, unquote

from depthcb.profile import Profile, Profiles

if TYPE_CHECKING:
    from depthcb.null import Null

FOLDER = "depthcb"
_PACKAGES = ("lightning", "torch", "transformers", "datasets", "peft", "wandb", "depthcb")

Row = Mapping[str, Any]
#: The optimizer's own steps, or steps of equal relative size in all layers.
Control = Literal["standard", "equal-step"]
CONTROLS: tuple[Control, ...] = get_args(Control)


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
    """

    callback: str
    settings: Row
    fit: Row
    provenance: Row
    rows: tuple[Row, ...] = ()
    end: Row | None = None


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
    def control(self) -> Control:
        """``"equal-step"`` if `EqualStep` controlled the steps, else ``"standard"``."""
        return "equal-step" if self.record("EqualStep") else "standard"

    @property
    def finished(self) -> bool:
        """Whether the fit finished: it was not interrupted and is not still running."""
        return all(record.end is not None for record in self.records.values() if record.callback == "DepthProfile")

    @property
    def layers(self) -> list[str]:
        """Names of the layers, input side first; none without `DepthProfile`."""
        return list(self._depth.settings["layers"]) if self._depth else []

    @property
    def effective_rank(self) -> list[float]:
        """Effective rank of each layer in the reference; none without `DepthProfile`."""
        return list(self._depth.settings["effective_rank"]) if self._depth else []

    @property
    def definitions(self) -> dict[str, str]:
        """Definition of each measure; none without `DepthProfile`."""
        return dict(self._depth.settings["measures"]) if self._depth else {}

    @cached_property
    def profiles(self) -> dict[str, Profiles]:
        """The profiles by measure, oldest first."""
        return _profiles(self._depth)

    @cached_property
    def null(self) -> dict[str, Profiles]:
        """The null profiles by measure, one per draw of noise; empty if they were not measured."""
        return _profiles(self.record("null_profiles"))

    @cached_property
    def matched_null(self) -> dict[str, Profiles]:
        """The same of noise that changes the representations as much; empty if no scale was found that does."""
        return _profiles(self.record("matched_null_profiles"))

    @cached_property
    def metrics(self) -> dict[str, list[tuple[int, float]]]:
        """Other metrics logged at each measurement: (step, value) pairs by key."""
        found: dict[str, list[tuple[int, float]]] = {}
        for row in self._depth.rows if self._depth else ():
            for key, value in row.get("metrics", {}).items():
                found.setdefault(key, []).append((row["step"], value))
        return found

    @cached_property
    def step_ratio(self) -> StepRatios:
        """The realised step ratios, from `EqualStep` after rescaling, or else from `UpdateRatioMonitor`."""
        return self._ratios("realised")

    @cached_property
    def wanted_ratio(self) -> StepRatios:
        """The step ratios that the optimizer wanted; the same as `step_ratio` without `EqualStep`."""
        return self._ratios("ratio")

    def to_dict(self) -> dict[str, Any]:
        """Returns the run as JSON-serialisable data."""
        return plain(asdict(self))

    @classmethod
    def from_dict(cls, fields: Row) -> Run:
        """Recreates a run from `to_dict`."""
        records = {name: Record(**{**r, "rows": tuple(r["rows"])}) for name, r in fields["records"].items()}
        return cls(fields["name"], records)

    @property
    def _depth(self) -> Record | None:
        return self.record("DepthProfile")

    def _ratios(self, kind: str) -> StepRatios:
        control = next(((n, r) for n, r in self.records.items() if r.callback == "EqualStep"), None)
        watch = next(((n, r) for n, r in self.records.items() if r.callback == "UpdateRatioMonitor"), None)
        if control:
            return StepRatios.read(control[1], f"{control[0]}/{kind}/")
        return StepRatios.read(watch[1], f"{watch[0]}/") if watch else StepRatios((), ())


@dataclass(frozen=True)
class StepRatios:
    """Step ratios over time and depth.

    Args:
        steps: The S logged steps.
        ratios: (S, L); None where a layer had no update.
    """

    steps: tuple[int, ...]
    ratios: tuple[tuple[float | None, ...], ...]

    @classmethod
    def read(cls, record: Record, prefix: str) -> StepRatios:
        """Reads the columns ``<prefix>L00``, ``<prefix>L01``, ... of a record."""
        layer = re.compile(re.escape(prefix) + r"L(\d+)")
        rows = [
            (row["step"], {int(m[1]): value for key, value in row.items() if (m := layer.fullmatch(key))})
            for row in record.rows
        ]
        layers = 1 + max((i for _, row in rows for i in row), default=-1)
        known = [(step, tuple(row.get(i) for i in range(layers))) for step, row in rows if row]
        return cls(tuple(step for step, _ in known), tuple(row for _, row in known))

    @property
    def mean(self) -> list[float | None]:
        """Mean ratio of each layer over the steps that updated it; None if no step did."""
        columns = [[r for r in column if r is not None] for column in zip(*self.ratios, strict=True)]
        return [sum(column) / len(column) if column else None for column in columns]

    @property
    def spread(self) -> float | None:
        """Largest divided by smallest mean ratio, over the layers that were updated; None if none was."""
        known = [r for r in self.mean if r]
        return max(known) / min(known) if known else None


def write_header(
    folder: Path, name: str, callback: str, step: int, settings: Row | None = None, fit: Row | None = None
) -> None:
    """Starts a callback's record of a fit.

    Args:
        folder: The run's folder; created if missing.
        name: The callback's ``name``.
        callback: Name of its class.
        step: Number of the last step before this fit; existing rows of later steps become invalid (0: all rows).
        settings: See `Record`.
        fit: See `Record`.

    Raises:
        ValueError: The folder cannot be written.
    """
    head = {"callback": callback, "step": step, "settings": settings or {}, "fit": fit or {}}
    try:
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
        _end_torn_line(_file(folder, name))
        write_row(folder, name, {**head, "provenance": provenance()})
    except OSError as error:
        raise ValueError(
            f"{callback} cannot write its record to {folder}: {error.strerror or error}. Pass another save_dir to the "
            "logger, or logger=False to the Trainer to disable records."
        ) from error


def write_row(folder: Path, name: str, row: Row) -> None:
    """Appends one row to a callback's record."""
    with open(_file(folder, name), "a", encoding="utf-8") as file:
        file.write(_json(row) + "\n")


def write_null(folder: Path, null: Null) -> None:
    """Writes the null profiles to a run's folder, one row per draw of noise."""
    kinds = {
        "null": ("null_profiles", null.draws, {}),
        "matched_null": ("matched_null_profiles", null.matched, {"scale": null.scale, "message": null.message}),
    }
    for name, (callback, draws, settings) in kinds.items():
        write_header(folder, name, callback, 0, {"draws": len(draws), **settings})
        for index, draw in enumerate(draws):
            write_row(folder, name, {"step": index, "profiles": {m: p.to_dict() for m, p in draw.items()}})


def read_runs(*folders: str | Path) -> list[Run]:
    """Reads all runs at or below the given folders, with one result for each `DepthProfile` of a run.

    Args:
        folders: Folders of runs, or folders that contain them at any depth.

    Raises:
        ValueError: A folder does not exist or contains no run, or a file is not a record.
    """
    found: dict[Path, None] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise ValueError(
                f"{folder} is not a folder: pass the folder of a run (its logger's, such as lightning_logs/version_0), "
                "or one that contains several."
            )
        below = sorted({file.parent.parent for file in folder.rglob(f"{FOLDER}/*.jsonl")}, key=_natural)
        if not below:
            raise ValueError(
                f"{folder} contains no depthcb run (no {FOLDER}/*.jsonl at any depth): train with DepthProfile, "
                "EqualStep or UpdateRatioMonitor and any logger."
            )
        found |= dict.fromkeys(path.resolve() for path in below)
    names = _names(list(found))
    return [run for path, name in zip(found, names, strict=True) for run in _runs(path, name)]


def provenance() -> dict[str, Any]:
    """Returns the provenance of a run: versions, seed, git commit and date."""
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
        "seed": os.environ.get("PL_GLOBAL_SEED"),  # None: seed_everything was not called
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


def plain(settings: Row) -> dict[str, Any]:
    """Returns settings as plain JSON data; other objects are replaced by their own name or that of their class."""
    found: dict[str, Any] = json.loads(_json(settings))
    return found


def _json(row: Row) -> str:
    return json.dumps(row, default=lambda value: getattr(value, "__qualname__", type(value).__qualname__))


def _file(folder: Path, name: str) -> Path:
    return folder / FOLDER / f"{quote(name, safe='')}.jsonl"


def _end_torn_line(path: Path) -> None:
    """Terminates a line that a killed process left incomplete, so that the next row starts on a new line."""
    if path.exists() and (text := path.read_bytes()) and not text.endswith(b"\n"):
        with open(path, "ab") as file:
            file.write(b"\n")


def _profiles(record: Record | None) -> dict[str, Profiles]:
    rows = [row["profiles"] for row in record.rows if "profiles" in row] if record else []
    measures = dict.fromkeys(m for row in rows for m in row)
    return {m: Profiles(Profile.from_dict(row[m]) for row in rows if m in row) for m in measures}


def _runs(folder: Path, name: str) -> list[Run]:
    records = dict(_records(folder))
    measured = [n for n, record in records.items() if record.callback == "DepthProfile"]
    if len(measured) < 2:
        return [Run(name, records)]
    return [
        Run(f"{name}:{own}", {n: r for n, r in records.items() if n == own or n not in measured}) for own in measured
    ]


def _records(folder: Path) -> Iterator[tuple[str, Record]]:
    for path in sorted((folder / FOLDER).glob("*.jsonl")):
        record = _read(path)
        if record is not None:
            yield unquote(path.stem), record


def _read(path: Path) -> Record | None:
    """Reads the last fit recorded in a file; returns None if the file has no complete header."""
    head: dict[str, Any] | None = None
    rows: dict[int, dict[str, Any]] = {}
    end: dict[str, Any] | None = None
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            row = json.loads(line)
            step = int(row["step"])
        except (ValueError, KeyError, TypeError):
            warnings.warn(
                f"{path}, line {number} is damaged, perhaps by a killed process: it is ignored.", stacklevel=2
            )
            continue
        if "callback" in row:
            head, end = row, None
            rows = {s: r for s, r in rows.items() if s <= step} if step else {}
        elif head is None:
            raise ValueError(f"{path}, line {number}: a row without a preceding header; this is not a depthcb record.")
        elif "end" in row:
            end = row["end"]
        else:
            rows[step] = rows.get(step, {}) | row  # optimizers that step in turn share a step number
    if head is None:
        return None
    ordered = tuple(rows[step] for step in sorted(rows))
    return Record(head["callback"], head["settings"], head["fit"], head["provenance"], ordered, end)


def _names(paths: Sequence[Path]) -> list[str]:
    """Returns the paths without their common parent; for a single path, its last part, or two if it is a version."""
    if len(paths) == 1:
        parts = paths[0].parts
        return ["/".join(parts[-2:] if parts[-1].startswith("version_") else parts[-1:])]
    shared = Path(os.path.commonpath(paths))
    return [str(path.relative_to(shared)) if path != shared else path.name for path in paths]


def _natural(path: Path) -> list[tuple[int, str]]:
    """Returns a sort key that orders version_10 after version_9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(path))]
