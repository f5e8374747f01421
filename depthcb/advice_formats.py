"""A set of layers in the form that each ecosystem takes: peft, freeze lists, finetuning-scheduler, ``layers=``."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from typing import Any


def peft_arguments(names: Sequence[str], chosen: Sequence[int], linear: Sequence[str]) -> dict[str, Any]:
    r"""Returns the arguments of peft's ``LoraConfig`` that put adapters on the linear modules of the chosen layers.

    Args:
        names: Names of all layers.
        chosen: The layers to train.
        linear: Names of the linear modules inside the layers.

    Returns:
        ``target_modules``, ``layers_to_transform`` and ``layers_pattern``; or, where layers are not one numbered list,
        ``target_modules`` alone, a regular expression.

    Example:
        >>> peft_arguments(["encoder.layer.0", "encoder.layer.1"], [1], ["query"])
        {'target_modules': ['query'], 'layers_to_transform': [1], 'layers_pattern': 'layer'}
        >>> peft_arguments(["stage1.0", "stage2.0"], [1], ["conv"])
        {'target_modules': '(.*\\.)?(stage2\\.0)\\.(conv)'}
    """
    parts = [name.rsplit(".", 2) for name in names]
    if all(len(p) > 1 and p[-1].isdigit() for p in parts) and len({tuple(p[:-1]) for p in parts}) == 1:
        numbers = [int(parts[i][-1]) for i in chosen]
        return {"target_modules": list(linear), "layers_to_transform": numbers, "layers_pattern": parts[0][-2]}
    layers, modules = ("|".join(map(re.escape, some)) for some in ([names[i] for i in chosen], linear))
    return {"target_modules": rf"(.*\.)?({layers})\.({modules})"}


def lora_config(names: Sequence[str], chosen: Sequence[int], linear: Sequence[str]) -> str:
    """Returns the Python expression of `peft_arguments`.

    Example:
        >>> lora_config(["h.0", "h.1"], [0], ["fc"])
        "LoraConfig(target_modules=['fc'], layers_to_transform=[0], layers_pattern='h')"
    """
    arguments = peft_arguments(names, chosen, linear).items()
    return f"LoraConfig({', '.join(f'{name}={value!r}' for name, value in arguments)})"


def frozen(names: Sequence[str], chosen: Sequence[int]) -> list[str]:
    """Returns the names of the layers to freeze.

    Example:
        >>> frozen(["h.0", "h.1", "h.2"], [1])
        ['h.0', 'h.2']
    """
    return [name for i, name in enumerate(names) if i not in set(chosen)]


def layers_argument(names: Sequence[str], chosen: Sequence[int]) -> str | list[str]:
    """Returns ``layers=`` for depthcb's callbacks: a glob if one matches these layers alone, else their names.

    Example:
        >>> layers_argument(["h.0", "h.1", "h.2"], [1, 2]), layers_argument(["h.9", "h.10"], [0, 1])
        ('h.[12]', 'h.*')
        >>> layers_argument(["h.8", "h.9", "h.10"], [1, 2])
        ['h.9', 'h.10']
    """
    own = [names[i] for i in chosen]
    stems = {name.rpartition(".")[0] for name in own}
    ends = "".join(name.rpartition(".")[2] for name in own)
    for glob in (f"{min(stems)}.*", f"{min(stems)}.[{ends}]") if len(stems) == 1 and min(stems) else ():
        if fnmatch.filter(names, glob) == own:
            return glob
    return own


def schedule(names: Sequence[str], chosen: Sequence[int]) -> str:
    r"""Returns a schedule for finetuning-scheduler with one phase, which trains the chosen layers (YAML).

    A new head must be added to the phase by hand: the record doesn't know which parameters are new.

    Example:
        >>> print(schedule(["model.h.0", "model.h.1"], [1]))
        0:
          params:
          - model\.h\.1\..*
    """
    return "\n".join(["0:", "  params:", *(f"  - {re.escape(names[i])}\\..*" for i in chosen)])


def as_dict(names: Sequence[str], chosen: Sequence[int], linear: Sequence[str]) -> dict[str, Any]:
    """Returns all forms, in JSON types."""
    return {
        "layers": list(chosen),
        "peft": peft_arguments(names, chosen, linear),
        "freeze": frozen(names, chosen),
        "glob": layers_argument(names, chosen),
        "finetuning_scheduler": schedule(names, chosen),
    }
