"""A study's YAML file, and the configurations of its runs."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import yaml

from depthcb.run import CONTROLS, Control
from depthcb_recipes import CONFIGS
from depthcb_recipes.backbones.architectures import ARCHITECTURES, Family

#: The axes of the grid, in the order of the table's columns.
AXES = ("model", "objective", "optimizer", "control", "seed")
#: What options can depend on besides the axes: the family of a model, see `depthcb_recipes.backbones.catalogue`.
FAMILY = "family"
#: The measures of a profile that names none: those of `depthcb.DepthProfile`, which is not imported here (slow).
_MEASURES = ("cka", "cka_normalized")
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
        objective: Name of a bundled configuration of ``depthcb fit``, or of a file of the user's own.
        optimizer: ``"adamw"`` or ``"sgd"``.
        control: ``"standard"`` or ``"equal-step"``.
        seed: Of newly initialised weights, dropout and data order.
        threads: CPU threads of the run; they are part of the configuration because they change the last digit of sums.
        gpus: GPUs of the run, for the same reason; 0 is the CPU, even on a machine with GPUs.
        null_seeds: Draws of noise for each of the two nulls; 0 measures none.
        options: Options of ``depthcb fit`` beyond the objective's own configuration.
        recipe: What the user's own file says, so that a run is determined by its contents; empty for a bundled one.

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
    recipe: Mapping[str, Any] = field(default_factory=dict)

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
        """The values of the axes, and what is trained if not everything, for messages."""
        layers, rank = (self.options.get(f"model.{option}") for option in ("train_layers", "lora_rank"))
        trained = "" if layers is None else f" layers {','.join(map(str, layers))}"
        return " ".join(str(getattr(self, axis)) for axis in AXES) + trained + (f" LoRA {rank}" if rank else "")

    def to_dict(self) -> dict[str, Any]:
        """Returns the configuration in JSON types."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__} | {"options": dict(self.options)}
        del fields["recipe"]
        return fields | ({"recipe": dict(self.recipe)} if self.recipe else {})


def digest(fields: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of a JSON object, which does not depend on the order of its keys."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Study:
    """What a study's file says.

    Args:
        runs: The runs, in the order of the grids and their axes.
        deciding: Name of the measure that verdicts and claims go by; None for the first one of the profiles.
    """

    runs: list[RunConfig]
    deciding: str | None = None


def read_study(path: str | Path) -> list[RunConfig]:
    """Reads a study and returns its runs, see `load_study`."""
    return load_study(path).runs


def load_study(path: str | Path) -> Study:
    """Reads a study.

    The file has ``grid`` (one list each for model, objective, optimizer, control and seed; or a list of such grids,
    whose runs come one after another). An objective is the name of a bundled configuration, or a YAML file of your own,
    as ``depthcb fit --config`` takes it, named relative to the study's folder. The file may also have ``threads``,
    ``gpus``, ``null_seeds``, ``options`` (for every fit), ``deciding`` (the measure that verdicts go by) and ``by``:
    options, or these numbers, for the runs with one value of an axis, or of one family of models (``by: {optimizer:
    {sgd: {model.lr: 0.1}}, family: {encoder: {...}}, model: {gpt2-xl: {gpus: 2}}}``). Where two entries of ``by`` set
    the same option, the later one holds.

    Args:
        path: The file.

    Raises:
        ValueError: The file is not a valid study; the message says where and what to write instead.
    """
    study = _file(path)
    grids = study["grid"] if isinstance(study["grid"], list) else [study["grid"]]
    points: dict[tuple[Any, ...], None] = {}  # in order
    for number, grid in enumerate(grids):
        where = "grid" if len(grids) == 1 else f"grid[{number}]"
        for own in itertools.product(*(_axis(path, grid, where, axis) for axis in AXES)):
            if own in points:
                raise ValueError(f"The study {path}: {where} has {' '.join(map(str, own))}, as an earlier grid has.")
            points[own] = None
    values = {axis: list(dict.fromkeys(own[i] for own in points)) for i, axis in enumerate(AXES)}
    options_of_all = _options(path, "options", study.get("options"))
    by = _by(path, study.get("by"), values)
    families = _families(path, by, values["model"])
    recipes = _recipes(path, values["objective"])
    defaults = {name: study.get(name, default) for name, (default, _) in _NUMBERS.items()} | options_of_all
    runs = []
    for point in [dict(zip(AXES, own, strict=True)) for own in points]:
        options = dict(defaults)
        for axis, choices in by.items():
            options |= choices.get(families[point["model"]] if axis == FAMILY else point[axis], {})
        numbers = {name: _number(path, name, options.pop(name)) for name in _NUMBERS}
        name, recipe = recipes[point["objective"]]
        runs.append(RunConfig(**(point | numbers | {"objective": name}), options=options, recipe=recipe))
    return Study(runs, _deciding(path, study.get("deciding"), runs))


def measures_of(config: RunConfig) -> list[str]:
    """Returns the names of the measures of a run's profiles, in their order.

    Example:
        >>> measures_of(RunConfig("gpt2-mini", "causal_lm", "adamw", "standard", 0))
        ['cka', 'cka_normalized']
    """
    own = config.recipe.get("trainer", {}).get("callbacks")
    for callback in config.options.get("trainer.callbacks", own) or ():
        if isinstance(callback, dict) and str(callback.get("class_path", "")).endswith("DepthProfile"):
            return list(callback.get("init_args", {}).get("measures", _MEASURES))
    return list(_MEASURES)


def _file(path: str | Path) -> dict[str, Any]:
    """Returns what the file holds, with only the entries that a study and its grids can have."""
    try:
        study = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"The study {path} cannot be read ({error.strerror}).") from error
    except yaml.YAMLError as error:
        raise ValueError(f"The study {path} is not YAML: {' '.join(str(error).split())}") from error
    grid = study.get("grid") if isinstance(study, dict) else None
    grids: list[Any] = grid if isinstance(grid, list) else [grid]
    if not isinstance(study, dict) or not grids or not all(isinstance(each, dict) for each in grids):
        raise ValueError(
            f"The study {path} has no grid: give a list for each of {', '.join(AXES)} under 'grid:', or a list of such "
            "grids."
        )
    known = {"grid", "options", "by", "deciding", *_NUMBERS}
    unknown = [*(set(study) - known), *(name for each in grids for name in set(each) - set(AXES))]
    if unknown:
        raise ValueError(
            f"The study {path} has {', '.join(sorted(unknown))}, which a study cannot have: it takes grid "
            f"({', '.join(AXES)}), options, by, deciding, {', '.join(_NUMBERS)}."
        )
    return study


