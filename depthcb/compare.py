"""Depth profiles between two models, without a Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from depthcb.probe import Forward, Mask, Probe, Rows
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
    measures: Sequence[str | Measure] = ("cka", "cka_normalized"),
    rows: Rows = "mean",
    probe_rows: int = 256,
    forward: Forward | None = None,
    causal: bool | None = None,
    axes: str | None = None,
    mask: Mask | None = None,
) -> dict[str, Profile]:
    """Returns one profile per measure of how far each layer of ``model`` has moved from ``reference_model``.

    Args:
        reference_model: The pretrained model.
        model: The fine-tuned model, with the same number of layers.
        probe: A batch, a list of batches, a Dataset or a DataLoader.
        layers: The layers, as accepted by `LayerStack.find`.
        measures: Names from `depthcb.similarity.MEASURES`, or custom `depthcb.similarity.Measure` objects.
        rows: How rows are formed; see `Probe`.
        probe_rows: Maximum number of examples taken from a dataset, and of token rows.
        forward: ``(model, batch) -> anything``: how to run the model on a batch.
        causal: Whether the models are causal; None finds it. See `Probe`.
        axes: The dimensions of the layers' outputs, such as ``"TBD"``; None finds them. See `Probe`.
        mask: ``batch -> (examples, positions) tensor`` that is 0 at padding, or False; None finds it. See `Probe`.

    Raises:
        ValueError: The models differ in number of layers, or the probe cannot be measured.

    Example:
        >>> import torch
        >>> from depthcb import depth_profile
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(6, 6) for _ in range(3)])
        >>> depth_profile(model, model, torch.randn(32, 6))["cka"].change
        (0.0, 0.0, 0.0)
    """
    chosen = find_measures(measures)
    options: dict[str, Any] = {"rows": rows, "forward": forward, "causal": causal, "axes": axes, "mask": mask}
    fixed = Probe.collect(probe, probe_rows, max_tokens=probe_rows, **options)
    stacks = [LayerStack.find(m, layers) for m in (reference_model, model)]
    if len(stacks[0]) != len(stacks[1]):
        raise ValueError(f"The models have {len(stacks[0])} and {len(stacks[1])} layers: their depths can't be paired.")
    reference = Reference.record(fixed, reference_model, stacks[0], chosen)
    return reference.profiles(fixed.record(model, stacks[1]), chosen, step=0, epoch=0)
