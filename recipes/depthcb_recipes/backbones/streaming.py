"""Runs a network whose weights are read layer by layer, so that it needs the memory of one layer.

The parameters are on the meta device, without memory. A hook before each layer reads the layer's weights, and one after
it lets them go; modules outside of the layers (embeddings, norms) each have their own. A weight that is used anywhere
else, outside of the forward of its module, is still on the meta device there: torch refuses to compute with it, so that
nothing can be computed from weights that were not read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from depthcb import LayerStack
from depthcb_recipes.backbones.checkpoints import Weights, fitted


def streamed(model: nn.Module, weights: Weights) -> nn.Module:
    """Lets an empty network read its weights while it runs.

    Args:
        model: From `depthcb_recipes.backbones.checkpoints.empty_network`.
        weights: The weights.

    Raises:
        ValueError: The weights don't fit, see `fitted`.
    """
    keys = fitted(model, weights)
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in keys}
    for name, tensor in weights.read({keys[name] for name in buffers}).items():
        next(b for key, b in buffers.items() if keys[key] == name).copy_(tensor)
    layers = LayerStack.find(model)
    inside = {id(module) for layer in layers.modules for module in layer.modules()}
    outside = [(name, module) for name, module in model.named_modules() if id(module) not in inside]
    for name, module in zip(layers.names, layers.modules, strict=True):
        _read_in_time(module, _places(name, module, keys, below=True), weights)
    for name, module in outside:
        if module._parameters:
            _read_in_time(module, _places(name, module, keys, below=False), weights)
    return model


def _places(name: str, module: nn.Module, keys: Mapping[str, str], *, below: bool) -> dict[tuple[nn.Module, str], str]:
    """Returns the checkpoint's key of each parameter of a module, by the module that owns it and its name there."""
    owners = module.named_modules(prefix=name) if below else [(name, module)]
    places = {(owner, own): f"{at}.{own}".removeprefix(".") for at, owner in owners for own in owner._parameters}
    return {place: keys[full] for place, full in places.items() if full in keys}


def _read_in_time(module: nn.Module, places: dict[tuple[nn.Module, str], str], weights: Weights) -> None:
    """Has the weights read before the module runs and let go after it.

    Args:
        module: The module.
        places: The key in the checkpoint of each parameter, see `_places`.
        weights: The checkpoint.
    """
    empty: dict[tuple[nn.Module, str], Any] = {}

    def before(*_: Any) -> None:
        read = weights.read(set(places.values()))
        for (owner, name), key in places.items():
            place = owner._parameters[name]
            assert place is not None
            empty[owner, name] = place
            # In the precision of the place: the rounding floor runs the network in float64.
            owner._parameters[name] = nn.Parameter(read[key].to(place.dtype), requires_grad=False)

    def after(*_: Any) -> None:
        for (owner, name), place in empty.items():
            owner._parameters[name] = place
        empty.clear()

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after, prepend=True, always_call=True)


@contextlib.contextmanager
def only_layer_after_layer(name: str) -> Iterator[None]:
    """Says so where a network uses weights outside of their module's forward.

    Raises:
        ValueError: It does.
    """
    try:
        yield
    except RuntimeError as error:
        if "meta" not in str(error):
            raise
        raise ValueError(
            f"{name} uses weights outside of the module that has them, so they cannot be read layer by layer: "
            "leave out --stream."
        ) from error
