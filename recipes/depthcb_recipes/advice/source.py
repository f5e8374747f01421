"""The training that a run's folder or a command line describes, as a run of a study, to repeat with other layers."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from depthcb.advice import RUN, Proposal
from depthcb_recipes import CONFIGS, configuration_file
from depthcb_recipes.studies.grid import PRECISION, RunConfig
from depthcb_recipes.studies.result import CONFIG

#: What `depthcb fit` leaves of its resolved configuration.
_FIT_CONFIG = "config.yaml"
#: The Trainer's options that are part of a training; the others say where it runs and what it shows.
TRAINER = (
    "max_steps", "max_epochs", "limit_train_batches", "limit_val_batches", "val_check_interval",
    "check_val_every_n_epoch", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "precision",
    "num_sanity_val_steps", "log_every_n_steps",
)  # fmt: skip
#: The options of ``depthcb fit`` that say how a model is trained.
_OPTION = re.compile(r"--((model\.(?!backbone)|data\.|trainer\.)[\w.]+|seed_everything)")
#: What each training of a test sets itself.
_OWN = ("backbone", "optimizer", "seed", "train_layers", "lora_rank")


def training_of(folder: Path) -> RunConfig:
    """Returns the training of a run, without its callbacks and control.

    Args:
        folder: The folder of a run of ``depthcb fit`` or of a study, or one that contains it alone.

    Raises:
        ValueError: It is of neither, or of an objective or data module that is not bundled.
    """
    for name, read in ((CONFIG, _of_study), (_FIT_CONFIG, _of_fit)):
        found = sorted(folder.rglob(name))
        if len(found) == 1:
            return read(found[0])
    raise ValueError(
        f"{folder} has no configuration to train again ({CONFIG} of a study, or {_FIT_CONFIG} of `depthcb fit`): "
        "--test needs one of these runs."
    )


def training_named(model: str, config: str, options: Sequence[str]) -> RunConfig:
    """Returns the training of a model as ``depthcb fit --config`` makes it.

    Args:
        model: A backbone's name, a hub id or a local folder.
        config: Name of a bundled configuration, or a YAML file.
        options: Further options of ``depthcb fit``, each a name followed by its value: ``--data.batch_size 8``.

    Raises:
        ValueError: The configuration cannot be read, or is none of an objective with data; or an option is unknown.
    """
    path = configuration_file(config)
    recipe = {} if path.parent == CONFIGS else _recipe(path)
    own = _parsed(options)
    of_file = recipe.get("model", {}).get("init_args", {})
    optimizer = own.pop("model.optimizer", of_file.get("optimizer", "adamw"))
    seed = own.pop("seed_everything", 0)
    return RunConfig(model, path.stem, optimizer, "standard", seed, options=own, recipe=recipe)


def _recipe(path: Path) -> dict[str, Any]:
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        json.dumps(recipe)  # a study's runs are known by a hash of it
    except (OSError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path} cannot be read ({' '.join(str(error).split())}).") from error
    if not isinstance(recipe, dict) or not all(isinstance(recipe.get(part), dict) for part in ("model", "data")):
        raise ValueError(f"--config {path} must have 'model:' and 'data:', each with a class_path.")
    return recipe


def _parsed(options: Sequence[str]) -> dict[str, Any]:
    """Returns options of the command line by their names."""
    found, rest = {}, list(options)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not _OPTION.fullmatch(name) or not (equals or rest):
            raise ValueError(f"unrecognized arguments: {name}")
        found[name.removeprefix("--")] = yaml.safe_load(value if equals else rest.pop(0))
    return found


def without_a_run(found: Sequence[Proposal], command: str) -> list[Proposal]:
    """Returns the proposals; those of rules that need a finished run say so, and how to make one.

    Args:
        found: The proposals.
        command: The command that makes the run.
    """
    missing = f"needs a finished run: `{command}`, then `depthcb advise` with its folder"
    return [dataclasses.replace(p, sets=(), missing=missing) if p.rule.cost == RUN else p for p in found]


def fit_command(model: str, config: str, options: Sequence[str]) -> str:
    """Returns the ``depthcb fit`` of a model on a configuration, with a record for the rules that need one.

    Example:
        >>> fit_command("minilm", "contrastive", []).split(" --trainer.callbacks.")
        ['depthcb fit --config contrastive --model.backbone minilm', 'pretrained cpu', 'worth true']
    """
    worth = ["--trainer.callbacks.pretrained", "cpu", "--trainer.callbacks.worth", "true"]
    return shlex.join(["depthcb", "fit", "--config", config, "--model.backbone", model, *options, *worth])


def _of_study(path: Path) -> RunConfig:
    config = RunConfig(**yaml.safe_load(path.read_text(encoding="utf-8")))
    bundled = yaml.safe_load((CONFIGS / f"{config.objective}.yaml").read_text(encoding="utf-8"))
    options = {"model.lr": bundled["model"]["init_args"]["lr"], **config.options}
    options.pop("trainer.callbacks", None)
    return RunConfig(config.model, config.objective, config.optimizer, "standard", config.seed, options=options)


def _of_fit(path: Path) -> RunConfig:
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    model, data, trainer = config["model"], config["data"], config["trainer"]
    objective = _bundled(path, model, data)
    options = {f"trainer.{name}": trainer[name] for name in TRAINER if name in trainer}
    for prefix, part in (("model", model), ("data", data)):
        options |= {f"{prefix}.{name}": v for name, v in part["init_args"].items() if name not in _OWN}
    own = model["init_args"]
    options[PRECISION] = str(trainer["precision"])
    return RunConfig(own["backbone"], objective, own["optimizer"], "standard", _seed(config), options=options)


def _seed(config: Mapping[str, Any]) -> int:
    seed = config.get("seed_everything")
    return int(seed) if isinstance(seed, int) and not isinstance(seed, bool) else 0


def _bundled(path: Path, model: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    """Returns the name of the bundled configuration with the same classes."""

    def classes(*parts: Mapping[str, Any]) -> list[str]:  # depthcb_recipes.CausalLM is also known by its file
        return [str(part["class_path"]).rpartition(".")[2] for part in parts]

    for known in sorted(CONFIGS.glob("*.yaml")):
        bundled = yaml.safe_load(known.read_text(encoding="utf-8"))
        if classes(bundled["model"], bundled["data"]) == classes(model, data):
            return known.stem
    raise ValueError(
        f"{path} trains {' on '.join(classes(model, data))}, which no bundled configuration does: --test knows "
        f"{', '.join(sorted(known.stem for known in CONFIGS.glob('*.yaml')))}."
    )
