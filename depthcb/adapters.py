"""Weights that a layer makes from other parameters: by adapters (LoRA and its variants) or by a parametrization.

An adapted module's effective weight is W0 merged with its adapters. Adapter modules are detected by the methods that
every ``peft`` layer has, so ``peft`` itself is not required. Parametrizations are those of ``torch.nn.utils``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from depthcb.stack import half_dtypes


@dataclass(frozen=True)
class MadeWeights:
    """Weights that are computed from other parameters in every forward.

    Args:
        how: How they are made, as in "layer x ...".
        remedy: How to train the weights themselves.
        parameters: The parameters they are made from.
        values: Returns the weights as new tensors, without side effects.
        always: Whether they count in the layer's norm even if none of the parameters trains.
    """

    how: str
    remedy: str
    parameters: frozenset[nn.Parameter]
    values: Callable[[], list[Tensor]]
    always: bool = False


def made_weights(layer: nn.Module) -> list[MadeWeights]:
    """Returns the weights of a layer that adapters or parametrizations make."""
    adapted = adapted_modules(layer)
    remedy = "train the weights themselves"
    made = [
        MadeWeights("trains adapters", remedy, frozenset(m.parameters()), partial(effective_weights, m), always=True)
        for m in adapted
    ]
    inside = {m for outer in adapted for m in outer.modules()}
    return made + [weights for m in layer.modules() if m not in inside for weights in _parametrized(m)]


def _parametrized(module: nn.Module) -> Iterator[MadeWeights]:
    """Yields the weights of this module, without its submodules, that torch's parametrizations make."""
    if isinstance(module, ParametrizationList):
        remedy = "remove them with torch.nn.utils.parametrize.remove_parametrizations"
        parameters = frozenset(module.parameters())
        yield MadeWeights(f"trains parametrizations ({_kinds(module)})", remedy, parameters, partial(_values, module))
    for hook in module._forward_pre_hooks.values():  # the functions that parametrizations have replaced
        if isinstance(hook, (WeightNorm, SpectralNorm)):
            parts = {p for n, p in module.named_parameters(recurse=False) if n.startswith(f"{hook.name}_")}
            kind = "weight_norm" if isinstance(hook, WeightNorm) else "spectral_norm"
            remedy = f"remove it with torch.nn.utils.remove_{kind}"
            yield MadeWeights(
                f"trains a parametrization ({kind})", remedy, frozenset(parts), partial(_hooked, hook, module)
            )


def _kinds(parametrizations: ParametrizationList) -> str:
    return ", ".join(type(m).__name__.lstrip("_") for m in parametrizations)


@torch.no_grad()
def _values(parametrizations: ParametrizationList) -> list[Tensor]:
    # On a copy in eval mode: spectral norm updates its estimate whenever the weight is read in training mode.
    return [copy.deepcopy(parametrizations).eval()().detach()]


@torch.no_grad()
def _hooked(hook: WeightNorm | SpectralNorm, module: nn.Module) -> list[Tensor]:
    if isinstance(hook, SpectralNorm):
        return [hook.compute_weight(module, do_power_iteration=False)]
    return [hook.compute_weight(module)]


def adapted_modules(layer: nn.Module) -> list[Any]:
    """Returns the modules of a layer that hold a base weight and its adapters, without those inside another one."""
    found = _all_adapted(layer)
    inside = {m for outer in found for m in outer.modules() if m is not outer}
    return [m for m in found if m not in inside]


@torch.no_grad()
def effective_weights(module: Any) -> list[Tensor]:
    """Returns a module's weights with its active adapters merged, W0 + BA for LoRA: new tensors, at least fp32 [ours].

    Calls the adapters' own ``merge`` on a copy, so DoRA, LoHa and OFT work too. Biases, and the parameters of a module
    of which only some are adapted (stacked experts), are included only if trainable.

    Raises:
        ValueError: The weights are quantised, or the adapters can't be merged.
    """
    kind, copied = type(module).__name__, copy.deepcopy(module)
    parameters = dict(copied.get_base_layer().named_parameters())
    if not parameters or not all(p.is_floating_point() for p in parameters.values()):
        raise ValueError(
            f"The base weight of {kind} is quantised, so its step ratio is undefined: load the model unquantised or "
            "remove the monitor."
        )
    wrappers = _all_adapted(copied)
    targets = {getattr(wrapper, "parameter_name", None) for wrapper in wrappers}
    if len(targets) < len(wrappers) or (None in targets and len(wrappers) > 1):
        raise ValueError(
            f"{kind} wraps another adapter layer: the step ratio is supported for one kind of adapter per module."
        )
    if half_dtypes(parameters.values()):
        copied.float()  # the forward adds W0 x and BA x, but merging in half precision would round a small BA away
    for wrapper in wrappers:  # several, if each adapts another parameter of one module
        _merge(wrapper)
    adapted = {n for n, p in parameters.items() if n in targets or (None in targets and p.dim() > 1)}
    merged = copied.get_base_layer().named_parameters()
    return [p.detach() for n, p in sorted(merged) if n in adapted or p.requires_grad]


def _merge(wrapper: Any) -> None:
    if wrapper.merged or wrapper.disable_adapters:
        return
    try:
        wrapper.merge()
    except NotImplementedError as error:
        raise ValueError(
            f"The adapters of {type(wrapper).__name__} can't be merged into its weight, so its step ratio is "
            f"undefined: remove the monitor ({error or 'not supported by peft'})."
        ) from error


def _all_adapted(layer: nn.Module) -> list[Any]:
    return [m for m in layer.modules() if hasattr(m, "get_base_layer") and hasattr(m, "merge")]
