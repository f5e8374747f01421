"""The training that a run's folder describes, as a run of a study, so that it can be repeated with other layers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from depthcb_recipes import CONFIGS
from depthcb_recipes.studies.grid import PRECISION, RunConfig
from depthcb_recipes.studies.result import CONFIG

#: What `depthcb fit` leaves of its resolved configuration.
_FIT_CONFIG = "config.yaml"
#: The Trainer's options that are part of a training; the others say where it runs and what it shows.
_TRAINER = (
    "max_steps", "max_epochs", "limit_train_batches", "limit_val_batches", "val_check_interval",
    "check_val_every_n_epoch", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "precision",
    "num_sanity_val_steps", "log_every_n_steps",
)  # fmt: skip
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
    options = {f"trainer.{name}": trainer[name] for name in _TRAINER if name in trainer}
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
