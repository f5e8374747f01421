"""How a batch reaches a model: the call, and the names of the tensors in it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from depthcb.batches import DOCUMENT, LABELS, batch_size, is_documents
from depthcb.stack import WRAPPERS, LayerStack
from depthcb.warn import warn


@dataclass(frozen=True)
class Call:
    """A call of a model that can be repeated with other tensors.

    Args:
        run: Calls the model on ``payload``, or on something of the same structure.
        payload: Nested containers of tensors.
    """

    run: Callable[[Any], Any]
    payload: Any

    @property
    def named(self) -> dict[str, Tensor]:
        """The tensors by their last key, field or argument name."""
        return dict(_named("", self.payload))

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Call:
        """Returns the call with every tensor mapped."""
        return Call(self.run, apply_to_collection(self.payload, Tensor, function))


#: ``(model, call) -> anything``: how a call is executed.
Execute = Callable[[nn.Module, Call], Any]


def run_call(model: nn.Module, call: Call) -> Any:
    """Runs a call as it is."""
    return call.run(call.payload)


def call_of(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
    """Returns the call of a module with these arguments, named as in the signature of its ``forward``.

    Raises:
        TypeError: The arguments don't fit the signature.
    """
    signature = inspect.signature(_unwrapped(module).forward)
    bound = signature.bind(*args, **kwargs)

    def run(arguments: dict[str, Any]) -> Any:
        again = inspect.BoundArguments(signature, arguments)
        return module(*again.args, **again.kwargs)

    return Call(run, dict(bound.arguments))


def feed(model: nn.Module, batch: Any) -> Call:
    """Returns the call of a model on a batch: a dict by keyword, a tuple by its first element, a tensor as is.

    Of a dict, the entries that ``forward`` takes are passed; a warning names the others, except labels.

    Raises:
        ValueError: The model does not accept the batch.
    """
    if isinstance(batch, (tuple, list)):
        return feed(model, batch[0])
    with _unfit(model, batch):
        return _guarded(call_of(model, *_arguments(model, batch)), model, batch)


def call_of_named(model: nn.Module, stack: LayerStack, batch: Any) -> Call | None:
    """Returns the call of a model on the entries of a batch that its ``forward`` names; None if there are none.

    The others, of which batches of transformers' trainers may have some for the loss, are left out without a warning.
    """
    inner: Any = model
    if callable(getattr(model, "get_base_model", None)):  # the forward of an adapted model takes anything
        inner = inner.get_base_model()
    known = inspect.signature(type(inner).forward).parameters
    taken = {k: v for k, v in batch.items() if k in known} if isinstance(batch, Mapping) else {}
    return feed(model, taken) if taken else None


def _arguments(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the positional and the keyword arguments for a batch that is no tuple."""
    if not isinstance(batch, Mapping):
        return (batch,), {}
    parameters = inspect.signature(_unwrapped(model).forward).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    inputs = {k: v for k, v in batch.items() if not (k == DOCUMENT and is_documents(v))}
    taken = {k: v for k, v in inputs.items() if open_ended or k in parameters}
    if not taken:
        return (batch,), {}
    dropped = [str(key) for key in inputs if key not in taken and key not in LABELS]
    if dropped:
        warn(
            f"The probe's {', '.join(map(repr, dropped))} are not passed to {type(model).__name__}, whose forward "
            "does not take them: pass forward=(model, batch) -> output to use them."
        )
    return (), taken


def _guarded(call: Call, model: nn.Module, batch: Any) -> Call:
    """Returns a call whose TypeErrors say what to do."""

    def run(payload: Any) -> Any:
        with _unfit(model, batch):
            return call.run(payload)

    return Call(run, call.payload)


@contextlib.contextmanager
def _unfit(model: nn.Module, batch: Any) -> Iterator[None]:
    try:
        yield
    except TypeError as error:
        raise ValueError(
            f"{type(model).__name__} cannot be called on a probe batch of type {type(batch).__name__} ({error}): pass "
            "forward=(model, batch) -> output."
        ) from error


class _Reached(BaseException):
    """Ends a validation step where it calls the model; not an Exception, which the step might catch."""

    def __init__(self, call: Call | None) -> None:
        self.call = call


def validation_call(module: nn.Module, stack: LayerStack, batch: Any) -> Call | None:
    """Returns the call by which ``module.validation_step`` runs the layers on a batch; None where that cannot be told.

    The step runs up to its first call of a module that contains all layers. It cannot be told if there is none, if the
    step fails before it, if the call is on another number of examples (which may be in the first two dimensions), or if
    the parameters are sharded.

    Args:
        module: A module with a ``validation_step(batch, batch_idx)``.
        stack: Its layers.
        batch: A batch, on the module's device.
    """
    step = getattr(module, "validation_step", None)
    if step is None or any(isinstance(p, DTensor) for p in module.parameters()):
        return None  # a forward of sharded parameters cannot be left half-way

    def reached(called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            raise _Reached(call_of(called, args, kwargs))
        except (TypeError, ValueError):  # no readable signature
            raise _Reached(None) from None

    with contextlib.ExitStack() as hooks:
        for called in containers(module, stack):
            hooks.callback(called.register_forward_pre_hook(reached, prepend=True, with_kwargs=True).remove)
        hooks.callback(stack.modules[0].register_forward_pre_hook(_layer_reached, prepend=True).remove)
        try:
            step(batch, 0, *([0] if len(inspect.signature(step).parameters) > 2 else []))
        except _Reached as found:
            size = batch_size(batch)
            if found.call is None or not any(size in tensor.shape[:2] for tensor in found.call.named.values()):
                return None
            return _guarded(found.call, module, batch)
        except Exception:  # what the step needs besides the batch is not there
            return None
    return None


def containers(module: nn.Module, stack: LayerStack) -> list[nn.Module]:
    """Returns the modules that contain all layers, from the outermost on."""
    layers = set(stack.modules)
    return [m for m in module.modules() if m not in layers and layers <= set(m.modules())]


def _layer_reached(module: nn.Module, args: Any) -> None:
    raise _Reached(None)


def _named(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _named(str(key), item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _named(name, item)
    elif hasattr(value, "__dataclass_fields__"):
        for key in value.__dataclass_fields__:
            yield from _named(key, getattr(value, key))


def _unwrapped(model: nn.Module) -> nn.Module:
    for wrapper in WRAPPERS:
        model = getattr(model, wrapper, model)
    return model
