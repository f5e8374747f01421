"""Which dimensions of the layers' outputs are examples, positions and features, which positions count, and causality.

Found once, by looking at one forward and at what moves when the first layer's input, or one input of the model, is
changed: never by editing tokens or cutting batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from depthcb.batches import LABELS
from depthcb.feeding import Call

#: Relative change below which a value counts as unaffected by a perturbation.
UNMOVED = 1e-5
#: Label of positions without a target.
IGNORED = -100
MASK = "attention_mask"
Edit = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Layout:
    """How to read the outputs of L layers.

    Args:
        causal: Whether later positions depend on earlier ones only.
        axes: One letter per dimension of each layer's output: B for examples, T for positions, D for features.
        mask: Name of the input that tells which positions are real; empty if all are.
    """

    causal: bool
    axes: tuple[str, ...]
    mask: str = ""


@dataclass
class Look:
    """What one forward shows.

    Args:
        shapes: Shape of each layer's output.
        outputs: What was asked for of each layer's output.
        first_input: Input of the first layer; None if it has no floating-point tensor.
        features: For each layer, the dimension of the features as its last weights see it; None if they don't tell.
        masks: (B, T) booleans of the real positions for each module that contains all layers, the innermost last.
    """

    shapes: list[torch.Size] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    first_input: Tensor | None = None
    features: list[int | None] = field(default_factory=list)
    masks: list[Tensor] = field(default_factory=list)


#: ``take(layer index, output)`` returns what to keep of a layer's output.
Take = Callable[[int, Tensor], Tensor]


class Run(Protocol):
    """Runs a model: on a call, keeping what ``take`` returns, with an edit of the first layer's input."""

    def __call__(self, call: Call, take: Take, edit: Edit | None = None) -> Look: ...


def find_layout(
    run: Run,
    call: Call,
    size: int,
    names: Sequence[str],
    *,
    axes: str | None = None,
    causal: bool | None = None,
    given: Tensor | Literal[False] | None = None,
) -> Layout:
    """Finds the layout of a model's layers.

    Args:
        run: Runs the model.
        call: The call of the model on a batch.
        size: Number of examples of the batch.
        names: Names of the layers.
        axes: The letters of the outputs with as many dimensions; None finds them.
        causal: Whether the model is causal; None finds it.
        given: (B, T) booleans of the positions that are no padding, or False if all are; None finds the mask.

    Raises:
        ValueError: A layer's dimensions cannot be told.
    """
    look = run(call, _nothing)
    found: list[str] = []
    for i, (shape, name) in enumerate(zip(look.shapes, names, strict=True)):
        known = [found[j] for j in range(i) if look.shapes[j] == shape and look.features[j] == look.features[i]]
        said = axes if axes is not None and len(axes) == len(shape) else None
        found.append(said or (known[0] if known else _axes(run, call, size, look, i, name)))
    mask = _mask_name(run, call, look) if given is None else ""
    if causal is None:
        real = real_positions(call, mask) if given is None else given
        causal = _is_causal(run, call, look, found, None if real is False else real)
    return Layout(causal, tuple(found), mask)


def check_axes(axes: str) -> None:
    """Raises a ValueError if ``axes`` are not the letters of a layer's output."""
    if not set(axes) <= set("BTD") or axes.count("B") != 1 or axes.count("D") != 1:
        raise ValueError(
            f"axes={axes!r}: use one letter per dimension: B for examples, D for features, T for each of positions."
        )


def arranged(output: Tensor, axes: str) -> Tensor:
    """Returns an output (..., in any order) as (B, D) or (B, T, D), with all dimensions of positions flattened."""
    order = [axes.index("B"), *(i for i, letter in enumerate(axes) if letter == "T"), axes.index("D")]
    output = output.permute(order)
    return output.flatten(1, -2) if output.dim() > 2 else output


def real_positions(call: Call, mask: str) -> Tensor | None:
    """Returns (B, T) booleans on the CPU of the positions that are no padding; None if all are real.

    Args:
        call: The call.
        mask: `Layout.mask`.

    Raises:
        ValueError: The mask is not a (batch, positions) tensor.
    """
    if not mask or mask not in call.named:
        return None
    values = call.named[mask]
    if values.dim() != 2:
        raise ValueError(
            f"{mask} of the probe has shape {tuple(values.shape)}: padding is read from a (batch, positions) mask; "
            "pass mask=batch -> (batch, positions) tensor, or mask=False if all positions count."
        )
    return (values != IGNORED).cpu() if mask in LABELS else seen_by(values)


