"""The result of restoring single layers: what their change is worth. Knows no torch, for those who read records."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from depthcb.intervals import Estimate
from depthcb.profile import Profile
from depthcb.rank_correlation import RankCorrelation, rank_correlation


@dataclass(frozen=True)
class RestoreProfile:
    """Differences of the loss, in its own unit, with 95 % intervals over batches (paired, Student's) [ours].

    Everything outside the L layers, such as a new head, is the tuned model's throughout.

    Args:
        layer_names: Names of the layers, input side first.
        restored: Loss with this layer pretrained, minus that of the tuned model: what its change is worth.
        restored_from_input: The same with this layer and all before it pretrained.
        restored_from_output: The same with this layer and all after it pretrained.
        transplanted: Loss with all layers pretrained but this one, minus that with all pretrained.
        tuned_loss: Mean loss of the tuned model.
        pretrained_loss: Mean loss with all layers pretrained.
        batches: Number of batches.
    """

    layer_names: tuple[str, ...]
    restored: tuple[Estimate, ...]
    restored_from_input: tuple[Estimate, ...]
    restored_from_output: tuple[Estimate, ...]
    transplanted: tuple[Estimate, ...]
    tuned_loss: float
    pretrained_loss: float
    batches: int

    @property
    def worth(self) -> tuple[float, ...]:
        """What each layer's change is worth: how much the loss rises without it."""
        return tuple(estimate.value for estimate in self.restored)

    def rank_correlation(self, profile: Profile) -> RankCorrelation:
        """Returns the rank correlation of the layers' change with their worth.

        Raises:
            ValueError: The profile has other layers.
        """
        if len(profile.change) != len(self.worth):
            raise ValueError(f"The profile has {len(profile.change)} layers, the restore profile {len(self.worth)}.")
        return rank_correlation(profile.change, self.worth)

    def to_dict(self) -> dict[str, Any]:
        """Returns the profile in JSON types."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """Returns the profile as a JSON object."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> RestoreProfile:
        """Recreates a profile from `to_json`."""
        return cls.from_dict(json.loads(text))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> RestoreProfile:
        """Recreates a profile from `to_dict`."""
        estimates = {
            name: tuple(Estimate(**estimate) for estimate in value)
            for name, value in fields.items()
            if name.startswith(("restored", "transplanted"))
        }
        return cls(**{**fields, **estimates, "layer_names": tuple(fields["layer_names"])})
