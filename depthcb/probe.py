"""Runs a model on fixed inputs without side effects and records one vector per row and layer.

`Probe.record` runs the model once per batch with a forward hook on every layer. All state that the run could change is
restored: hooks, train/eval flags, random states, attributes of modules and precision flags. Random states are seeded
alike for every run, so that a forward that draws (patch masks, noise) gives the same for the same weights. It runs in
fp32 (no autocast, no TF32), because in bf16 a single outlier channel can hide the change of all others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_map_only

from depthcb.batches import (
    attention_mask,
    batch_size,
    check_batch,
    collect_batches,
    documents,
    feed,
    longest_example,
    perturbed,
    positions_input,
)
from depthcb.isolation import isolated, isolated_rng, seeded
from depthcb.similarity.cka import MIN_ROWS
from depthcb.stack import LayerStack

Rows = Literal["mean", "tokens", "last", "first"]
Forward = Callable[[nn.Module, Any], Any]
#: Qualified names of ``forward`` in a class that does not define it: nn.Module's and Lightning's defaults.
NO_FORWARD = ("_forward_unimplemented", "LightningModule.forward")
#: Relative change below which a position counts as unaffected by perturbing another one.
UNMOVED = 1e-5


@dataclass(frozen=True)
class Recording:
    """The result of one pass over the probe.

    Args:
        rows: (n, d) activations of each of L layers, in fp32, or fp64 for fp64 models.
        examples: (n,) number of the example that each row belongs to, or of its document where the batches name it.
        causal: Whether the model is causal, so that position 0 was excluded.
    """

    rows: list[Tensor]
    examples: Tensor
    causal: bool


@dataclass(frozen=True)
class Probe:
    """Fixed inputs, and how to turn a layer's output into rows.

    Args:
        batches: The inputs, on the CPU: dicts, ``(x, ...)`` tuples or tensors, with examples along dimension 0. A (B,)
            integer tensor ``document`` in a dict names the document of each example: intervals are over documents then,
            because examples from the same one are not independent.
        rows: ``"mean"``, ``"last"`` or ``"first"`` give one row per example: the mean over its non-padding positions,
            or the last or first of them; ``"tokens"`` gives a seeded sample of positions, the same number from each
            example [ours]. For causal models position 0 is excluded, because its massive activations would dominate
            every measure. Positions are dimension 1 of (B, T, d) outputs, and padding is read from a (B, T)
            ``attention_mask`` in the batch. Feature maps (B, C, H, W) are averaged or sampled over H x W (outputs of
            blocks without a convolution are read as (B, H, W, C)), and (B, C, T) outputs of blocks that end in an
            ``nn.Conv1d`` over T.
        max_tokens: Maximum number of rows sampled by ``"tokens"``.
        forward: ``(model, batch) -> anything``: how to run the model on a batch. By default a dict is passed by keyword
            (without labels), and a tensor or the first element of a tuple by position. Floating-point inputs are cast
            to the dtype of the model's weights.
        seed: Seed of the token sample.
        forward_seed: Seed of the random states, and of generators in the model, in each forward.

    Raises:
        ValueError: There is no batch, a batch contains no tensor, or ``rows`` is unknown.

    Example:
        >>> import torch
        >>> from depthcb import LayerStack
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
        >>> recording = Probe((torch.randn(5, 3),)).record(model, LayerStack.find(model))
        >>> [tuple(r.shape) for r in recording.rows]
        [(5, 3), (5, 3)]
    """

    batches: tuple[Any, ...]
    rows: Rows = "mean"
    max_tokens: int = 256
    forward: Forward | None = None
    seed: int = 0
    forward_seed: int = 0

    def __post_init__(self) -> None:
        if self.rows not in get_args(Rows):
            raise ValueError(f"rows={self.rows!r} is unknown: use one of {get_args(Rows)}.")
        if not self.batches:
            raise ValueError("The probe has no batch: pass inputs, or a dataset that is not empty.")
        for batch in self.batches:
            check_batch(batch)

    @classmethod
    def collect(cls, source: Any, limit: int, **options: Any) -> Probe:
        """Creates a probe from a batch, a list of batches, a Dataset or a DataLoader.

        Of datasets and loaders, a seeded random sample of ``limit`` examples is read in another process and collated
        by the loader's ``collate_fn``, without iterating the loader or affecting random states. Of a dataset that can
        only be iterated, the first ``limit`` examples are taken, with a warning. Batches are used in full. A probe is
        returned as is.

        Raises:
            ValueError: The source is none of these.
        """
        if isinstance(source, cls):
            return source
        seed = options.get("seed", 0)
        with isolated_rng(seed):
            return cls(tuple(collect_batches(source, limit, seed)), **options)

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the inputs and of the settings that determine the rows."""
        digest = hashlib.sha256(repr((self.rows, self.rows == "tokens" and (self.max_tokens, self.seed))).encode())
        for batch in self.batches:
            for leaf in tree_leaves(batch):
                if isinstance(leaf, Tensor):
                    digest.update(repr((leaf.dtype, tuple(leaf.shape))).encode())
                    digest.update(leaf.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def record(self, model: nn.Module, stack: LayerStack, causal: bool | None = None) -> Recording:
        """Runs ``model`` on every batch and records the rows of each layer of ``stack``.

        Args:
            model: The model to run; if it does not define ``forward``, its child that holds the layers is run.
            stack: The layers of the model.
            causal: Whether the model is causal; None detects it.

        Raises:
            ValueError: A layer is not reached, is reached several times or has an unsupported output; layers are
                parallel to each other; there are fewer than 4 rows; or ``rows="first"`` is used with a causal model,
                whose first position sees one token only.
        """
        with isolated(model):
            model = model if self.forward else _with_forward(model, stack)
            causal = self._is_causal(model, stack) if causal is None else causal
            if causal and self.rows == "first":
                raise ValueError("rows='first' of a causal model sees one token only: use 'last', 'mean' or 'tokens'.")
            parts, examples, start = [], [], 0
            for batch in self.batches:
                extract = _RowExtractor(self, batch, causal, start)
                parts.append(self._run(model, stack, batch, extract))
                examples.append(extract.examples)
                start += batch_size(batch)
        rows = [torch.cat(layer) for layer in zip(*parts, strict=True)]
        if len(rows[0]) < MIN_ROWS:
            raise ValueError(f"The probe gives {len(rows[0])} rows: a comparison needs at least {MIN_ROWS}.")
        numbers = torch.cat(examples)
        of_example = documents(self.batches)
        return Recording(rows, numbers if of_example is None else of_example[numbers], causal)

    def _run(
        self, model: nn.Module, stack: LayerStack, batch: Any, take: Callable[[str, nn.Module, Tensor], Tensor]
    ) -> list[Tensor]:
        """Runs one forward; returns the result of ``take`` for each layer's output."""
        found: dict[str, Tensor] = {}
        last: tuple[str, Any, Tensor | None] = ("", None, None)

        def hook(name: str, layer: nn.Module, args: Any, output: Any) -> None:
            nonlocal last
            activation = _activation(name, output)
            if name in found:
                raise ValueError(
                    f"Layer {name!r} ran several times in one forward, so its depth is ambiguous: name other layers."
                )
            layer_input = args[0] if args and isinstance(args[0], Tensor) else None
            if layer_input is not None and layer_input is last[1] and last[2] is not layer_input:
                raise ValueError(
                    f"Layers {last[0]!r} and {name!r} read the same input: they are parallel, not sequential. Use "
                    "layers= to name layers that follow each other."
                )
            last = name, layer_input, _first_tensor(output)
            found[name] = take(name, layer, activation)

        weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))

        def placed(t: Tensor) -> Tensor:
            # Copied, because the first module may work in place and the probe must not change.
            return t.to(weight.device, weight.dtype if t.is_floating_point() else t.dtype, copy=True)

        with contextlib.ExitStack() as hooks:
            for name, layer in zip(stack.names, stack.modules, strict=True):
                handle = layer.register_forward_hook(lambda m, args, out, name=name: hook(name, m, args, out))
                hooks.callback(handle.remove)
            hooks.enter_context(seeded(model, self.forward_seed))
            (self.forward or feed)(model, tree_map_only(Tensor, placed, batch))
        unreached = [name for name in stack.names if name not in found]
        if unreached:
            raise ValueError(
                f"The forward never reached layer {', '.join(unreached)}: check layers=, or pass a "
                "forward=(model, batch) -> output that runs them."
            )
        return [found[name] for name in stack.names]

    def _is_causal(self, model: nn.Module, stack: LayerStack) -> bool:
        """Returns whether perturbing the last position affects no other, while perturbing the first affects others.

        Returns False if the layers' outputs don't have the positions of the inputs.
        """
        batch = longest_example(self.batches[0])
        mask, inputs = attention_mask(batch), positions_input(batch)
        if inputs is None or inputs.dim() < 2:
            return False
        fits = mask is not None and mask.shape == inputs.shape[:2]
        real = mask[0].nonzero().flatten() if mask is not None and fits else torch.arange(inputs.shape[1])
        if len(real) < 2:
            return False
        first, last = int(real[0]), int(real[-1])

        def activations(position: int | None) -> list[Tensor]:
            changed = batch if position is None else perturbed(batch, inputs, position)
            return self._run(model, stack, changed, lambda _, __, output: output)

        before = activations(None)
        if any(a.dim() != 3 or a.shape[1] != inputs.shape[1] for a in before):
            return False
        end, start = activations(last), activations(first)
        pairs = list(zip(before, end, start, strict=True))
        ignores_later = all(_moved(a[:, :last], b[:, :last]) <= UNMOVED for a, b, _ in pairs)
        uses_earlier = any(_moved(a[:, first + 1 :], c[:, first + 1 :]) > UNMOVED for a, _, c in pairs)
        return ignores_later and uses_earlier


