"""Depth profiles between two models, without a Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
    options: dict[str, Any] = {"rows": rows, "forward": forward, "causal": causal, "axes": axes, "mask": mask}
    fixed = Probe.collect(probe, probe_rows, max_tokens=probe_rows, **options)
    return Comparison.with_reference(reference_model, fixed, layers=layers, measures=measures).profiles(model)


@dataclass(frozen=True)
class Comparison:
    """A recorded reference model, which any number of models is compared with, one after the other.

    Args:
        probe: The fixed inputs.
        reference: What was recorded of the reference model.
        measures: The measures.
        layers: The layers, as accepted by `LayerStack.find`.

    Example:
        >>> import torch
        >>> from depthcb.probe import Probe
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(6, 6) for _ in range(3)])
        >>> compared = Comparison.with_reference(model, Probe((torch.randn(32, 6),)))
        >>> compared.profiles(model, step=100)["cka"].change
        (0.0, 0.0, 0.0)
    """

    probe: Probe
    reference: Reference
    measures: tuple[Measure, ...]
    layers: str | list[str] | None = None

    @classmethod
    def with_reference(
        cls,
        model: nn.Module,
        probe: Probe,
        *,
        layers: str | list[str] | None = None,
        measures: Sequence[str | Measure] = ("cka", "cka_normalized"),
    ) -> Comparison:
        """Records the reference model, which is not kept.

        Raises:
            ValueError: The probe cannot be measured.
        """
        chosen = find_measures(measures)
        reference = Reference.record(probe, model, LayerStack.find(model, layers), chosen)
        return cls(probe, reference, tuple(chosen), layers)

    def profiles(self, model: nn.Module, step: int = 0) -> dict[str, Profile]:
        """Returns one profile per measure of how far each layer of a model is from the reference.

        Args:
            model: The model, with the same number of layers.
            step: The number of its training step, for the profiles.

        Raises:
            ValueError: The models differ in number of layers, or the probe cannot be measured.
        """
        stack, depth = LayerStack.find(model, self.layers), len(self.reference.layer_names)
        if len(stack) != depth:
            raise ValueError(f"The models have {depth} and {len(stack)} layers: their depths can't be paired.")
        return self.reference.profiles(self.probe.record(model, stack), self.measures, step=step, epoch=0)
