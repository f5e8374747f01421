"""A study's YAML file, and the configurations of its runs."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from depthcb.run import CONTROLS, Control

#: The axes of the grid, in the order of the table's columns.
AXES = ("model", "objective", "optimizer", "control", "seed")
#: Version of a run's figures and of its hash: rises when either changes. Files of version 1 do not name theirs. From
#: version 3 on both nulls are measured.
VERSION = 3
#: The option of a fit that a study chooses for all of its runs on a kind of device.
PRECISION = "trainer.precision"
#: Integer entries of a study that every run has: default and minimum.
_NUMBERS = {"threads": (1, 1), "gpus": (0, 0), "null_seeds": (8, 1)}


@dataclass(frozen=True)
class RunConfig:
    """Everything that determines the figures of a run.

    Args:
        model: A backbone's name.
        objective: Name of a bundled configuration of ``depthcb fit``.
        optimizer: ``"adamw"`` or ``"sgd"``.
        control: ``"standard"`` or ``"equal-step"``.
        seed: Of newly initialised weights, dropout and data order.
        threads: CPU threads of the run; they are part of the configuration because they change the last digit of sums.
        gpus: GPUs of the run, for the same reason; 0 is the CPU, even on a machine with GPUs.
        null_seeds: Draws of noise for each of the two nulls.
        options: Options of ``depthcb fit`` beyond the objective's own configuration.

    Example:
        >>> a = RunConfig("gpt2-mini", "causal_lm", "adamw", "standard", 0)
        >>> len(a.hash), a.hash == RunConfig("gpt2-mini", "causal_lm", "adamw", "standard", 1).hash
        (16, False)
    """

    model: str
    objective: str
    optimizer: str
    control: Control
    seed: int
    threads: int = 1
    gpus: int = 0
    null_seeds: int = 8
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def hash(self) -> str:
        """Name of the run's folder; equal configurations have equal hashes, in every study."""
        return digest(self.to_dict() | {"version": VERSION})[:16]

    @property
    def pair(self) -> str:
        """Hash that a standard run and its equal-step twin share; their precision is compared separately."""
        options = {name: value for name, value in self.options.items() if name != PRECISION}
        return digest(self.to_dict() | {"version": VERSION, "control": "", "options": options})[:16]

    @property
    def resumes(self) -> bool:
        """Whether a killed run resumes from its last checkpoint, because its data loader has a state [ours]."""
        return bool(self.options.get("data.stateful"))

    @property
    def device(self) -> str:
        """Kind of device that the run uses."""
        return "cuda" if self.gpus else "cpu"

    @property
    def precision(self) -> str:
        """Precision of the fit; ``"auto"`` until the study has chosen one."""
        return str(self.options.get(PRECISION, "auto"))

    @property
    def name(self) -> str:
        """The values of the axes, for messages."""
        return " ".join(str(getattr(self, axis)) for axis in AXES)

    def to_dict(self) -> dict[str, Any]:
        """Returns the configuration in JSON types."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__} | {"options": dict(self.options)}


def digest(fields: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of a JSON object, which does not depend on the order of its keys."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def read_study(path: str | Path) -> list[RunConfig]:
    """Reads a study and returns its runs, in the order of its axes.

    The file has ``grid`` (one list each for model, objective, optimizer, control and seed), and may have ``threads``,
    ``gpus``, ``null_seeds``, ``options`` (for every fit) and ``by``: options, or these numbers, for the runs with one
    value of an axis (``by: {optimizer: {sgd: {model.lr: 0.1}}, model: {gpt2-xl: {gpus: 2}}}``).

    Args:
        path: The file.

    Raises:
        ValueError: The file is not a valid study; the message says where and what to write instead.
    """
    try:
        study = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"The study {path} cannot be read ({error.strerror}).") from error
    except yaml.YAMLError as error:
        raise ValueError(f"The study {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(study, dict) or not isinstance(study.get("grid"), dict):
        raise ValueError(f"The study {path} has no grid: give a list for each of {', '.join(AXES)} under 'grid:'.")
    unknown = [*(set(study) - {"grid", "options", "by", *_NUMBERS}), *(set(study["grid"]) - set(AXES))]
    if unknown:
        raise ValueError(
            f"The study {path} has {', '.join(sorted(unknown))}, which a study cannot have: it takes grid "
            f"({', '.join(AXES)}), options, by, {', '.join(_NUMBERS)}."
        )
    axes = [_axis(path, study["grid"], axis) for axis in AXES]
    options_of_all = _options(path, "options", study.get("options"))
    by = _by(path, study.get("by"), dict(zip(AXES, axes, strict=True)))
    defaults = {name: study.get(name, default) for name, (default, _) in _NUMBERS.items()} | options_of_all
    runs = []
    for values in itertools.product(*axes):
        point = dict(zip(AXES, values, strict=True))
        options = dict(defaults)
        for axis, choices in by.items():
            options |= choices.get(point[axis], {})
        numbers = {name: _number(path, name, options.pop(name)) for name in _NUMBERS}
        runs.append(RunConfig(**(point | numbers), options=options))
    return runs


def _number(path: str | Path, name: str, value: Any) -> int:
    least = _NUMBERS[name][1]
    if type(value) is not int or value < least:
        raise ValueError(f"The study {path}: {name} is {value!r}; it must be a whole number, {least} or more.")
    return value


def _axis(path: str | Path, grid: Mapping[str, Any], axis: str) -> list[Any]:
    values = grid.get(axis)
    if not isinstance(values, list) or not values or len(set(map(str, values))) < len(values):
        raise ValueError(
            f"The study {path}: grid.{axis} is {values!r}; it must be a list of one or more distinct values."
        )
    allowed = {"control": CONTROLS, "optimizer": ("adamw", "sgd")}.get(axis)
    kind = int if axis == "seed" else str
    wrong = [v for v in values if type(v) is not kind or (allowed and v not in allowed)]
    if wrong:
        takes = ", ".join(allowed or ["whole numbers" if axis == "seed" else "names; put quotes around it"])
        raise ValueError(f"The study {path}: grid.{axis} has {wrong[0]!r}; it takes {takes}.")
    return values


def _options(path: str | Path, where: str, options: Any) -> dict[str, Any]:
    """Returns a mapping of options, empty if nothing is given; values are those of JSON."""
    if options is None:
        return {}
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        raise ValueError(f"The study {path}: {where} is {options!r}; it must be a mapping, such as model.lr: 0.1.")
    for name, value in options.items():
        try:
            json.dumps(value)
        except TypeError:
            raise ValueError(
                f"The study {path}: {where} has {name}: {value!r}, which YAML reads as a {type(value).__name__}: put "
                "quotes around it."
            ) from None
    return options


def _by(path: str | Path, by: Any, axes: Mapping[str, list[Any]]) -> dict[str, dict[Any, dict[str, Any]]]:
    """Returns the options by axis and value."""
    found: dict[str, dict[Any, dict[str, Any]]] = {}
    if not isinstance(by, (dict, type(None))):
        raise ValueError(f"The study {path}: by is {by!r}; it must be a mapping of axes ({', '.join(AXES)}).")
    for axis, choices in (by or {}).items():
        if axis not in axes:
            raise ValueError(f"The study {path}: by.{axis} is not an axis of the grid ({', '.join(AXES)}).")
        if axis == "control":
            raise ValueError(
                f"The study {path}: by.control would have the two runs of a pair differ in more than the control: give "
                "both the same options, or write two studies."
            )
        if not isinstance(choices, (dict, type(None))):
            raise ValueError(f"The study {path}: by.{axis} is {choices!r}; it must map values of the axis to options.")
        missing = [value for value in choices or {} if value not in axes[axis]]
        if missing:
            raise ValueError(f"The study {path}: by.{axis} names {missing[0]!r}, which is not in grid.{axis}.")
        found[axis] = {v: _options(path, f"by.{axis}.{v}", options) for v, options in (choices or {}).items()}
    return found