@dataclass
class _RowExtractor:
    """Extracts the rows of one batch from each layer's output, the same rows for all layers."""

    probe: Probe
    batch: Any
    causal: bool
    start: int
    examples: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def __call__(self, name: str, layer: nn.Module, output: Tensor) -> Tensor:
        size = batch_size(self.batch)
        if output.dim() not in (2, 3, 4) or len(output) != size:
            raise ValueError(
                f"Layer {name!r} returns shape {tuple(output.shape)} for a batch of {size}: it must have 2 to 4 "
                "dimensions, with examples along dimension 0."
            )
        if output.dim() == 4:
            conv = any(isinstance(m, nn.modules.conv._ConvNd) for m in layer.modules())
            output = output.flatten(2).mT if conv else output.flatten(1, 2)
        elif output.dim() == 3 and _ends_in_conv1d(layer, output.shape[1]):
            output = output.mT
        if output.dim() == 2:
            self.examples = self.start + torch.arange(size)
            return output
        return self._rows(output, self._real(name, output))

    def _real(self, name: str, output: Tensor) -> Tensor:
        """Returns (B, T) booleans: the positions to include."""
        mask = attention_mask(self.batch)
        if mask is None:
            mask = torch.ones(output.shape[:2], dtype=torch.bool)
        elif mask.shape != output.shape[:2]:
            raise ValueError(
                f"Layer {name!r} returns {output.shape[1]} positions, attention_mask has {mask.shape[1]}: pass "
                "forward= or a probe without the mask."
            )
        if self.causal:
            mask = mask & (mask.cumsum(dim=1) > 1)  # all but the first non-padding position, also with left padding
        if not bool(mask.any(dim=1).all()):
            empty = self.start + int((~mask.any(dim=1)).nonzero()[0])
            raise ValueError(f"Example {empty} of the probe has no usable position: leave it out.")
        return mask

    def _rows(self, output: Tensor, real: Tensor) -> Tensor:
        if self.probe.rows == "mean":
            self.examples = self.start + torch.arange(len(real))
            weights = real.to(output.device)[..., None]
            # Select rather than multiply, because padding may contain NaN.
            return torch.where(weights, output, 0).sum(dim=1) / weights.sum(dim=1)
        pairs = [(i, p) for i, mask in enumerate(real) for p in self._positions(self.start + i, mask)]
        which, where = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).unbind(dim=1)
        self.examples = self.start + which
        return output[which.to(output.device), where.to(output.device)]

    def _positions(self, example: int, mask: Tensor) -> list[int]:
        real: list[int] = mask.nonzero().flatten().tolist()
        if self.probe.rows == "last":
            return real[-1:]
        if self.probe.rows == "first":
            return real[:1]
        share, rest = divmod(self.probe.max_tokens, sum(map(batch_size, self.probe.batches)))
        quota = share + (example < rest)
        # Seeded per example, so that the sample depends on neither batch size nor padding.
        generator = torch.Generator().manual_seed(self.probe.seed * 1_000_003 + example)
        order = torch.randperm(len(real), generator=generator)[:quota].sort().values
        return [real[i] for i in order.tolist()]


