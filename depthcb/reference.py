"""The recorded pretrained model, and the profiles of later recordings against it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from depthcb.errors import NotFiniteError
from depthcb.layout import Layout
from depthcb.probe import Probe, Recording
from depthcb.profile import Profile
from depthcb.rounding import rounding_floor
from depthcb.similarity import Measure, check_defined, effective_rank, sketch
from depthcb.similarity.gram import to_float64
from depthcb.stack import LayerStack

HALVES = 200
#: Minimum number of halves with a defined change in every layer for an interval to be reported [ours].
ENOUGH_HALVES = 180
#: Minimum number of examples for an interval; fewer give too few distinct halves or too few rows per half [ours].
EXAMPLES_FOR_INTERVAL = 8
#: Maximum number of float64 values in one batch of halves (256 MB).
CHUNK = 2**25


@dataclass(frozen=True)
class Reference:
    """Sketches of L layers' reference activations: only what the requested measures need.

    Args:
        sketches: Tensors by kind, one per layer: ``"gram"``, the doubly centred, unnormalised Gram matrix including its
            diagonal (n, n) in float64, whose memory is independent of layer width and training time; ``"factor"`` and
            ``"rows"``, see `depthcb.similarity.Measure`, only if a measure needs them.
        examples: (n,) number of the example that each row comes from, or of its document where the probe names it.
        layer_names: Names of the L layers.
        probe_hash: `Probe.hash` of the recorded probe.
        effective_rank: Effective rank of each layer's Gram matrix: the number of directions that CKA sees [ours].
        layout: How the layers' outputs were read.
        floor: By measure, the change of each layer that rounding alone gives, see `depthcb.rounding`; empty if it was
            not measured.
    """

    sketches: dict[str, list[Tensor]]
    examples: Tensor
    layer_names: tuple[str, ...]
    probe_hash: str
    effective_rank: tuple[float, ...]
    layout: Layout
    floor: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def causal(self) -> bool:
        """Whether the model is causal, so that position 0 was excluded."""
        return self.layout.causal

    @property
    def distinct(self) -> int:
        """Number of distinct examples, or documents where the probe names them."""
        return len(torch.unique(self.examples))

    @cached_property
    def halves(self) -> Tensor:
        """Halves of the rows, see `halves_of`."""
        return halves_of(self.examples)

    @classmethod
    def record(
        cls,
        probe: Probe,
        model: nn.Module,
        stack: LayerStack,
        measures: Sequence[Measure],
        layout: Layout | None = None,
    ) -> Reference:
        """Records ``model`` as the reference, with a known layout or with the one that is found.

        Raises:
            ValueError: `Probe.record` failed, or a layer's activations are non-finite or identical for all rows.
        """
        recording = probe.record(model, stack, layout)
        kinds = {"gram"} | {m.needs for m in measures}  # the effective rank always needs the Grams
        for name, rows in zip(stack.names, recording.rows, strict=True):
            _check_finite(name, rows)
        sketches = {kind: [sketch(kind, r).cpu() for r in recording.rows] for kind in sorted(kinds)}
        for name, k in zip(stack.names, sketches["gram"], strict=True):
            if not bool(k.any()):
                raise ValueError(f"Layer {name!r} has the same activations for all probe rows: nothing to compare.")
        ranks = tuple(effective_rank(k).item() for k in sketches["gram"])
        floor = rounding_floor(probe, model, stack, recording.layout, measures)
        return cls(sketches, recording.examples, stack.names, probe.hash, ranks, recording.layout, floor)

    def profiles(
        self, recording: Recording, measures: Sequence[Measure], step: int, epoch: int, *, intervals: bool = True
    ) -> dict[str, Profile]:
        """Returns one profile per measure for new activations of the same probe.

        Args:
            recording: The activations.
            measures: The measures.
            step: The step number, for the profiles.
            epoch: The epoch number, for the profiles.
            intervals: Whether to compute the intervals, which takes most of the time.

        Raises:
            ValueError: A layer's activations are non-finite or identical for all rows, or the model is causal and the
                reference is not (or vice versa).
        """
        if recording.causal != self.causal:
            kinds = ["causal" if causal else "not causal" for causal in (self.causal, recording.causal)]
            raise ValueError(
                f"The reference model is {kinds[0]}, the current one {kinds[1]}: use the same attention mask for both."
            )
        halves = self.halves if intervals else self.halves[:, :0]
        for name, rows in zip(self.layer_names, recording.rows, strict=True):
            _check_finite(name, rows)
        now = {kind: [sketch(kind, r) for r in recording.rows] for kind in {m.needs for m in measures}}
        return {m.name: self._profile(m, now[m.needs], halves, step, epoch) for m in measures}

    def _profile(self, measure: Measure, now: list[Tensor], halves: Tensor, step: int, epoch: int) -> Profile:
        change, over_halves = [], []
        for name, before, after in zip(self.layer_names, self.sketches[measure.needs], now, strict=True):
            before = before.to(after.device)
            try:
                change.append(check_defined(measure(before, after)).item())
                over_halves.append(_over_halves(measure, before, after, halves))
            except ValueError as error:
                raise ValueError(f"Layer {name!r}, measure {measure.name!r}: {error}.") from error
        fields: dict[str, Any] = {
            "layer_names": self.layer_names,
            "measure": measure.name,
            "title": measure.title,
            "unit": measure.unit,
            "step": step,
            "epoch": epoch,
            "rows": len(self.examples),
            "floor": self.floor.get(measure.name),
        }
        samples = torch.stack(over_halves, dim=1)
        if int((~samples.isnan().any(dim=1)).sum()) < ENOUGH_HALVES:  # all rows of a half may be identical
            return Profile(tuple(change), **fields)
        if measure.depends_on_rows or len(self.examples) > self.distinct:
            # Rows of one document resemble each other and are a larger part of a half's pairs, which shifts its change.
            samples += torch.tensor(change, dtype=torch.float64) - samples.nanmean(dim=0)
        return Profile.from_halves(change, samples.numpy(), **fields)

    def settings(self, measures: Sequence[Measure], rows: str) -> dict[str, Any]:
        """Returns what a record's header says of the comparison.

        Args:
            measures: The measures.
            rows: How rows are formed, see `depthcb.probe.Probe`.
        """
        return {
            "layers": self.layer_names,
            "measures": {m.name: m.definition for m in measures},
            "rows": rows,
            "probe_rows": len(self.examples),
            "distinct": self.distinct,
            "probe_hash": self.probe_hash,
            "causal": self.causal,
            "effective_rank": self.effective_rank,
        }

    def state_dict(self) -> dict[str, Any]:
        """Returns tensors, lists and scalars only, so that checkpoints load with ``weights_only=True``."""
        return {
            "sketches": self.sketches,
            "examples": self.examples,
            "layer_names": list(self.layer_names),
            "probe_hash": self.probe_hash,
            "effective_rank": list(self.effective_rank),
            "causal": self.causal,
            "axes": list(self.layout.axes),
            "mask": self.layout.mask,
            "floor": {measure: list(floors) for measure, floors in self.floor.items()},
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Reference:
        """Recreates a reference from its `state_dict`.

        Raises:
            KeyError: An entry is missing.
            ValueError: The entries are inconsistent or non-finite.
        """
        found = cls(
            state["sketches"],
            state["examples"],
            tuple(state["layer_names"]),
            state["probe_hash"],
            tuple(state["effective_rank"]),
            Layout(bool(state["causal"]), tuple(state.get("axes", ())), state.get("mask", "")),
            {measure: tuple(floors) for measure, floors in state.get("floor", {}).items()},  # older ones have none
        )
        for kind, layers in found.sketches.items():
            n, fits = len(found.examples), len(layers) == len(found.layer_names)
            for k in layers:
                wide = {"gram": k.shape[-1] == n, "factor": k.shape[-1] <= n}.get(kind, True)
                fits = fits and len(k) == n and k.ndim == 2 and wide and bool(k.isfinite().all())
            if not fits:
                raise ValueError(f"the {kind} sketches do not match the layers and rows, or are not finite")
        return found


def _check_finite(name: str, rows: Tensor) -> None:
    if not bool(rows.isfinite().all()):
        raise NotFiniteError(f"Layer {name!r} has NaN or infinite activations on the probe: its change is undefined.")


def halves_of(examples: Tensor) -> Tensor:
    """Returns 200 random halves of the rows, by whole examples, as the columns of a 0/1 matrix (n, 200).

    None if there are too few examples. Without repetition: repeated rows would break the U-centring.

    Args:
        examples: (n,) number of the example (or document) of each row.
    """
    distinct, of_row = torch.unique(examples, return_inverse=True)
    count, generator = len(distinct), torch.Generator().manual_seed(0)
    halves = torch.zeros(count, HALVES if count >= EXAMPLES_FOR_INTERVAL else 0, dtype=torch.float64)
    for half in halves.mT:
        half[torch.randperm(count, generator=generator)[: count // 2]] = 1
    return halves[of_row]


def _over_halves(measure: Measure, before: Tensor, after: Tensor, halves: Tensor) -> Tensor:
    """Returns the change (h,) recomputed on each half of the rows, with halves of equal size batched.

    Args:
        measure: The measure.
        before: (n, k) of the reference, see `depthcb.similarity.Measure`.
        after: The same for the current model.
        halves: (n, h), see `Reference.halves`.
    """
    changes = torch.empty(halves.shape[1], dtype=torch.float64)
    if not len(changes):
        return changes
    if measure.over_subsets is not None:
        where = to_float64(before[:0]).device  # rows can be on MPS, which has no float64
        return measure.over_subsets(before, after, halves.to(where)).cpu()
    sizes = halves.sum(dim=0).long()
    for size in set(sizes.tolist()):
        members = (sizes == size).nonzero().flatten()
        rows = halves[:, members].mT.nonzero()[:, 1].view(len(members), size)
        at_once = max(1, CHUNK // (size * (size if measure.needs == "gram" else before.shape[-1])))
        for start in range(0, len(members), at_once):
            index = rows[start : start + at_once].to(after.device)
            cut = (index[:, :, None], index[:, None, :]) if measure.needs == "gram" else (index,)
            changes[members[start : start + at_once]] = measure(before[cut], after[cut]).cpu()
    return changes
