"""What a run leaves on disk, and how it is read back.

Each callback appends JSON lines to a file of its own, ``<run folder>/depthcb/<name>.jsonl``: a header when a fit
starts, then a row for whatever it logs. Nothing is rewritten, so a killed run leaves all but its last line. A fit from
step 0 makes what stood there before void, a resumed one what lay beyond its checkpoint; a step that comes twice counts
as it came last. Reading the files is all that reports do: they see what was logged, to the last digit.
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
from typing import Any, Literal, get_args
from urllib.parse import quote, unquote

from depthcb.profile import Profile, Profiles

FOLDER = "depthcb"
_PACKAGES = ("lightning", "torch", "transformers", "datasets", "peft", "wandb", "depthcb")

Row = Mapping[str, Any]
#: The optimizer's own steps, or steps of equal relative size in all layers.
Control = Literal["standard", "equal-step"]
CONTROLS: tuple[Control, ...] = get_args(Control)


@dataclass(frozen=True)
class Record:
    """What one callback of a run wrote down.

    Args:
        callback: Class of the callback in depthcb.
        settings: What the callback measures or does, as it was resolved.
        fit: The Trainer's and the module's settings.
        provenance: Versions, seed, git commit and date.
        rows: One per logged step, in the order of the steps.
        end: What was written when the fit came to its end; None where it was interrupted or still runs.
    """

    callback: str
    settings: Row
    fit: Row
    provenance: Row
    rows: tuple[Row, ...] = ()
    end: Row | None = None


@dataclass(frozen=True)
class Run:
    """One run, as its folder holds it.

    Args:
        name: What tells it from the runs it is read with.
        records: What each callback wrote down, by the callback's ``name``.

    Example:
        >>> from depthcb.run import read_runs
        >>> for run in read_runs("lightning_logs"):  # doctest: +SKIP
        ...     print(run.name, run.control, run.profiles["cka"][-1].slope)
    """

    name: str
    records: Mapping[str, Record]

    def record(self, callback: str) -> Record | None:
        """The (first) record of a callback of this class."""
        return next((r for r in self.records.values() if r.callback == callback), None)

    @property
    def control(self) -> Control:
        """``"standard"``, or ``"equal-step"`` where `EqualStep` ruled the steps."""
        return "equal-step" if self.record("EqualStep") else "standard"

    @property
    def finished(self) -> bool:
        """Whether the fit came to its own end: neither interrupted nor running still."""
        return all(record.end is not None for record in self.records.values() if record.callback == "DepthProfile")

    @property
    def layers(self) -> list[str]:
        """Names of the layers, input side first; none without `DepthProfile`."""
        return list(self._depth.settings["layers"]) if self._depth else []

    @property
    def effective_rank(self) -> list[float]:
        """Of each layer's reference; none without `DepthProfile`."""
        return list(self._depth.settings["effective_rank"]) if self._depth else []

    @property
    def definitions(self) -> dict[str, str]:
        """What was measured by, in words, by measure; none without `DepthProfile`."""
        return dict(self._depth.settings["measures"]) if self._depth else {}

    @cached_property
    def profiles(self) -> dict[str, Profiles]:
        """The curves by measure, oldest first."""
        return _profiles(self._depth)

    @cached_property
    def null(self) -> dict[str, Profiles]:
        """Profiles of noise of the same size by measure, one per seed; none where they were not measured."""
        return _profiles(self.record("null_profiles"))

    @cached_property
    def metrics(self) -> dict[str, list[tuple[int, float]]]:
        """What else was logged at each measurement, by key: (step, value)."""
        found: dict[str, list[tuple[int, float]]] = {}
        for row in self._depth.rows if self._depth else ():
            for key, value in row.get("metrics", {}).items():
                found.setdefault(key, []).append((row["step"], value))
        return found

    @cached_property
    def step_ratio(self) -> StepRatios:
        """What the steps were: as `EqualStep` measured them after its work, or as `UpdateRatioMonitor` saw them."""
        return self._ratios("realised")

    @cached_property
    def wanted_ratio(self) -> StepRatios:
        """What the optimizer wanted the steps to be; the same as `step_ratio` without `EqualStep`."""
        return self._ratios("ratio")

    def to_dict(self) -> dict[str, Any]:
        """The run as JSON holds it."""
        return plain(asdict(self))

    @classmethod
    def from_dict(cls, fields: Row) -> Run:
        """The run that `to_dict` described."""
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
        """The columns of a record whose keys are ``<prefix>L00``, ``<prefix>L01``, ..."""
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
        """Of each layer over the steps in which it had an update; None where it had none at all."""
        columns = [[r for r in column if r is not None] for column in zip(*self.ratios, strict=True)]
        return [sum(column) / len(column) if column else None for column in columns]

    @property
    def spread(self) -> float | None:
        """Largest over smallest mean of the layers that had updates."""
        known = [r for r in self.mean if r]
        return max(known) / min(known) if known else None