def _activation(name: str, output: Any) -> Tensor:
    """Returns a copy of a layer's output, or of the first tensor in its output tuple, dict or dataclass."""
    item = _first_tensor(output)
    if item is None:
        raise ValueError(f"Layer {name!r} returns {type(output).__name__} without a tensor: name other layers.")
    if isinstance(item, DTensor):
        item = item.full_tensor()
    # Copied, because the next module may work in place, such as nn.ReLU(inplace=True).
    return item.detach().to(torch.float64 if item.dtype == torch.float64 else torch.float32, copy=True)


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Mapping):
        output = list(output.values())
    elif dataclasses.is_dataclass(output):
        output = [getattr(output, f.name) for f in dataclasses.fields(output)]
    items = output if isinstance(output, (tuple, list)) else [output]
    return next((item for item in items if isinstance(item, Tensor)), None)


def _with_forward(model: nn.Module, stack: LayerStack) -> nn.Module:
    """Returns ``model`` if it defines ``forward``, else the child that holds all layers.

    Raises:
        ValueError: Several children hold layers.
    """
    if getattr(model.forward, "__qualname__", "") not in NO_FORWARD:
        return model
    children = {name.partition(".")[0] for name in stack.names}
    if len(children) > 1:
        raise ValueError(f"{type(model).__name__} has no forward: pass forward=(model, batch) -> output.")
    return _with_forward(model.get_submodule(children.pop()), stack)


def _ends_in_conv1d(layer: nn.Module, channels: int) -> bool:
    """Returns whether a layer's last weight is an nn.Conv1d with ``channels`` outputs, so that it returns (B, C, T)."""
    weighted = [m for m in layer.modules() if any(p.dim() > 1 for p in m.parameters(recurse=False))]
    return bool(weighted) and isinstance(weighted[-1], nn.Conv1d) and weighted[-1].out_channels == channels


def _moved(before: Tensor, after: Tensor) -> float:
    """Returns the largest difference relative to the largest value; 0 for empty tensors."""
    return float((after - before).abs().max() / before.abs().max().clamp(min=1e-30)) if before.numel() else 0.0
