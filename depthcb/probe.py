"""Runs a model on fixed inputs without side effects and records one vector per row and layer.

`Probe.record` runs the model once per batch with a forward hook on every layer. All state that the run could change is
restored: hooks, train/eval flags, random states, attributes of modules and precision flags. Random states are seeded
alike for every run, so that a forward that draws (patch masks, noise) gives the same for the same weights. It runs in
fp32 (no autocast, no TF32), because in bf16 a single outlier channel can hide the change of all others.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from depthcb.batches import batch_size, check_batch, collect_batches, documents, leaves, moved_to
from depthcb.feeding import Call, Execute, call_of, containers, feed, run_call
from depthcb.isolation import generators_of, isolated, isolated_rng, seeded
from depthcb.layout import (
    Edit,
    Layout,
    Look,
    Take,
    arranged,
    check_axes,
    feature_dimension,
    find_layout,
    fitting,
    has_weights,
    masks_in,
    real_positions,
    seen_by,
)
from depthcb.similarity.cka import MIN_ROWS
from depthcb.stack import LayerStack

Rows = Literal["mean", "tokens", "last", "first"]
Forward = Callable[[nn.Module, Any], Any]
#: ``batch -> (examples, positions) tensor``, 0 where a position is padding; False if there is none.
Mask = Callable[[Any], Tensor] | Literal[False]
Feed = Callable[[nn.Module, LayerStack, Any], Call | None]
#: Qualified names of ``forward`` in a class that does not define it: nn.Module's and Lightning's defaults.
NO_FORWARD = ("_forward_unimplemented", "LightningModule.forward")


@dataclass(frozen=True)
class Recording:
    """The result of one pass over the probe.

    Args:
        rows: (n, d) activations of each of L layers, in fp32, or fp64 for fp64 models.
        examples: (n,) number of the example that each row belongs to, or of its document where the batches name it.
        layout: How the layers' outputs were read.
        sites: The rows of each further stack that was recorded in the same pass.
    """

    rows: list[Tensor]
    examples: Tensor
    layout: Layout
    sites: tuple[list[Tensor], ...] = ()

    @property
    def causal(self) -> bool:
        """Whether the model is causal, so that position 0 was excluded."""
        return self.layout.causal


@dataclass(frozen=True)
class Probe:
    """Fixed inputs, and how to turn a layer's output into rows.

    Args:
        batches: The inputs, on the CPU: whatever the model or ``forward`` takes. A (B,) integer tensor ``document`` in
            a dict names the document of each example: intervals are over documents then, because examples from the
            same one are not independent.
        rows: ``"mean"``, ``"last"`` or ``"first"`` give one row per example: the mean over its non-padding positions,
            or the last or first of them; ``"tokens"`` gives a seeded sample of positions, the same number from each
            example [ours]. For causal models position 0 is excluded, because its massive activations would dominate
            every measure.
        max_tokens: Maximum number of rows sampled by ``"tokens"``.
        forward: ``(model, batch) -> anything``: how to run the model on a batch. By default a dict is passed by
            keyword, and a tensor or the first element of a tuple by position. Floating-point inputs are cast to the
            dtype of the model's weights.
        seed: Seed of the token sample.
        forward_seed: Seed of the random states, and of generators in the model, in the forward of the first batch; each
            further batch adds 1.
        causal: Whether later positions depend on earlier ones only; None finds it by changing single positions of the
            first layer's input.
        axes: The dimensions of the layers' outputs, one letter each, such as ``"TBD"``: B for examples, T for
            positions, D for features; None finds them: features by the layers' weights, examples by their number.
        mask: ``batch -> (examples, positions) tensor`` that is 0 where a position is padding, or False if there is no
            padding; None finds the model's ``attention_mask`` that belongs to the layers.
        transfer: ``batch -> batch``: what happens to a batch on the way to the model, such as the move to its device.
        feed: ``(model, stack, batch) -> Call``: how the model is called on a batch where ``forward`` is not given;
            None from it means the default.

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
    causal: bool | None = None
    axes: str | None = None
    mask: Mask | None = None
    transfer: Callable[[Any], Any] | None = None
    feed: Feed | None = None

    def __post_init__(self) -> None:
        if self.rows not in get_args(Rows):
            raise ValueError(f"rows={self.rows!r} is unknown: use one of {get_args(Rows)}.")
        if self.axes is not None:
            check_axes(self.axes)
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
            for leaf in leaves(batch):
                if isinstance(leaf, Tensor):
                    digest.update(repr((leaf.dtype, tuple(leaf.shape))).encode())
                    digest.update(leaf.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
                elif isinstance(leaf, str):
                    digest.update(leaf.encode())
        return digest.hexdigest()

    def record(
        self,
        model: nn.Module,
        stack: LayerStack,
        layout: Layout | None = None,
        execute: Execute = run_call,
        sites: Sequence[LayerStack] = (),
    ) -> Recording:
        """Runs ``model`` on every batch and records the rows of each layer of ``stack``.

        Args:
            model: The model to run; if it does not define ``forward``, its child that holds the layers is run.
            stack: The layers of the model.
            layout: How to read the layers' outputs; None finds it on the first batch.
            execute: ``(model, call) -> anything``: runs a call.
            sites: Further stacks of as many modules, with outputs of the same layout, to record in the same pass;
                need a ``layout``.

        Raises:
            ValueError: A layer is not reached, is reached several times or has an unsupported output; layers are
                parallel to each other; there are fewer than 4 rows; or ``rows="first"`` is used with a causal model,
                whose first position sees one token only.
        """
        with isolated(model):
            generators = generators_of(model)
            passes = [
                _Pass(model, stack, execute, generators, self.forward_seed + i, tuple(sites))
                for i in range(len(self.batches))
            ]
            known = layout is not None and bool(layout.axes)  # older checkpoints have none
            if layout is None or not known:
                layout = self._layout(passes[0])
            if layout.causal and self.rows == "first":
                raise ValueError("rows='first' of a causal model sees one token only: use 'last', 'mean' or 'tokens'.")
            parts, examples, start = [], [], 0
            names = tuple(name for of in (stack, *sites) for name in of.names)
            repeated = dataclasses.replace(layout, axes=layout.axes * (1 + len(sites)))
            for run, batch in zip(passes, self.batches, strict=True):
                placed, call = self._call(run, batch)
                extract = _RowExtractor(self, repeated, names, self._real(placed, call, layout), run.masks, start)
                parts.append(run.rows(call, extract) if known else run(call, extract).outputs)
                examples.append(extract.examples)
                start += extract.size
        rows = [torch.cat(layer) for layer in zip(*parts, strict=True)]
        if len(rows[0]) < MIN_ROWS:
            raise ValueError(f"The probe gives {len(rows[0])} rows: a comparison needs at least {MIN_ROWS}.")
        numbers = torch.cat(examples)
        of_example = documents(self.batches)
        split = [rows[start : start + len(stack)] for start in range(0, len(rows), len(stack))]
        return Recording(split[0], numbers if of_example is None else of_example[numbers], layout, tuple(split[1:]))

    def run_first(self, model: nn.Module, stack: LayerStack) -> None:
        """Runs ``model`` on the first batch, as `record` does, for hooks that look at it."""
        with isolated(model):
            run = _Pass(model, stack, run_call, generators_of(model), self.forward_seed)
            _, call = self._call(run, self.batches[0])
            with seeded(run.generators, run.seed):
                run_call(model, call)

    def _call(self, run: _Pass, batch: Any) -> tuple[Any, Call]:
        """Returns a batch as the model gets it, and the call."""
        model, stack = run.model, run.stack
        found = (p for p in model.parameters() if p.is_floating_point() and not p.is_meta)  # meta: not read yet
        weight = next(found, torch.empty(0))
        batch = copy.deepcopy(batch)  # the model, or a hook of the user's, may work in place
        with seeded(run.generators, run.seed):
            batch = self.transfer(batch) if self.transfer else moved_to(batch, weight.device)
            batch = apply_to_collection(batch, Tensor, lambda t: t.to(weight.dtype) if t.is_floating_point() else t)
            if self.forward is not None:
                forward = self.forward
                return batch, Call(lambda payload: forward(model, payload), batch)
            call = self.feed(model, stack, batch) if self.feed else None
        return batch, call or feed(_with_forward(model, stack), batch)

    def _layout(self, run: _Pass) -> Layout:
        batch, call = self._call(run, self.batches[0])
        given = self._given(batch)
        size = batch_size(batch)
        return find_layout(run, call, size, run.stack.names, axes=self.axes, causal=self.causal, given=given)

    def _real(self, batch: Any, call: Call, layout: Layout) -> Tensor | None:
        """Returns (B, T) booleans of the positions that are no padding; None if all are real."""
        given = self._given(batch)
        if given is None:
            return real_positions(call, layout.mask)
        return None if given is False else given

    def _given(self, batch: Any) -> Tensor | Literal[False] | None:
        """Returns what ``mask`` says of a batch."""
        return seen_by(self.mask(batch)) if callable(self.mask) else self.mask


@dataclass(frozen=True)
class _Pass:
    """Runs a model and looks at its layers."""

    model: nn.Module
    stack: LayerStack
    execute: Execute
    generators: list[Any]
    seed: int
    sites: tuple[LayerStack, ...] = ()
    #: `Look.masks` of the last call.
    masks: list[Tensor] = dataclasses.field(default_factory=list)

    def __call__(self, call: Call, take: Take, edit: Edit | None = None) -> Look:
        """Runs a call.

        Raises:
            ValueError: A layer is not reached, several times, or reads the same input as another one.
        """
        watched = _Watched(self.stack, take)
        with self._hooks(watched) as hooks:
            watched.look_inside(hooks, edit)
            self.execute(self.model, call)
        return watched.look(list(self.masks))

    def rows(self, call: Call, take: Take) -> list[Tensor]:
        """Returns what ``take`` keeps of each layer's output on a call whose layout is known; ends after the last one.

        Raises:
            ValueError: A layer is not reached, or reads the same input as another one.
        """
        watched = _Watched(self.stack, take, self.sites)
        # A forward of sharded parameters cannot be left half-way.
        watched.leaves = not any(isinstance(p, DTensor) for p in self.model.parameters())
        with self._hooks(watched), contextlib.suppress(_Recorded):
            self.execute(self.model, call)
        return watched.outputs()

    @contextlib.contextmanager
    def _hooks(self, watched: _Watched) -> Iterator[contextlib.ExitStack]:
        self.masks.clear()
        with contextlib.ExitStack() as hooks:
            for module in containers(self.model, self.stack):
                hooks.callback(module.register_forward_pre_hook(self._keep_masks, with_kwargs=True).remove)
            for index, layer in enumerate(watched.modules):
                hooks.callback(layer.register_forward_hook(functools.partial(watched.after, index)).remove)
            hooks.enter_context(seeded(self.generators, self.seed))
            yield hooks

    def _keep_masks(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with contextlib.suppress(TypeError, ValueError):  # arguments that don't fit the signature, or none to be read
            self.masks.extend(masks_in(call_of(module, args, kwargs)))


class _Recorded(BaseException):
    """Ends a forward after its last layer; not an Exception, which the model might catch."""


class _Watched:
    """What is seen of the layers in one forward."""

    def __init__(self, stack: LayerStack, take: Take, sites: Sequence[LayerStack] = ()) -> None:
        self.stack, self.take, self.leaves = stack, take, False
        self.names = [name for of in (stack, *sites) for name in of.names]
        self.modules = [module for of in (stack, *sites) for module in of.modules]
        self.seen = [of.seen for of in (stack, *sites) for _ in of.modules]
        self.edit: Edit | None = None
        self.kept: dict[int, Tensor] = {}
        self.shapes: dict[int, torch.Size] = {}
        self.within: dict[int, list[tuple[torch.Size, int]]] = {}
        self.first_input: Tensor | None = None
        self.last: tuple[str, Any, Tensor | None] = ("", None, None)

    def look_inside(self, hooks: contextlib.ExitStack, edit: Edit | None) -> None:
        """Keeps, and edits, the first layer's input; notes the dimension of the features."""
        self.edit = edit
        first = self.stack.modules[0]
        hooks.callback(first.register_forward_pre_hook(self._before, with_kwargs=True).remove)
        for index, layer in enumerate(self.stack.modules):
            for module in layer.modules():
                if has_weights(module):
                    # Before the layer's own hook, which may be on the same module.
                    inside = functools.partial(self._inside, index)
                    hooks.callback(module.register_forward_hook(inside, prepend=True).remove)

    def outputs(self) -> list[Tensor]:
        unreached = [name for i, name in enumerate(self.names) if i not in self.kept]
        if unreached:
            raise ValueError(
                f"The forward never reached layer {', '.join(unreached)}: check layers=, or pass a "
                "forward=(model, batch) -> output that runs them."
            )
        return [self.kept[i] for i in range(len(self.modules))]

    def look(self, masks: list[Tensor]) -> Look:
        outputs, order = self.outputs(), range(len(self.stack))
        features = [[d for shape, d in self.within.get(i, []) if shape == self.shapes[i]] for i in order]
        return Look(
            [self.shapes[i] for i in order],
            outputs,
            self.first_input,
            [dims[-1] if dims else None for dims in features],
            masks,
        )

    def _before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Keeps the first layer's input, and edits it."""
        value = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point()), None)
        if self.first_input is None and value is not None:
            self.first_input = value.detach().clone()
            if self.edit is not None:
                edited = self.edit(value)
                return tuple(edited if v is value else v for v in args), {
                    k: edited if v is value else v for k, v in kwargs.items()
                }
        return None

    def _inside(self, index: int, module: nn.Module, args: Any, output: Any) -> None:
        tensor = first_tensor(output)
        dimension = None if tensor is None else feature_dimension(module, tensor)
        if tensor is not None and dimension is not None:
            self.within.setdefault(index, []).append((tensor.shape, dimension))

    def after(self, index: int, layer: nn.Module, args: Any, output: Any) -> None:
        name = self.names[index]
        activation = _activation(name, self.seen[index](args, output))
        if index in self.kept:
            raise ValueError(
                f"Layer {name!r} ran several times in one forward, so its depth is ambiguous: name other layers, or "
                "pass a forward=(model, batch) -> output that runs each once."
            )
        layer_input = args[0] if index < len(self.stack) and args and isinstance(args[0], Tensor) else None
        if layer_input is not None and layer_input is self.last[1] and self.last[2] is not layer_input:
            raise ValueError(
                f"Layers {self.last[0]!r} and {name!r} read the same input: they are parallel, not sequential. Use "
                "layers= to name layers that follow each other."
            )
        if index < len(self.stack):  # sites are inside layers, not between them
            self.last = name, layer_input, first_tensor(output)
        self.shapes[index] = activation.shape
        self.kept[index] = self.take(index, activation)
        if self.leaves and len(self.kept) == len(self.modules):
            raise _Recorded