def fitting(real: Tensor | None, masks: Sequence[Tensor], shape: tuple[int, int]) -> Tensor | None:
    """Returns (B, T) booleans of the real positions; None if none of the given masks has this shape.

    Models that change the number of positions, such as speech encoders, make masks for these.

    Args:
        real: The real positions of the model's inputs; None if all are real.
        masks: `Look.masks`.
        shape: B and T.
    """
    if real is None:
        return torch.ones(shape, dtype=torch.bool)
    found = next((m for m in (real, *reversed(masks)) if m.shape == shape), None)
    return torch.ones(shape, dtype=torch.bool) if found is None and bool(real.all()) else found


def seen_by(mask: Tensor) -> Tensor:
    """Returns the positions that a mask lets through, as booleans on the CPU: not 0, or 0 if padding is negative."""
    return (mask == 0 if bool((mask < 0).any()) else mask != 0).cpu()


def masks_in(call: Call) -> list[Tensor]:
    """Returns (B, T) booleans of the real positions for each mask of positions among the arguments of a call."""
    return [seen_by(m) for name, m in call.named.items() if name.endswith(MASK) and m.dim() == 2]


def _nothing(index: int, output: Tensor) -> Tensor:
    return output.new_empty(0)


def _axes(run: Run, call: Call, size: int, look: Look, index: int, name: str) -> str:
    """Returns the letters of one layer's output."""
    shape, feature = look.shapes[index], look.features[index]
    if len(shape) < 2:
        raise ValueError(
            f"Layer {name!r} returns shape {tuple(shape)}, which has no dimension for examples: if the probe is a list "
            "of rows, collate them with torch.utils.data.default_collate(rows)."
        )
    if len(shape) == 2 and (shape[0] == size or shape[1] != size):
        return "BD"  # whatever the rows are: the nodes of a graph are examples, too
    if feature is None and len(shape) == 3:
        feature = 2  # by convention
    examples = [d for d, length in enumerate(shape) if length == size and d != feature]
    if len(examples) > 1:
        examples = _examples(run, call, look, index, examples, size)
    if len(examples) != 1 or feature is None:
        raise ValueError(
            f"Layer {name!r} returns shape {tuple(shape)} for a batch of {size}: its dimensions cannot be told apart. "
            "Pass axes= with one letter per dimension, B for examples, T for positions and D for features, such as "
            f"axes={'B' + 'T' * (len(shape) - 2) + 'D'!r}."
        )
    return "".join("B" if d == examples[0] else "D" if d == feature else "T" for d in range(len(shape)))


def _examples(run: Run, call: Call, look: Look, index: int, dims: list[int], size: int) -> list[int]:
    """Returns which of these dimensions may be that of the examples.

    A change of one example of the first layer's input moves that example alone. So does a change of one position where
    the layers don't mix positions: then another order of the batch's examples decides.
    """

    def output(of: Call = call, edit: Edit | None = None) -> Tensor:
        return run(of, lambda i, o: o.clone() if i == index else o.new_empty(0), edit).outputs[index]

    before, left = output(), []
    for dim in dims:
        if look.first_input is not None and look.first_input.shape == before.shape:
            after = output(edit=lambda x, dim=dim: _perturbed(x, dim, 0))  # type: ignore[misc]
            others = [t.narrow(dim, 1, size - 1) for t in (before, after)]
            if _difference(*others) > UNMOVED:
                continue
        left.append(dim)
    if len(left) < 2:
        return left
    rolled = output(call.mapped(lambda t: t.roll(1, 0) if t.dim() and len(t) == size else t))
    return [dim for dim in left if _difference(before.roll(1, dim), rolled) <= UNMOVED]


