"""Units of parameters that have one step ratio each: layers, or the groups or matrices inside them.

Attention and MLP are told apart by structure: what a layer calls attention is attention, what it calls an MLP or what
else has matrices beside attention is the MLP, and the only sublayer of a layer without attention is its mixer (Mamba).
There is no table of model names. If this leaves something open, the search raises an error instead of guessing.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn

from depthcb.profile import layer_key
from depthcb.stack import LayerStack, clean_name

UnitKind = Literal["layer", "matrix", "group"]
#: Globs over the names of the parameters inside a layer, by group.
Groups = Mapping[str, str | Sequence[str]]

#: The unit of all tensors of one dimension in a layer, where each matrix is a unit.
VECTORS = "vectors"
ATTENTION, MLP, MIXER, NORM = "attention", "mlp", "mixer", "norm"
#: What modules of either kind have in their attribute or class name [ours].
_WORDS = {ATTENTION: re.compile("attn|attention", re.I), MLP: re.compile("mlp|feed_?forward|ffn", re.I)}


@dataclass(frozen=True)
class Unit:
    """Parameters that have one step ratio.

    Args:
        key: Name in logged keys: ``L07``, ``L07/attention``, ``L07/mlp.c_fc.weight`` or ``L07/vectors``.
        name: Name in messages: the module's, with the part of it.
        parameters: Its parameters, including frozen ones.
    """

    key: str
    name: str
    parameters: list[nn.Parameter]


def check_unit(unit: str, groups: Groups | None) -> None:
    """Validates the arguments of `find_units`.

    Raises:
        ValueError: The unit is unknown, or ``groups`` are given for another unit than "group", or cannot be keys.
    """
    if unit not in get_args(UnitKind):
        raise ValueError(f"unit={unit!r} is unknown: use one of {get_args(UnitKind)}.")
    if groups is not None and unit != "group":
        raise ValueError(f"groups= names groups, but unit={unit!r}: pass unit='group' with it.")
    for group in groups or ():
        if not re.fullmatch(r"[\w.-]+", group):
            raise ValueError(f"groups has the name {group!r}: use letters, digits, '_', '-' and '.'.")


def unit_settings(unit: UnitKind, groups: Groups | None) -> dict[str, Any]:
    """Returns the settings by which a record says its units; none for layers."""
    return {} if unit == "layer" else {"unit": unit} | ({"groups": dict(groups)} if groups else {})


def find_units(
    stack: LayerStack, unit: UnitKind = "layer", groups: Groups | None = None, outside: bool = False
) -> list[Unit]:
    """Divides the parameters of a stack into units, in depth order; a tied tensor belongs to its first layer.

    Args:
        stack: The layers.
        unit: ``"layer"``: each layer. ``"matrix"``: each tensor of two or more dimensions, and in each layer all
            others together. ``"group"``: in each layer attention, MLP (or a mixer) and norms, found by structure.
        groups: Groups named by globs over the names of a layer's parameters, such as ``{"experts": "*.experts.*"}``.
            The first match counts; what none matches is found by structure.
        outside: Whether each module that owns parameters outside the stack is another layer, which has no groups.

    Raises:
        ValueError: An argument is invalid, groups can't be told apart, or a glob matches nothing.

    Example:
        >>> layers = [nn.TransformerEncoderLayer(4, 2, 8) for _ in range(2)]
        >>> stack = LayerStack.find(nn.ModuleList(layers))
        >>> [unit.key for unit in find_units(stack, "group")][:4]
        ['L00/attention', 'L00/mlp', 'L00/norm', 'L01/attention']
        >>> [unit.key for unit in find_units(stack, "matrix")][:4]
        ['L00/self_attn.in_proj_weight', 'L00/self_attn.out_proj.weight', 'L00/linear1.weight', 'L00/linear2.weight']
    """
    check_unit(unit, groups)
    units, unused = [], {glob for _, glob in _globs(groups)}
    for index, (name, layer, parameters) in enumerate(zip(stack.names, stack.modules, stack.parameters(), strict=True)):
        if unit == "layer":
            units.append(Unit(layer_key(index), name, parameters))
            continue
        own = set(parameters)
        named = {clean_name(n): p for n, p in layer.named_parameters() if p in own}
        if unit == "matrix":
            parts = _by_matrix(named)
        else:
            unused -= {glob for _, glob in _globs(groups) if fnmatch.filter(named, glob)}
            parts = groups_of(name, layer, named, groups)
        units += _units(layer_key(index), name, named, parts)
    if unused:
        raise ValueError(f"groups: {', '.join(map(repr, sorted(unused)))} matches no parameter of any layer.")
    names = {p: clean_name(n).rpartition(".")[2] for n, p in stack.root.named_parameters()}
    for module, parameters in stack.outside().items() if outside else ():
        if unit == "matrix":
            named = {names[p]: p for p in parameters}
            units += _units(module, module, named, _by_matrix(named))
        else:
            units.append(Unit(module, module, parameters))
    return units


def _units(key: str, name: str, named: Mapping[str, nn.Parameter], parts: Mapping[str, str]) -> list[Unit]:
    """Returns one unit for each distinct part, given the part of each parameter by its name."""
    by_part: dict[str, list[nn.Parameter]] = {}
    for path, parameter in named.items():
        by_part.setdefault(parts[path], []).append(parameter)
    ordered = sorted(by_part, key=lambda part: part == VECTORS)  # otherwise in the order of the parameters
    return [Unit(f"{key}/{part}", f"{name}/{part}", by_part[part]) for part in ordered]


def _by_matrix(named: Mapping[str, nn.Parameter]) -> dict[str, str]:
    return {path: path if p.dim() > 1 else VECTORS for path, p in named.items()}


def _globs(groups: Groups | None) -> Iterator[tuple[str, str]]:
    """Yields each group with each of its globs."""
    for group, globs in (groups or {}).items():
        for glob in [globs] if isinstance(globs, str) else globs:
            yield group, glob


def groups_of(
    name: str, layer: nn.Module, named: Mapping[str, nn.Parameter], groups: Groups | None = None
) -> dict[str, str]:
    """Returns the group of each parameter of a layer.

    Raises:
        ValueError: Something is neither named by a glob nor known by structure.
    """
    modules: dict[str, nn.Module] = {}
    for path, module in layer.named_modules(remove_duplicate=False):
        modules[clean_name(path)] = module  # of a module and its wrapper, the module
    parts, unknown = {}, {}
    for path, parameter in named.items():
        matched = next((group for group, glob in _globs(groups) if fnmatch.fnmatchcase(path, glob)), None)
        part = matched or _known(path, parameter, modules)
        if part is None:
            unknown[path] = _sublayer(path, modules)
        else:
            parts[path] = part
    sublayers = list(dict.fromkeys(unknown.values()))
    alone = len(sublayers) == 1 and any(True for _ in modules[sublayers[0]].children()) and sublayers[0]
    if unknown and ATTENTION in parts.values() and MLP not in parts.values():
        rest = MLP
    elif unknown and (ATTENTION in parts.values() or not alone):
        raise ValueError(
            f"unit='group': layer {name!r} has {', '.join(s or next(iter(unknown)) for s in sublayers)}, of which its "
            "structure doesn't say what is attention and what an MLP: name groups by globs over its parameters, "
            f"{next(iter(unknown))!r} and so on, as in groups={{'attention': '*attn*', 'rest': '*'}}, or use "
            "unit='matrix'."
        )
    else:
        rest = MIXER
    return {path: parts.get(path, rest) for path in named}


def _known(path: str, parameter: nn.Parameter, modules: Mapping[str, nn.Module]) -> str | None:
    """Returns the group that a parameter's own module, or a name on the way to it, tells; else None."""
    owner = path.rpartition(".")[0]
    own = list(modules[owner].parameters(recurse=False))
    leaf = not any(True for _ in modules[owner].children())
    if parameter.dim() < 2 and (not owner or (leaf and all(p.dim() < 2 for p in own))):
        return NORM
    return next((kind for at in _above(owner) for kind, word in _WORDS.items() if _called(at, modules[at], word)), None)


def _called(path: str, module: nn.Module, word: re.Pattern[str]) -> bool:
    return bool(word.search(path.rpartition(".")[2]) or word.search(type(module).__name__))


def _above(path: str) -> list[str]:
    """Returns a module's name after those of the modules that contain it, outermost first.

    >>> _above("attention.output.dense")
    ['attention', 'attention.output', 'attention.output.dense']
    """
    names = path.split(".") if path else []
    return [".".join(names[: i + 1]) for i in range(len(names))]


def _sublayer(path: str, modules: Mapping[str, nn.Module]) -> str:
    """Returns the name of the outermost module inside the layer, other than a list, that has a parameter."""
    above = _above(path.rpartition(".")[0])
    return next((at for at in above if not isinstance(modules[at], (nn.ModuleList, nn.Sequential))), "")
