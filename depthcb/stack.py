"""The depth-ordered layers of any model, their names and their parameters.

A model's layers are found as an ``nn.ModuleList`` or ``nn.Sequential`` of blocks of one class. The search walks the
module tree, input side first, and collects every such list that is not inside a block of another list. Consecutive
lists of one block class (the stages of a ResNet or a Swin) are joined. A block that a wrapper has given a subclass
(parametrizations, FSDP2, quantisation) counts as one of its class. There is no table of model names, so unknown
architectures work if they follow this convention. If two lists are equally plausible, the search raises an error
instead of guessing.
"""

from __future__ import annotations

import difflib
import fnmatch
import itertools
import operator
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from depthcb.warn import warn

#: Attributes that torch.compile, FSDP and activation checkpointing insert into module names.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

#: A second list makes the search ambiguous if it has at least this fraction of the longest list's parameters [ours].
RIVAL_SHARE = 0.1

#: Classes that say nothing about what a module computes.
_GENERIC = frozenset({nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict})

_HOW = "layers='path.to.the.list', a glob such as 'blocks.*', or a list of module names"


@dataclass(frozen=True)
class LayerStack:
    """L layers in depth order, input side first, without embeddings, final norm and head [ours].

    Args:
        names: Name of each layer's module, without torch.compile, FSDP and checkpoint wrappers.
        modules: The layers themselves.
        root: The model that contains them.

    Raises:
        ValueError: There are fewer than 2 layers, a layer is inside another one, or a module appears twice.

    Example:
        >>> from torch import nn
        >>> from depthcb import LayerStack
        >>> model = nn.Sequential(nn.Embedding(9, 4), *[nn.TransformerEncoderLayer(4, 2, 8) for _ in range(3)])
        >>> LayerStack.find(model).names
        ('1', '2', '3')
        >>> LayerStack.find(model, layers=["1", "3"]).names
        ('1', '3')
    """

    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    root: nn.Module

    def __post_init__(self) -> None:
        if len(self.names) < 2:
            found = f"only {self.names[0]!r}" if self.names else "none"
            raise ValueError(f"A layer stack needs at least 2 layers, found {found}: name more of them ({_HOW}).")
        if len({id(m) for m in self.modules}) < len(self.modules):
            raise ValueError(f"One module appears twice among the layers {list(self.names)}: each must be distinct.")
        for name, after in zip(sorted(self.names), sorted(self.names)[1:], strict=False):
            if after.startswith(f"{name}."):
                raise ValueError(f"Layer {after!r} is inside layer {name!r}: name layers that don't overlap.")

    @classmethod
    def find(cls, model: nn.Module, layers: str | Sequence[str] | None = None) -> LayerStack:
        """Finds the stack of ``model``, or returns the one specified by ``layers``.

        Warns if the search left out blocks of the list that it found, or if names are out of depth order.

        Args:
            model: Any module.
            layers: None to search; the path of a list of layers; the path of a submodule to search in; a glob, in which
                ``*`` matches within one dot-separated part; or the module names in depth order.

        Raises:
            ValueError: No stack was found, several are equally plausible, or a name matches nothing.
        """
        if layers is None:
            return _choose(model, _search("", model))
        if not isinstance(layers, str):
            modules = _modules(model)
            _warn_order(layers)
            return cls(tuple(layers), tuple(_lookup(modules, name, model) for name in layers), model)
        if re.search(r"[*?\[]", layers):
            pairs = [(n, m) for n, m in _modules(model).items() if n and _matches(n, layers) and _size(m)]
            if not pairs:
                raise ValueError(f"layers={layers!r} matches no module of {_title(model)}.")
        else:
            module = _unwrap(_lookup(_modules(model), layers, model))
            if not _is_list(module):
                return _choose(model, _search(layers, module), where=layers)
            pairs = [(n, m) for n, m in _children(layers, module) if _size(m)]
        return cls(tuple(n for n, _ in pairs), tuple(m for _, m in pairs), model)

    def __len__(self) -> int:
        return len(self.names)

    def seen(self, args: tuple[Any, ...], output: Any) -> Any:
        """Returns what a probe records of a layer that was called with ``args``: its output."""
        return output

    def parameters(self) -> list[list[nn.Parameter]]:
        """Returns the parameters of each layer, including frozen ones; a tied tensor belongs to its first layer."""
        seen: set[int] = set()
        owned = []
        for layer in self.modules:
            owned.append([p for p in layer.parameters() if id(p) not in seen])
            seen.update(map(id, owned[-1]))
        return owned

    def replaced(self, known: Sequence[Sequence[nn.Parameter]]) -> list[str]:
        """Returns the names of the layers with parameters that an earlier call of `parameters` did not return.

        Sharded parameters are not asked: while they are gathered, a module has others.
        """
        return [
            name
            for name, now, before in zip(self.names, self.parameters(), known, strict=False)
            if not any(isinstance(p, DTensor) for p in before) and not {*map(id, now)} <= {*map(id, before)}
        ]

    def outside(self) -> dict[str, list[nn.Parameter]]:
        """Returns the parameters outside the layers, by the module that owns them; a tied tensor appears once."""
        seen = {id(p) for layer in self.parameters() for p in layer}
        groups: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.root.named_parameters():
            if id(parameter) not in seen:
                groups.setdefault(clean_name(name).rpartition(".")[0], []).append(parameter)
        return groups


