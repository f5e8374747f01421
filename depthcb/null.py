"""The null of a profile: the change caused by random weight perturbations of the same size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from depthcb.probe import Probe
from depthcb.profile import Profile
from depthcb.reference import Reference
from depthcb.similarity import Measure
from depthcb.stack import LayerStack


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
    """Measures the profiles that random weight changes of the same size give: the null of a profile [ours].

    Adds seeded Gaussian noise to each tensor of the pretrained stack, with the norm of that tensor's net change in
    ``model``: the same sizes, but random directions. Memory: one more copy of the stack.

    Args:
        pretrained: The model at its pretrained weights, which are restored at the end.
        model: The fine-tuned model.
        probe: The probe that ``reference`` was recorded on.
        reference: The recorded pretrained model.
        measures: The measures of the profiles.
        layers: The layers, as accepted by `LayerStack.find`.
        seeds: Seeds of the noise, one draw per seed.

    Returns:
        One profile per measure for each seed.
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
    """Returns the values with the parameter's dtype, device and sharding."""
    values = values.to(parameter.device, parameter.dtype)
    if not isinstance(parameter, DTensor):
        return values
    return distribute_tensor(values, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _norm(tensor: Tensor) -> float:
    norm = torch.linalg.vector_norm(tensor.double())
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
