"""Sites inside the layers: what attention, its heads and the MLP of each layer write to the residual stream.

Which module's output is written is found by measuring one forward, not by name: of a sublayer's candidates (the module
that holds all of it, its last module with a weight matrix), the one is taken whose output is the difference of two
states of the residual stream, alone or together with that of the other sublayer, as in parallel blocks.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from depthcb.probe import Probe, first_tensor
from depthcb.site_names import HEAD
from depthcb.stack import LayerStack, clean_name
from depthcb.units import ATTENTION, MLP, NORM, groups_of

#: Attributes by which attention modules and configurations tell their number of heads.
_HEADS = ("num_heads", "num_attention_heads", "n_head", "n_heads", "nhead")
#: Relative error up to which a difference of residual states counts as a sublayer's output.
SAME = 1e-3
_REMEDY = "leave it out of sites=, or name the modules: DepthProfile(layers='a.glob.*.of.modules', name='{site}')"


def find_sites(model: nn.Module, stack: LayerStack, probe: Probe, sites: Sequence[str]) -> dict[str, LayerStack]:
    """Finds the modules that write to the residual stream, by one forward of the probe's first batch.

    Args:
        model: The model, which is not changed.
        stack: Its layers.
        probe: The probe.
        sites: ``"attention"``, ``"mlp"`` or ``"head"``.

    Returns:
        One stack of modules per site, in depth order; of the heads one each, ``"head00"``, ``"head01"`` and so on.

    Raises:
        ValueError: A layer has no such sublayer, or no module's output is what it writes.
    """
    layers = [_Layer(name, layer) for name, layer in zip(stack.names, stack.modules, strict=True)]
    for site, layer in itertools.product(sites, layers):
        if (ATTENTION if site == HEAD else site) not in layer.candidates:
            parts = ", ".join(sorted(layer.groups - {NORM})) or "no sublayer"
            raise ValueError(f"sites={site!r}: layer {layer.name!r} has {parts}: {_REMEDY.format(site=site)}.")
    with contextlib.ExitStack() as hooks:
        for layer in layers:
            layer.watch(hooks)
        probe.run_first(model, stack)
    found: dict[str, LayerStack] = {}
    for site in sites:
        if site == HEAD:
            found |= _heads(model, layers)
            continue
        names = [layer.writer(site) for layer in layers]
        modules = [layer.modules[name] for layer, name in zip(layers, names, strict=True)]
        paths = tuple(f"{layer.name}.{name}" for layer, name in zip(layers, names, strict=True))
        found[site] = LayerStack(paths, tuple(modules), model)
    return found


@dataclass(frozen=True)
class Head(LayerStack):
    """The input of each layer's output projection of attention, of which a head is a slice.

    Args:
        index: The head.
        heads: Number of heads.
    """

    index: int = 0
    heads: int = 1

    def seen(self, args: tuple[Any, ...], output: Any) -> Any:
        """Returns the head's slice of the projection's input."""
        return args[0].tensor_split(self.heads, dim=-1)[self.index]


def _heads(model: nn.Module, layers: Sequence[_Layer]) -> dict[str, LayerStack]:
    """Returns the stacks of the heads.

    Raises:
        ValueError: The number of heads is not known, or differs between layers.
    """
    found = {layer.heads(model) for layer in layers}
    if len(found) > 1 or None in found:
        raise ValueError(
            f"sites='head': the layers of {type(model).__name__} don't say how many heads they have, or have different "
            f"numbers of them: {_REMEDY.format(site='head')}."
        )
    (count,) = found
    assert count is not None
    paths = [layer.candidates[ATTENTION][-1] for layer in layers]
    modules = tuple(layer.modules[path] for layer, path in zip(layers, paths, strict=True))
    names = [f"{layer.name}.{path}" for layer, path in zip(layers, paths, strict=True)]
    return {
        f"head{i:02d}": Head(tuple(f"{name}[{i}]" for name in names), modules, model, i, count) for i in range(count)
    }


@dataclass
class _Layer:
    """What is seen of one layer in a forward."""

    name: str
    layer: nn.Module
    modules: dict[str, nn.Module] = field(default_factory=dict)
    groups: set[str] = field(default_factory=set)
    #: Names of the modules whose output may be what a sublayer writes, by site, the most likely first.
    candidates: dict[str, list[str]] = field(default_factory=dict)
    written: dict[str, Tensor] = field(default_factory=dict)
    #: States of the residual stream, in order: the layer's input, inputs and outputs of norms, the layer's output.
    states: list[Tensor] = field(default_factory=list)
    found: dict[str, str] = field(default_factory=dict)
    #: Number of features of each candidate's input.
    widths: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for path, module in self.layer.named_modules(remove_duplicate=False):
            self.modules[clean_name(path)] = module  # of a module and its wrapper, the module
        groups = groups_of(self.name, self.layer, {clean_name(n): p for n, p in self.layer.named_parameters()})
        self.groups = set(groups.values())
        norms = {path.rpartition(".")[0] for path, group in groups.items() if group == NORM}
        self.norms = [self.modules[path] for path in sorted(norms - {""})]
        for site in (ATTENTION, MLP):
            owners = [path.rpartition(".")[0] for path, group in groups.items() if group == site]
            if owners:
                whole = ".".join(parts[0] for parts in itertools.takewhile(lambda p: len(set(p)) == 1, _parts(owners)))
                self.candidates[site] = [name for name in dict.fromkeys([whole, owners[-1]]) if name]

    def watch(self, hooks: contextlib.ExitStack) -> None:
        """Watches a forward of the layer."""
        hooks.callback(self.layer.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
        for norm in self.norms:
            hooks.callback(norm.register_forward_hook(self._norm, with_kwargs=True).remove)
        for name in {name for names in self.candidates.values() for name in names}:
            hooks.callback(self.modules[name].register_forward_hook(functools.partial(self._wrote, name)).remove)
        hooks.callback(self.layer.register_forward_hook(self._leave).remove)

    def heads(self, model: nn.Module) -> int | None:
        """Returns the number of heads by which the width of the output projection's input can be divided, if known."""
        path = self.candidates[ATTENTION][-1]
        width = self.widths.get(path)
        inside = [module for name, module in self.modules.items() if name and path.startswith(f"{name}.")]
        owners = [*inside, self.layer, getattr(self.layer, "config", None), getattr(model, "config", None)]
        owners += [getattr(module, "config", None) for module in model.modules()]
        told = (getattr(owner, name, None) for owner in owners for name in _HEADS)
        return next((n for n in told if isinstance(n, int) and width and width % n == 0), None)

    def writer(self, site: str) -> str:
        """Returns the name of the module whose output a sublayer writes.

        Raises:
            ValueError: There is none.
        """
        if site not in self.found:
            raise ValueError(
                f"sites={site!r}: in layer {self.name!r} the output of none of {', '.join(self.candidates[site])} is "
                f"what its {site} adds to the residual stream: {_REMEDY.format(site=site)}."
            )
        return self.found[site]

    def _enter(self, layer: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        self._keep(first_tensor((*args, *kwargs.values())))

    def _norm(self, norm: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        self._keep(first_tensor((*args, *kwargs.values())))
        self._keep(first_tensor(output))

    def _wrote(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        tensor = first_tensor(output)
        if args and isinstance(args[0], Tensor):
            self.widths[name] = args[0].shape[-1]
        if tensor is not None:
            self.written[name] = tensor.detach().clone()

    def _leave(self, layer: nn.Module, args: Any, output: Any) -> None:
        """Decides which outputs explain the layer, and drops the tensors."""
        self._keep(first_tensor(output))
        steps = [b - a for a, b in itertools.combinations(self.states, 2) if a.shape == b.shape]
        for pair in itertools.product(*([None, *names] for names in self.candidates.values())):
            names = [name for name in pair if name]
            parts = [self.written[name] for name in names if name in self.written]
            if parts and len(parts) == len(names) and any(_explains(step, parts) for step in steps):
                for site, name in zip(self.candidates, pair, strict=True):
                    if name:
                        self.found.setdefault(site, name)
        self.states, self.written = [], {}

    def _keep(self, tensor: Tensor | None) -> None:
        if tensor is not None:
            self.states.append(tensor.detach().clone())


def _parts(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Yields the first part of each dotted name, then the second ones, as far as all have one."""
    return zip(*(name.split(".") for name in names), strict=False)


def _explains(step: Tensor, parts: Sequence[Tensor]) -> bool:
    """Returns whether a step of the residual stream is the sum of these outputs."""
    if any(part.numel() != step.numel() for part in parts):
        return False
    total = sum(part.view_as(step) for part in parts)
    return bool((step - total).norm() <= SAME * step.norm()) and bool(step.norm() > 0)