def clean_name(name: str) -> str:
    """Returns a module or parameter name without the parts that wrappers add.

    >>> clean_name("model._orig_mod.layers.0._checkpoint_wrapped_module.weight")
    'model.layers.0.weight'
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


@dataclass(frozen=True)
class _Candidate:
    """A list of blocks that may be the stack.

    ``problem`` says why it cannot be used, ``left_out`` names the other blocks of the list.
    """

    path: str
    layers: tuple[tuple[str, nn.Module], ...]
    problem: str = ""
    left_out: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        return sum(map(_size, {m for _, m in self.layers}))  # a fused module counts as several layers

    @property
    def trains(self) -> bool:
        """Whether any parameter is trainable; a frozen teacher must not hide a smaller student."""
        return any(p.requires_grad for _, m in self.layers for p in m.parameters())

    def __str__(self) -> str:
        kinds = sorted({kind.__name__ for kind in _kinds(self.layers)})
        frozen = "" if self.trains else " frozen"
        count = f"{self.size:,}{frozen} parameters"
        text = f"{self.path or 'the model itself'} ({len(self.layers)} x {'/'.join(kinds)}, {count})"
        return f"{text}: {self.problem}" if self.problem else text


def _choose(model: nn.Module, found: list[_Candidate], where: str = "") -> LayerStack:
    inside = f"{where!r} of {_title(model)}" if where else _title(model)
    distinct = {tuple(id(m) for _, m in c.layers): c for c in reversed(found)}  # a stack may have two paths
    found = sorted(distinct.values(), key=lambda c: (len(c.layers), c.size), reverse=True)
    if not found:
        single = [n for n, m in _modules(model).items() if _is_list(m) and _stage_blocks(n, m)]
        hint = f" (with one layer only: {', '.join(map(repr, single))}; a depth profile needs 2)" if single else ""
        raise ValueError(f"No list of layers of one class found in {inside}{hint}: name them with {_HOW}.")
    best, *others = found
    rivals = [best] + [c for c in others if c.size >= RIVAL_SHARE * best.size or (c.trains and not best.trains)]
    if len(rivals) > 1:
        listed = "".join(f"\n  layers={c.path!r}: {c}" for c in rivals)
        raise ValueError(f"{len(rivals)} equally plausible stacks in {inside}: pass one of{listed}")
    if best.problem:
        raise ValueError(f"The layers of {inside} can't be determined: {best}.")
    names, modules = zip(*best.layers, strict=True)
    if best.left_out:
        warn(
            f"The layers found in {inside} are {len(names)} of {len(names) + len(best.left_out)} blocks; left out: "
            f"{', '.join(best.left_out)}. Name all of them, or these, with {_HOW}."
        )
    return LayerStack(names, modules, model)


def _search(name: str, module: nn.Module) -> list[_Candidate]:
    """Returns all candidates at or below ``module`` that are not inside a block of another one, input side first."""
    module = _unwrap(module)
    if isinstance(module, nn.RNNBase) and module.num_layers > 1:
        fused = f"its {module.num_layers} layers are fused in one module; use one nn.{type(module).__name__} per layer"
        return [_Candidate(name, ((name, module),) * module.num_layers, fused)]
    children = [(n, m) for n, m in _children(name, module) if _has_matrix(m)]
    blocks = _stages(name, module, children) or (_run(children) if _is_list(module) else [])
    own = [_Candidate(name, tuple(blocks), left_out=_left_out(name, module, blocks))] if len(blocks) > 1 else []
    if _is_list(module) and not own and len(children) > 1 and _alternates(children):
        return [_Candidate(name, tuple(children), f"block classes alternate; name the layers ({_HOW})")]
    taken = [n for n, _ in blocks] if own else []
    rest = [(n, m) for n, m in children if not any(t == n or t.startswith(f"{n}.") for t in taken)]
    return own + [candidate for n, m in rest for candidate in _search(n, m)]


def _run(children: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """Returns the longest run of consecutive blocks of one class, if that class occurs in one run only."""
    pairs = zip(_kinds(children), children, strict=True)
    runs = [(kind, [child for _, child in run]) for kind, run in itertools.groupby(pairs, key=lambda pair: pair[0])]
    kind, best = max(runs, key=lambda run: len(run[1]), default=(nn.Module, []))
    return best if [k for k, _ in runs].count(kind) == 1 else []


def _left_out(name: str, module: nn.Module, blocks: list[tuple[str, nn.Module]]) -> tuple[str, ...]:
    """Returns the blocks of a list, or below it, that are of the same class as the stack's or beside them."""
    layers = {block for _, block in blocks}
    kinds = {_kind(block) for block in layers} - _GENERIC
    below = [(n, m) for n, m in module.named_modules() if _kind(m) in kinds and _children("", m) and _unwrap(m) is m]
    # A sequence may begin with a stem and end with a head; a list holds nothing but blocks.
    beside = [c for c in _children("", module) if isinstance(module, nn.ModuleList) and _has_matrix(c[1])]
    seen = {m for block in layers for m in block.modules()}
    left = []
    for n, m in beside + below:
        if m not in seen and layers.isdisjoint(m.modules()):
            left.append(f"{name}.{clean_name(n)}" if name else clean_name(n))
            seen.update(m.modules())
    return tuple(left)