def write_header(
    folder: Path, name: str, callback: str, step: int, settings: Row | None = None, fit: Row | None = None
) -> None:
    """Opens a callback's record of a fit.

    Args:
        folder: The run's folder; made if missing.
        name: The callback's ``name``.
        callback: Its class.
        step: The last step that was made before: 0 makes earlier rows void, another one those beyond it.
        settings: As `Record` has them.
        fit: As `Record` has them.

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
            f"{callback} cannot write its record to {folder}: {error.strerror or error}. Give the logger another "
            "save_dir, or the Trainer logger=False to keep none."
        ) from error


def write_row(folder: Path, name: str, row: Row) -> None:
    """Appends one row to a callback's record."""
    with open(_file(folder, name), "a", encoding="utf-8") as file:
        file.write(_json(row) + "\n")


def write_null(folder: Path, draws: Sequence[Mapping[str, Profile]]) -> None:
    """Writes the profiles of noise of the same size beside a run's own, one draw per seed from 0 on."""
    write_header(folder, "null", "null_profiles", 0, {"seeds": list(range(len(draws)))})
    for seed, draw in enumerate(draws):
        write_row(folder, "null", {"step": seed, "profiles": {m: p.to_dict() for m, p in draw.items()}})


def read_runs(*folders: str | Path) -> list[Run]:
    """The runs at or below some folders; one that was measured by several `DepthProfile` counts once for each.

    Args:
        folders: Each one per run's folder, or one that holds such folders at any depth.

    Raises:
        ValueError: A folder that does not exist or holds no run, or a file that is no record.
    """
    found: dict[Path, None] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise ValueError(
                f"{folder} is not a folder: name the folder of a run (its logger's, such as "
                "lightning_logs/version_0), or one that holds several."
            )
        below = sorted({file.parent.parent for file in folder.rglob(f"{FOLDER}/*.jsonl")}, key=_natural)
        if not below:
            raise ValueError(
                f"{folder} holds no run of depthcb (no {FOLDER}/*.jsonl at any depth): train with DepthProfile, "
                "EqualStep or UpdateRatioMonitor and any logger."
            )
        found |= dict.fromkeys(path.resolve() for path in below)
    names = _names(list(found))
    return [run for path, name in zip(found, names, strict=True) for run in _runs(path, name)]


def provenance() -> dict[str, Any]:
    """Where a run comes from: versions, seed, git commit and date."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        if name in sys.modules:
            try:
                versions[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:  # on the path without being installed
                continue
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions,
        "seed": os.environ.get("PL_GLOBAL_SEED"),  # None: seed_everything was not called
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    """The commit checked out where the run was started, marked where files differ from it; None outside of git."""
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
    """Settings as JSON has them; what it doesn't know, such as a function, becomes its name or its class's."""
    found: dict[str, Any] = json.loads(_json(settings))
    return found


def _json(row: Row) -> str:
    return json.dumps(row, default=lambda value: getattr(value, "__qualname__", type(value).__qualname__))


def _file(folder: Path, name: str) -> Path:
    return folder / FOLDER / f"{quote(name, safe='')}.jsonl"


def _end_torn_line(path: Path) -> None:
    """Ends the line that a kill left half-written, so that the next one starts anew."""
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
    """The last fit that a file tells of; None where a kill left less than a header."""
    head: dict[str, Any] | None = None
    rows: dict[int, dict[str, Any]] = {}
    end: dict[str, Any] | None = None
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            row = json.loads(line)
            step = int(row["step"])
        except (ValueError, KeyError, TypeError):
            warnings.warn(f"{path}, line {number} is damaged, as a kill may leave it: it is left out.", stacklevel=2)
            continue
        if "callback" in row:
            head, end = row, None
            rows = {s: kept for s, kept in rows.items() if s <= step} if step else {}
        elif head is None:
            raise ValueError(f"{path}, line {number}: a row without a header before it; this is no record of depthcb.")
        elif "end" in row:
            end = row["end"]
        else:
            rows[step] = rows.get(step, {}) | row  # optimizers that step in turns share a step
    if head is None:
        return None
    kept = tuple(rows[step] for step in sorted(rows))
    return Record(head["callback"], head["settings"], head["fit"], head["provenance"], kept, end)


def _names(paths: Sequence[Path]) -> list[str]:
    """What is left of the paths without what they share; of a single one its last folder, or two if it is a version."""
    if len(paths) == 1:
        parts = paths[0].parts
        return ["/".join(parts[-2:] if parts[-1].startswith("version_") else parts[-1:])]
    shared = Path(os.path.commonpath(paths))
    return [str(path.relative_to(shared)) if path != shared else path.name for path in paths]


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sorts version_10 after version_9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(path))]
