"""How a run of a study ended: ``result.json``, read and written here alone."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from depthcb_recipes.publish import write_whole
from depthcb_recipes.studies.grid import VERSION, RunConfig, digest

RESULT, CONFIG = "result.json", "run.yaml"
FINISHED = "finished"


@dataclass(frozen=True, kw_only=True)
class Figures:
    """The figures of a finished run that the study's table and claims are computed from.

    Args:
        pair: What the run shares with its twin under the other control, see `RunConfig.pair`.
        slope: Locality gradient of the last profile under the first measure.
        profiles: The last profile by measure, as `Profile.to_dict` gives it.
        null: The null's profiles by measure, one per draw of noise, in the same form.
        matched_null: The same of the change-matched null; empty if no scale was found that changes as much, and in
            files before version 3.
        wanted_spread: max / min over layers of the step ratios that the optimizer wanted.
        realised_spread: The same of the step ratios after the control.
        lowest_rank: Smallest effective rank of a layer's reference.
        loss_before: First validation loss, nats.
        loss: Last validation loss, nats.
        seconds: Wall-clock time of the fit; None where the record does not say.
        provenance: Versions, seed, git commit and date.
        initial_weights: SHA-256 of the weights that the fit started from.
        data_order: SHA-256 of the batches in their order.
        objective_distance_interval: Its 95 % interval over batches; None where it is not resolved.
        objective_distance: 1 - cos of the gradients of pretraining and of the fit; None where it was not measured.
        objective_procrustes_uncorrected: Procrustes distance of the same gradients, not corrected for batch noise; None
            where it was not measured.
        worth_correlation: Rank correlation of the layers' change with their worth; None where it was not measured.
        backbone: The fields of `depthcb_recipes.backbones.catalogue.Backbone`.
        precision: What the fit was trained in; None in older files, which do not say.
        trained_parameters: Number of parameters that were trained; None in older files.
        peak_memory: The most bytes that the run's process held: of the GPU if it had one, else of main memory; None in
            older files.
    """

    pair: str
    slope: float
    profiles: Mapping[str, Mapping[str, Any]]
    null: Mapping[str, Sequence[Mapping[str, Any]]]
    wanted_spread: float | None
    realised_spread: float | None
    lowest_rank: float
    loss_before: float
    loss: float
    seconds: float | None
    provenance: Mapping[str, Any]
    initial_weights: str
    data_order: str
    objective_distance: float | None
    backbone: Mapping[str, Any]
    precision: str | None = None
    matched_null: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    objective_distance_interval: Sequence[float] | None = None
    objective_procrustes_uncorrected: float | None = None
    worth_correlation: float | None = None
    trained_parameters: int | None = None
    peak_memory: int | None = None


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Args:
        status: ``"finished"``, or why there are no figures: ``"out of memory"``, ``"not finite"``,
            ``"missing model"``, ``"failed"`` or ``"killed"``.
        config: The run's configuration.
        figures: None unless finished.
        message: What went wrong; empty if nothing did.
        version: Of the file that it was read from.
    """

    status: str
    config: RunConfig
    figures: Figures | None = None
    message: str = ""
    version: int = field(default=VERSION, compare=False)

    @property
    def finished(self) -> bool:
        """Whether the run has figures."""
        return self.figures is not None

    @property
    def summary(self) -> str:
        """The result in a few words."""
        return f"slope {self.figures.slope:+.3g}" if self.figures else f"{self.status}: {self.message}"

    def to_dict(self) -> dict[str, Any]:
        """The result as the file has it, figures and the rest side by side."""
        rest = dataclasses.asdict(self.figures) if self.figures else {"message": self.message}
        return {"version": VERSION, "status": self.status, "config": self.config.to_dict(), **rest}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Result:
        """Reads what `to_dict` gave, now or in an earlier version.

        Raises:
            ValueError: A later version, or something missing.
        """
        version = fields.get("version", 1)
        if version > VERSION:
            raise ValueError(f"it has version {version}, and this depthcb reads up to {VERSION}: update depthcb")
        names = [f.name for f in dataclasses.fields(Figures)]
        try:
            config, status = RunConfig(**fields["config"]), fields["status"]
            figures = Figures(**{n: fields[n] for n in names if n in fields}) if status == FINISHED else None
        except (KeyError, TypeError) as error:
            raise ValueError(f"it is no result of a run ({error}): remove it") from error
        return cls(status, config, figures, fields.get("message", ""), version)


def read_result(folder: Path) -> Result | None:
    """Reads a run's result.

    Args:
        folder: The run's folder.

    Returns:
        The result; None where there is none, or where the file is damaged, with a warning: the run is then made again.

    Raises:
        ValueError: The file cannot be read, or belongs to a later version.
    """
    path = folder / RESULT
    try:
        text = path.read_bytes().decode("utf-8", errors="replace")  # a damaged bit need not be text
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): give this user the right to.") from error
    fields: dict[str, Any] = {}
    with contextlib.suppress(ValueError):
        fields = json.loads(text)
    if not isinstance(fields, dict) or fields.get("sha256") != _checksum(fields):
        warnings.warn(f"{path} is damaged (its checksum differs): the run is made again.", stacklevel=2)
        return None
    if "config" not in fields:  # a killed run's, in version 1
        fields["config"] = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    try:
        return Result.from_dict(fields)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error


def write_result(folder: Path, result: Result, check: Callable[[], None] = lambda: None) -> None:
    """Writes a run's result with a checksum of itself, whole or not at all.

    Args:
        folder: The run's folder.
        result: The result.
        check: Called right before the file gets its name; an error prevents it.
    """
    fields = json.loads(json.dumps(result.to_dict()))
    write_whole(folder / RESULT, json.dumps(fields | {"sha256": _checksum(fields)}, indent=1) + "\n", check)


def _checksum(fields: Mapping[str, Any]) -> str:
    return digest({key: value for key, value in fields.items() if key != "sha256"})