@dataclass
class _RowExtractor:
    """Extracts the rows of one batch from each layer's output, the same rows for all layers."""

    probe: Probe
    layout: Layout
    names: tuple[str, ...]
    real: Tensor | None
    inner: list[Tensor]
    start: int
    size: int = 0
    examples: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def __call__(self, index: int, output: Tensor) -> Tensor:
        axes = self.layout.axes[index]
        if len(axes) != output.dim():
            raise ValueError(
                f"Layer {self.names[index]!r} returns shape {tuple(output.shape)}, but its dimensions were {axes!r} in "
                "the first batch: use a probe whose batches are alike."
            )
        output = arranged(output, axes)
        self.size = len(output)
        if output.dim() == 2:
            self.examples = self.start + torch.arange(self.size)
            return _copied(output)
        return self._rows(output, self._real(self.names[index], output))

    def _real(self, name: str, output: Tensor) -> Tensor:
        """Returns (B, T) booleans: the positions to include."""
        shape = (output.shape[0], output.shape[1])
        mask = fitting(self.real, self.inner, shape)
        if mask is None:
            assert self.real is not None
            raise ValueError(
                f"Layer {name!r} returns {shape[1]} positions, {self.layout.mask or 'the mask'} has "
                f"{self.real.shape[1]}: pass mask=batch -> ({shape[0]}, {shape[1]}) tensor of the real positions, or "
                "mask=False if all count."
            )
        if self.layout.causal:
            mask = mask & (mask.cumsum(dim=1) > 1)  # all but the first non-padding position, also with left padding
        if not bool(mask.any(dim=1).all()):
            empty = self.start + int((~mask.any(dim=1)).nonzero()[0])
            raise ValueError(f"Example {empty} of the probe has no usable position: leave it out.")
        return mask

    def _rows(self, output: Tensor, real: Tensor) -> Tensor:
        if self.probe.rows == "mean":
            self.examples = self.start + torch.arange(len(real))
            if bool(real.all()):
                return output.mean(dim=1, dtype=_dtype(output))
            weights = real.to(output.device)[..., None]
            # Select rather than multiply, because padding may contain NaN.
            return torch.where(weights, output, 0).sum(dim=1, dtype=_dtype(output)) / weights.sum(dim=1)
        pairs = [(i, p) for i, mask in enumerate(real) for p in self._positions(self.start + i, mask)]
        which, where = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).unbind(dim=1)
        self.examples = self.start + which
        return _copied(output[which.to(output.device), where.to(output.device)])

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
    """Returns a layer's output, or the first tensor in its output tuple, dict or dataclass."""
    item = first_tensor(output)
    if item is None:
        raise ValueError(f"Layer {name!r} returns {type(output).__name__} without a tensor: name other layers.")
    return (item.full_tensor() if isinstance(item, DTensor) else item).detach()


def _dtype(output: Tensor) -> torch.dtype:
    return torch.float64 if output.dtype == torch.float64 else torch.float32


def _copied(output: Tensor) -> Tensor:
    """Returns a copy, because the next module may work in place, such as nn.ReLU(inplace=True)."""
    return output.to(_dtype(output), copy=True)


def first_tensor(output: Any) -> Tensor | None:
    """Returns the first tensor of a layer's output, which may be a tuple, dict or dataclass; None if there is none."""
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