def _mask_name(run: Run, call: Call, look: Look) -> str:
    """Returns the name of the mask of the positions that the layers see; empty if there is none.

    A mask belongs to inputs with the same prefix and positions. In a model with several inputs, such as an
    encoder-decoder, it counts if another order of the examples of these inputs moves the first layer's input.
    Labels tell a decoder's padding where there is no mask for it.
    """
    named = {name: tensor for name, tensor in call.named.items() if tensor.dim() > 1}
    masks = [name for name in named if name.endswith(MASK)]
    inputs = [n for n in named if n not in masks and n not in LABELS and not n.endswith(("_type_ids", "position_ids"))]
    targets = [name for name in LABELS if name in named and named[name].dim() == 2]
    prefixes = {"decoder_", *(mask.removesuffix(MASK) for mask in masks)}
    for mask in masks:
        prefix = mask.removesuffix(MASK)
        others = tuple(p for p in prefixes if len(p) > len(prefix))
        partners = [n for n in inputs if n.startswith(prefix) and not n.startswith(others)]
        partners = [n for n in partners if _fits(named[n], named[mask])]
        alone = not targets and (len(inputs) == 1 or set(partners) == set(inputs))
        if alone or any(_feeds(run, call, look, partner) for partner in partners):
            return mask
    return next((label for label in targets if _feeds(run, call, look, label)), "")


def _fits(tensor: Tensor, mask: Tensor) -> bool:
    return mask.dim() != 2 or tensor.shape[:2] == mask.shape


def _feeds(run: Run, call: Call, look: Look, name: str) -> bool:
    """Returns whether the first layer's input depends on an input: another order of its examples moves it."""
    values = call.named[name]
    try:
        rolled = run(call.mapped(lambda t: t.roll(1, 0) if t is values else t), _nothing).first_input
    except Exception:  # as in models that check texts against images: they depend on each other
        return True
    if rolled is None or look.first_input is None or rolled.shape != look.first_input.shape:
        return True
    return _difference(look.first_input, rolled) > UNMOVED


def _is_causal(run: Run, call: Call, look: Look, axes: Sequence[str], real: Tensor | None) -> bool:
    """Returns whether changing the last position of the first layer's input moves no other, and the first does."""
    first = look.first_input
    if first is None or first.dim() != len(axes[0]) or any(letters.count("T") != 1 for letters in axes):
        return False
    time, batch = axes[0].index("T"), axes[0].index("B")
    size, length = first.shape[batch], first.shape[time]
    if any(
        (shape[a.index("B")], shape[a.index("T")]) != (size, length) for shape, a in zip(look.shapes, axes, strict=True)
    ):
        return False
    real = fitting(real, look.masks, (size, length))
    if real is None:
        real = torch.ones(size, length, dtype=torch.bool)
    example = int(real.sum(dim=1).argmax())
    positions = real[example].nonzero().flatten().tolist()
    if len(positions) < 2:
        return False

    def outputs(edit: Edit | None = None) -> list[Tensor]:
        return run(call, lambda i, o: arranged(o, axes[i])[example].clone(), edit).outputs

    before = outputs()

    def moved(position: int, where: slice) -> float:
        after = outputs(lambda x: _perturbed(x, time, position))
        return max(_difference(a[where], b[where]) for a, b in zip(before, after, strict=True))

    begin, end = positions[0], positions[-1]
    return moved(end, slice(0, end)) <= UNMOVED < moved(begin, slice(begin + 1, None))


def _perturbed(x: Tensor, dim: int, index: int) -> Tensor:
    """Returns a tensor with noise of its own size added to one slice."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    where = torch.zeros(x.shape[dim], dtype=torch.bool, device=x.device)
    where[index] = True
    shape = [-1 if d == dim else 1 for d in range(x.dim())]
    return torch.where(where.view(shape), x + noise * x.std(), x)


def _difference(before: Tensor, after: Tensor) -> float:
    """Returns the largest difference relative to the largest value; 0 for empty tensors."""
    return float((after - before).abs().max() / before.abs().max().clamp(min=1e-30)) if before.numel() else 0.0


def feature_dimension(module: nn.Module, output: Tensor) -> int | None:
    """Returns the dimension of the features in the output of a module with weights of its own, as these see it."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return 1
    return output.dim() - 1 if any(p.dim() == 2 for p in module.parameters()) else None


def has_weights(module: nn.Module) -> bool:
    """Returns whether a module has weights of its own, parametrised or not, and no modules in it."""
    children = [name for name, _ in module.named_children() if name != "parametrizations"]
    return not children and not isinstance(module, ParametrizationList) and bool(list(module.parameters()))