def _recipes(path: str | Path, objectives: Sequence[str]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Returns for each objective its name, which is a file's without folder and ending, and what its file says."""
    own = {name: _recipe(path, name) for name in objectives if name.endswith((".yaml", ".yml"))}
    found = {name: (Path(name).stem, own[name]) if name in own else (name, {}) for name in objectives}
    names = [name for name, _ in found.values()]
    for written, (name, recipe) in found.items():
        if recipe and (names.count(name) > 1 or (CONFIGS / f"{name}.yaml").is_file()):
            raise ValueError(
                f"The study {path}: grid.objective has {written}, and {name} is also the name of another objective: "
                "rename the file."
            )
    return found


def _recipe(path: str | Path, name: str) -> dict[str, Any]:
    """Returns what a configuration of the user's own says, in the types of JSON, which its hash is computed from."""
    file = Path(path).parent / name
    try:
        recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"The study {path}: grid.objective has {name}, and {file} cannot be read "
            f"({error.strerror}): name it relative to the study's folder."
        ) from error
    except yaml.YAMLError as error:
        raise ValueError(f"The study {path}: {file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict) or not all(isinstance(recipe.get(part), dict) for part in ("model", "data")):
        raise ValueError(f"The study {path}: {file} must have 'model:' and 'data:', each with a class_path.")
    for part, options in recipe.items():
        _options(path, f"{part} of {name}", {part: options})
    return recipe


def _deciding(path: str | Path, deciding: Any, runs: Sequence[RunConfig]) -> str | None:
    for run in runs if deciding is not None else ():
        if deciding not in measures_of(run):
            raise ValueError(
                f"The study {path}: deciding is {deciding!r}, which is not a measure of {run.name} "
                f"({', '.join(measures_of(run))}): name one of these, or add it to DepthProfile's measures."
            )
    return None if deciding is None else str(deciding)


def _families(path: str | Path, by: Mapping[str, Mapping[Any, Any]], models: Sequence[str]) -> dict[str, str]:
    """Returns the family of each model; empty if no option depends on it."""
    if FAMILY not in by:
        return {}
    families: dict[str, str] = {}
    for model in models:
        if model in ARCHITECTURES:
            families[model] = ARCHITECTURES[model].family
            continue
        from depthcb_recipes.backbones.catalogue import family_of  # slow: it imports torch

        try:
            families[model] = family_of(model)
        except ValueError as error:
            raise ValueError(
                f"The study {path}: by.family needs the family of {model!r}, which is not known ({error})"
            ) from error
    return families


def _number(path: str | Path, name: str, value: Any) -> int:
    least = _NUMBERS[name][1]
    if type(value) is not int or value < least:
        raise ValueError(f"The study {path}: {name} is {value!r}; it must be a whole number, {least} or more.")
    return value


def _axis(path: str | Path, grid: Mapping[str, Any], where: str, axis: str) -> list[Any]:
    values = grid.get(axis)
    if not isinstance(values, list) or not values or len(set(map(str, values))) < len(values):
        raise ValueError(
            f"The study {path}: {where}.{axis} is {values!r}; it must be a list of one or more distinct values."
        )
    allowed = {"control": CONTROLS, "optimizer": ("adamw", "sgd")}.get(axis)
    kind = int if axis == "seed" else str
    wrong = [v for v in values if type(v) is not kind or (allowed and v not in allowed)]
    if wrong:
        takes = ", ".join(allowed or ["whole numbers" if axis == "seed" else "names; put quotes around it"])
        raise ValueError(f"The study {path}: {where}.{axis} has {wrong[0]!r}; it takes {takes}.")
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
        if axis not in (*axes, FAMILY):
            raise ValueError(
                f"The study {path}: by.{axis} is not an axis of the grid ({', '.join(AXES)}), nor {FAMILY}."
            )
        if axis == "control":
            raise ValueError(
                f"The study {path}: by.control would have the two runs of a pair differ in more than the control: give "
                "both the same options, or write two studies."
            )
        if not isinstance(choices, (dict, type(None))):
            raise ValueError(f"The study {path}: by.{axis} is {choices!r}; it must map values of the axis to options.")
        known = get_args(Family) if axis == FAMILY else axes[axis]
        missing = [value for value in choices or {} if value not in known]
        if missing:
            takes = f"is none of {', '.join(known)}" if axis == FAMILY else f"is not in grid.{axis}"
            raise ValueError(f"The study {path}: by.{axis} names {missing[0]!r}, which {takes}.")
        found[axis] = {v: _options(path, f"by.{axis}.{v}", options) for v, options in (choices or {}).items()}
    return found
