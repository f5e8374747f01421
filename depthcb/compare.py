"""Depth profiles of two models, and of noise of the same size, without a Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from depthcb.probe import Forward, Probe, Rows
from depthcb.profile import Profile
from depthcb.reference import Reference
from depthcb.similarity import Measure, find_measures
from depthcb.stack import LayerStack


def depth_profile(
    reference_model: nn.Module,
    model: nn.Module,
    probe: Any,
    *,
    layers: str | list[str] | None = None,
    measures: Sequence[str] = ("cka", "cka_normalized"),
    rows: Rows = "mean",
    probe_rows: int = 256,
    forward: Forward | None = None,
) -> dict[str, Profile]:
    """How far each layer of ``model`` has moved from ``reference_model``: one profile a measure.

    Args:
        reference_model: The pretrained side.
        model: The fine-tuned side, with equally many layers.
        probe: A batch, a list of batches, a Dataset or a DataLoader.
        layers: The layers, as `LayerStack.find` takes them.
        measures: Names out of `depthcb.similarity.MEASURES`.
        rows: What a row is, as `Probe` takes it.
        probe_rows: Most examples taken from a dataset, and most token rows.
        forward: ``(model, batch) -> anything``: how a batch is fed.

    Raises:
        ValueError: Another number of layers, or whatever keeps the probe from being measured.

    Example:
        >>> import torch
        >>> from depthcb import depth_profile
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(6, 6) for _ in range(3)])
        >>> depth_profile(model, model, torch.randn(32, 6))["cka"].change
        (0.0, 0.0, 0.0)
    """
    chosen = find_measures(measures)
    fixed = Probe.collect(probe, probe_rows, rows=rows, max_tokens=probe_rows, forward=forward)
    stacks = [LayerStack.find(m, layers) for m in (reference_model, model)]
    if len(stacks[0]) != len(stacks[1]):
        raise ValueError(f"The models have {len(stacks[0])} and {len(stacks[1])} layers: depths can't be paired.")
    reference = Reference.record(fixed, reference_model, stacks[0], chosen)
    return reference.profiles(fixed.record(model, stacks[1]), chosen, step=0, epoch=0)


def null_profiles(
    pretrained: nn.Module,
    model: nn.Module,
    probe: Probe,
    reference: Reference,
    measures: Sequence[Measure],
    *,
    layers: str | list[str] | None = None,
    seeds: Sequence[int] = (0, 1),
) -> list[dict[str, Profile]]:
    """What random changes of the same size would have done: the null of a profile [ours].

    Each tensor of the pretrained stack gets seeded Gaussian noise with the norm of that tensor's net change in
    ``model``: same sizes, random directions. Memory: one more copy of the stack.

    Args:
        pretrained: The model at its pretrained weights, which it has again at the end.
        model: The fine-tuned model.
        probe: The probe that ``reference`` was recorded on.
        reference: The recorded pretrained side.
        measures: The measures of the profiles.
        layers: The layers, as `LayerStack.find` takes them.
        seeds: One draw of noise each.

    Returns:
        For each seed one profile a measure.
    """
    stack = LayerStack.find(pretrained, layers)
    noisy, tuned = (
        [p.detach() for layer in found.parameters() for p in layer] for found in (stack, LayerStack.find(model, layers))
    )
    clean = [p.clone() for p in noisy]
    sizes = [_norm(after.to(before) - before) for before, after in zip(clean, tuned, strict=True)]
    draws = []
    try:
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            for p, before, size in zip(noisy, clean, sizes, strict=True):
                noise = _like(torch.randn(p.shape, generator=generator), p)
                p.copy_(before + noise * (size / _norm(noise)))
            recording = probe.record(pretrained, stack, reference.causal)
            draws.append(reference.profiles(recording, measures, step=0, epoch=0))
    finally:
        for p, before in zip(noisy, clean, strict=True):
            p.copy_(before)
    return draws


def _like(values: Tensor, parameter: Tensor) -> Tensor:
    """The values in the parameter's type and place: this process's piece of them, where it is in pieces."""
    values = values.to(parameter.device, parameter.dtype)
    if not isinstance(parameter, DTensor):
        return values
    return distribute_tensor(values, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _norm(tensor: Tensor) -> float:
    norm = torch.linalg.vector_norm(tensor.double())
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
