"""Recipes: objectives as LightningModules, the text they are trained on, the backbones to start from, and studies.

An objective or a data module is imported from here by its name alone. It is found by the name of its file:
``depthcb_recipes.CausalLM`` is the class in ``objectives/causal_lm.py``.
"""

from __future__ import annotations

import pkgutil
import re
from importlib import import_module
from pathlib import Path
from typing import Any

#: The bundled YAML files, one per objective.
CONFIGS = Path(__file__).with_name("configs")
#: The packages whose classes are found by their names.
_PACKAGES = ("objectives", "data")
_FUNCTIONS = {"load_backbone": "backbones.loading", "python_corpus": "data.corpus"}


def __getattr__(name: str) -> Any:
    # Importing on first use keeps `import depthcb_recipes`, and a command line's --help, free of torch.
    module = _FUNCTIONS.get(name) or _module_of(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{module}"), name)


def _module_of(name: str) -> str | None:
    """The module of a class: ``"objectives.causal_lm"`` for ``"CausalLM"``."""
    file = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
    found = [package for package in _PACKAGES if Path(__file__).with_name(package).joinpath(f"{file}.py").is_file()]
    return f"{found[0]}.{file}" if found and name[0].isupper() else None


def configuration_file(name: str) -> Path:
    """Returns the file of a configuration.

    Args:
        name: Name of a bundled one, or a YAML file.

    Raises:
        ValueError: It is neither.
    """
    bundled = CONFIGS / f"{name}.yaml"
    if not bundled.is_file() and not Path(name).exists():
        known = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml")))
        raise ValueError(f"There is no configuration {name!r}: name a YAML file, or one of {known}.")
    return bundled if bundled.is_file() else Path(name)


def import_all() -> None:
    """Imports all objectives and data modules, so that LightningCLI finds each by its bare name."""
    for package in _PACKAGES:
        for module in pkgutil.iter_modules([str(Path(__file__).with_name(package))]):
            import_module(f"{__name__}.{package}.{module.name}")