def _alternates(children: list[tuple[str, nn.Module]]) -> bool:
    """Returns whether a block class occurs in several runs, as in stacks that alternate between block classes."""
    kinds = _kinds([(n, m) for n, m in children if _children("", m)])
    return len(kinds) > len(set(kinds)) > 1


def _stages(name: str, module: nn.Module, children: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """Returns the blocks of all children that are stages of one block class, in order; empty for fewer than two stages.

    Children of a list count as stages; children of another module only if their names are numbered (``layer1``,
    ``layer2``), because two parallel towers also hold blocks of one class.
    """
    stages = [(n, blocks) for n, m in children if (blocks := _stage_blocks(n, m))]
    stems = {re.sub(r"\d+$", "", n) for n, _ in stages}
    counted = all(re.search(r"\d+$", n) for n, _ in stages) and len(stems) == 1
    blocks = [block for _, stage in stages for block in stage]
    if len(stages) < 2 or not (_is_list(module) or counted) or len(set(_kinds(blocks))) > 1:
        return []
    return blocks


def _stage_blocks(name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Returns the blocks of a stage: a list of blocks of one class, or a module with such a list and a down-sampler."""
    module = _unwrap(module)
    if not _is_list(module):
        owners = [(n, m) for n, m in _children(name, module) if _size(m)]
        lists = [(n, m) for n, m in owners if _is_list(_unwrap(m)) and _stage_blocks(n, m)]
        return _stage_blocks(*lists[0]) if len(lists) == 1 and len(owners) <= 2 else []
    blocks = [(n, m) for n, m in _children(name, module) if _has_matrix(m)]
    one_kind = len(set(_kinds(blocks))) == 1
    # Blocks must have submodules: the two Linears of an MLP are not a stage.
    return blocks if one_kind and all(_children("", _unwrap(m)) for _, m in blocks) else []


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """Returns every module by clean name, or the outermost wrapper if several share a name."""
    modules: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        modules.setdefault(clean_name(name), module)
    return modules


def _lookup(modules: dict[str, nn.Module], name: str, model: nn.Module) -> nn.Module:
    if name not in modules:
        close = difflib.get_close_matches(name, modules, n=3) or list(modules)[1:4]
        raise ValueError(f"layers={name!r} matches no module of {_title(model)}; did you mean one of {close}?")
    return modules[name]


def _matches(name: str, pattern: str) -> bool:
    parts, patterns = name.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))


def _children(name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    prefix = f"{name}." if name else ""
    named = _unwrap(module).named_children()
    return [(prefix + clean_name(n), child) for n, child in named if n != "parametrizations"]  # torch's, not a part


def _unwrap(module: nn.Module) -> nn.Module:
    while inner := next((module._modules[w] for w in WRAPPERS if module._modules.get(w) is not None), None):
        module = inner
    return module


def _kinds(children: Iterable[tuple[str, nn.Module]]) -> list[type[nn.Module]]:
    """Returns the class of each of these modules; one that inherits from another's class counts as of that class."""
    kinds = [_kind(m) for _, m in children]
    bases = set(kinds) - _GENERIC
    return [next((base for base in reversed(kind.__mro__) if base in bases), kind) for kind in kinds]


def _kind(module: nn.Module) -> type[nn.Module]:
    """Returns a module's class, or the one it had before a wrapper derived another in passing (FSDP2, parametrize)."""
    own = type(_unwrap(module))
    kind = next(c for c in own.__mro__ if issubclass(c, nn.Module) and _declared(c))
    return own if kind in _GENERIC else kind


def _declared(kind: type) -> bool:
    """Returns whether a class was declared in code, and not made by calling ``type``."""
    try:
        return (
            "<locals>" in kind.__qualname__
            or operator.attrgetter(kind.__qualname__)(sys.modules[kind.__module__]) is kind
        )
    except (AttributeError, KeyError):
        return False


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.Sequential))


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _has_matrix(module: nn.Module) -> bool:
    """Returns whether a module holds a weight matrix; others (activations, norms) don't separate two layers.

    Embedding tables are never part of a stack [ours].
    """
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return False
    return any(p.dim() >= 2 for p in module.parameters())


def _warn_order(names: Sequence[str]) -> None:
    """Warns of names whose numbers fall where only numbers differ: probably not in depth order."""
    last: dict[str, tuple[list[int], str]] = {}
    for name in names:
        numbers, stem = [int(number) for number in re.findall(r"\d+", name)], re.sub(r"\d+", "#", name)
        before, other = last.get(stem, (numbers, name))
        if numbers < before:
            warn(f"Layer {name!r} is listed after {other!r}: list the layers in depth order, input side first.")
            return
        last[stem] = numbers, name


def _title(model: nn.Module) -> str:
    return type(model).__name__


def half_dtypes(parameters: Iterable[Tensor]) -> str:
    """Returns the half-precision dtypes among parameters, comma-separated; empty if there are none."""
    return ", ".join(sorted({str(p.dtype) for p in parameters if p.dtype in (torch.float16, torch.bfloat16)}))
