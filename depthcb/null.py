"""The null of a profile: the change caused by random weight changes instead of training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from depthcb.errors import NotFiniteError
from depthcb.pretrained import PretrainedWeights, norm, reshard
from depthcb.probe import Probe
from depthcb.profile import Profile
from depthcb.reference import Reference
from depthcb.similarity import Measure
from depthcb.stack import LayerStack

#: Draws of noise: two carried a range of relative slopes of +-0.31 unseen.
DRAWS = 8
#: Forwards of the probe spent on finding the scale of the change-matched null.
SEARCH = 6
#: The mean change of the change-matched null may differ by this factor from the run's [ours].
MATCHED = 1.1


@dataclass(frozen=True)
class Null:
    """The profiles of random weight changes, one draw per seed, by measure.

    Args:
        draws: Noise of the size of each tensor's net change.
        matched: The same noise times ``scale``, so that the mean change is the run's; empty if no scale was found.
        scale: The factor; None if none was found.
        message: Why none was found; empty otherwise.
    """

    draws: tuple[dict[str, Profile], ...]
    matched: tuple[dict[str, Profile], ...] = ()
    scale: float | None = None
    message: str = ""


def null_profiles(
    model: nn.Module,
    pretrained: PretrainedWeights,
    probe: Probe,
    reference: Reference,
    measures: Sequence[Measure],
    *,
    layers: str | list[str] | None = None,
    draws: int = DRAWS,
) -> Null:
    """Measures the profiles that random weight changes give: the null of a profile [ours].

    Adds seeded Gaussian noise to each parameter of the pretrained model that training moved, with the norm of its net
    change: the same sizes, but random directions. Random changes of the same size change the representations far less
    than training does, and the relative slope flattens where change saturates. The *change-matched* null therefore
    multiplies the noise by one factor for all tensors, so that the mean change under the first measure is within 10 %
    of the run's. The factor is found on the first draw with at most 6 forwards of the probe.

    Args:
        model: The fine-tuned model; its weights are put back at the end. Memory: one more copy of them.
        pretrained: Its pretrained weights.
        probe: The probe that ``reference`` was recorded on.
        reference: The recorded pretrained model.
        measures: The measures of the profiles.
        layers: The layers, as accepted by `LayerStack.find`.
        draws: Draws of noise for each of the two nulls, with seeds 0, 1, ...

    Raises:
        ValueError: ``draws`` is below 1, or the pretrained weights are those of another model.
    """
    if draws < 1:
        raise ValueError(f"draws={draws}: a null needs at least 1.")
    stack = LayerStack.find(model, layers)

    def measured() -> dict[str, Profile]:
        recording = probe.record(model, stack, reference.layout)
        reshard(model)
        return reference.profiles(recording, measures, step=0, epoch=0, intervals=False)

    target = measured()[measures[0].name].mean
    moved = {n: norm(p.detach() - pretrained.before(n, p)) for n, p in model.named_parameters()}
    parameters = {name: p for name, p in model.named_parameters() if moved[name] > 0}

    with pretrained.restored_in(model):
        noise = _Noise(pretrained, parameters, moved)

        def draw(seed: int, scale: float) -> dict[str, Profile]:
            noise.put(seed, scale)
            return measured()

        own = tuple(draw(seed, 1.0) for seed in range(draws))
        first = own[0][measures[0].name].mean
        if not target > 0 < first:
            return Null(own, message="nothing changed")
        scale = _matching_scale(lambda s: draw(0, s)[measures[0].name].mean, target, first)
        if scale is None:
            return Null(own, message=f"no size of noise gave the run's mean change of {target:.3g} in {SEARCH} trials")
        return Null(own, tuple(draw(seed, scale) for seed in range(draws)), scale)


@dataclass(frozen=True)
class _Noise:
    """Puts noise on top of the pretrained weights into parameters that hold them."""

    pretrained: PretrainedWeights
    parameters: Mapping[str, nn.Parameter]
    sizes: Mapping[str, float]

    def put(self, seed: int, scale: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.parameters.items():
            noise = _like(torch.randn(p.shape, generator=generator), p)
            p.copy_(self.pretrained.before(name, p) + noise * (scale * self.sizes[name] / norm(noise)))


def _matching_scale(mean_change: Callable[[float], float], target: float, first: float) -> float | None:
    """Returns a scale of the noise whose mean change is within 10 % of the target; None after 6 trials.

    Change grows with the square of small noise and saturates for large noise, so the search runs on logarithms.

    Args:
        mean_change: Mean change of one draw at a scale.
        target: The mean change to reach.
        first: The mean change at scale 1.
    """
    below, above = -math.inf, math.inf  # logarithms of scales known to give too little or too much
    log_scale, log_change, power = 0.0, math.log(first), 2.0
    for trial in range(SEARCH + 1):
        error = math.log(target) - log_change
        if abs(error) <= math.log(MATCHED):
            return math.exp(log_scale)
        if trial == SEARCH:
            break
        below, above = (log_scale, above) if error > 0 else (below, log_scale)
        following = log_scale + error / power
        if not below < following < above:
            following = (below + above) / 2
        try:
            change = mean_change(math.exp(following))
        except NotFiniteError:  # noise this large overflows
            change = math.inf
        if 0 < change < math.inf:
            power = max((math.log(change) - log_change) / (following - log_scale), 0.25)
        log_scale, log_change = following, math.log(change) if change > 0 else -math.inf
    return None


def _like(values: Tensor, parameter: Tensor) -> Tensor:
    """Returns the values with the parameter's dtype, device and sharding."""
    values = values.to(parameter.device, parameter.dtype)
    if not isinstance(parameter, DTensor):
        return values
    return distribute_tensor(values, parameter.device_mesh, parameter.placements, src_data_rank=None)
