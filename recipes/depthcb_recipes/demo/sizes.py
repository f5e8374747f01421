"""The demo's sizes, and the choice among them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from depthcb.null import DRAWS
from depthcb.run import CONTROLS
from depthcb.verdict import FEWEST_PAIRS
from depthcb_recipes.objectives.objective import OptimizerName

#: With this many seeds the pairs carry a verdict; more are not run.
MOST_SEEDS = FEWEST_PAIRS


@dataclass(frozen=True)
class Settings:
    """The settings of a demo.

    Args:
        backbone: A name for `load_backbone`.
        steps: Optimizer steps of each fit.
        batch_size: Blocks per step.
        block_size: Tokens per block.
        validate_every: Steps between validations, each of which measures a profile.
        val_blocks: Blocks in the validation set.
        probe_rows: Examples in the probe.
        probe_length: Tokens per probe example.
        null_seeds: Draws of noise for each null.
        lr_adamw: Peak learning rate under AdamW.
        lr_sgd: Peak learning rate under SGD with momentum 0.9.
        warmup_steps: Steps until the peak.
        optimizers: Each has a standard and an equal-step fit for every seed.
        seeds: Number of seeds of data and dropout: 0, 1, ...
        precision: As `lightning.pytorch.Trainer` takes it, or ``"auto"``.
    """

    backbone: str = "smollm2-135m"
    steps: int = 24
    batch_size: int = 8
    block_size: int = 128
    validate_every: int = 8
    val_blocks: int = 16
    probe_rows: int = 64
    probe_length: int = 48
    null_seeds: int = DRAWS
    lr_adamw: float = 1e-4
    lr_sgd: float = 0.02
    warmup_steps: int = 4
    optimizers: tuple[OptimizerName, ...] = ("adamw", "sgd")
    seeds: int = 1
    precision: str = "auto"

    @property
    def tokens(self) -> int:
        """Tokens per training step."""
        return self.batch_size * self.block_size

    @property
    def fits(self) -> int:
        """Number of fits."""
        return len(self.optimizers) * len(CONTROLS) * self.seeds

    @property
    def validations(self) -> int:
        """Validations per fit."""
        return self.steps // self.validate_every


def _reductions(full: Settings) -> list[Settings]:
    """Returns a full size and the smaller ones, each with one more reduction."""
    less: list[dict[str, Any]] = [
        {"probe_rows": 32},
        {"block_size": full.block_size // 2},
        {"batch_size": full.batch_size // 2},
        *({"steps": steps, "validate_every": steps // 2} for steps in (16, 12) if steps < full.steps),
    ]
    return list(itertools.accumulate(less, lambda size, reduction: replace(size, **reduction), initial=full))


_SMOLLM2 = _reductions(Settings())
_MINILM = _reductions(Settings("minilm", steps=16, block_size=64, validate_every=4, lr_sgd=0.2, optimizers=("sgd",)))
#: The sizes, largest first. Reduced one after another: probe rows, block length, batch size, steps down to 12, and then
#: the backbone.
SIZES: dict[str, Settings] = {
    f"{size.backbone.partition('-')[0]}-{number}": size
    for sizes in (_SMOLLM2, _MINILM)
    for number, size in enumerate(sizes, start=1)
}
#: The largest size of ``--quick``.
QUICK = _MINILM[0]

#: Time budgets of the demo and of ``--quick``, in minutes.
MINUTES, QUICK_MINUTES = 7.0, 1.0
#: Overhead of a fit and of the report in seconds, beside steps, validations and probe passes: loggers, pictures, page.
_EACH_FIT, _REPORT = 2.0, 5.0
#: Passes over the probe besides the draws: the fitted model, and the search for the scale (1 to 6 trials).
_SEARCH = 4
#: Mean step of the four fits / the costliest one's (AdamW under the control), which is the one that is timed.
_MEAN_STEP = 0.85
#: A fit's first step takes about this many steps longer: optimizer state and the control's copies are allocated.
_FIRST_STEP = 2
#: Forward pass / training step, in time.
_FORWARD = 1 / 3


def chosen(
    name: str | None = None,
    *,
    quick: bool = False,
    backbone: str | None = None,
    steps: int | None = None,
    precision: str = "auto",
) -> list[Settings]:
    """Returns the sizes that the command line allows, largest first.

    Args:
        name: The only size allowed; None for several.
        quick: Whether to start with the smaller backbone.
        backbone: Replaces the backbone of all sizes.
        steps: Replaces the steps of all sizes.
        precision: The precision of all sizes.

    Raises:
        ValueError: There is no size of that name.

    Example:
        >>> [size.tokens for size in chosen(quick=True)]
        [512, 512, 256, 128, 128]
    """
    base, _, seeds = (name or "").partition("x")
    if name is not None and (base not in SIZES or not (seeds or "1").isdigit() or seeds == "0"):
        raise ValueError(f"--sizes {name} is none of {', '.join(SIZES)}, nor one with seeds, such as minilm-1x4.")
    sizes = _MINILM if quick else _SMOLLM2 if backbone else list(SIZES.values())
    if name is not None:
        sizes = [replace(SIZES[base], seeds=int(seeds or 1))]
    changes: dict[str, Any] = {"precision": precision}
    if backbone is not None:
        changes["backbone"] = backbone
    found = []
    for size in sizes:
        if steps is not None:
            changes |= {"steps": steps, "validate_every": max(1, min(size.validate_every, steps // 2))}
        found.append(replace(size, **changes))
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Costs:
    """Costs measured on this machine with one backbone.

    Args:
        step: Seconds per training step of ``tokens`` tokens under the control.
        step_twice: The same for twice as many tokens, since the optimizer's share does not grow with them.
        tokens: Tokens per step.
        probe: Seconds per probe pass over ``tokens_probed`` tokens, measures included.
        tokens_probed: Tokens in that probe.
    """

    step: float
    step_twice: float
    tokens: int
    probe: float
    tokens_probed: int

    def step_seconds(self, size: Settings) -> float:
        """Seconds per mean training step, by the line through the two timed ones (at least a quarter as steep)."""
        growth = min(1.0, max(0.25, self.step_twice / self.step - 1))
        return _MEAN_STEP * self.step * (1 + growth * (size.tokens / self.tokens - 1))

    def probe_seconds(self, size: Settings) -> float:
        """Seconds per pass over the probe."""
        return self.probe * size.probe_rows * size.probe_length / self.tokens_probed

    def validation_seconds(self, size: Settings) -> float:
        """Seconds per validation with its probe pass."""
        validated = size.val_blocks * size.block_size / size.tokens
        return self.step_seconds(size) * validated * _FORWARD + self.probe_seconds(size)

    def null_seconds(self, size: Settings) -> float:
        """Seconds per null, with the other overhead of a fit."""
        return (2 * size.null_seeds + _SEARCH) * self.probe_seconds(size) + _EACH_FIT

    def fit_seconds(self, size: Settings) -> float:
        """Seconds per fit, with its null."""
        trained = (size.steps + _FIRST_STEP) * self.step_seconds(size)
        return trained + size.validations * self.validation_seconds(size) + self.null_seconds(size)

    def seconds(self, size: Settings) -> float:
        """Seconds that the rest of the demo takes."""
        return size.fits * self.fit_seconds(size) + _REPORT


def replicated(size: Settings, costs: Costs, seconds: float) -> Settings:
    """Returns a size with as many seeds as the time allows, from 1 to the number that a verdict needs.

    Args:
        size: The size.
        costs: The measured costs.
        seconds: The time left.
    """
    more = [replace(size, seeds=seeds) for seeds in range(MOST_SEEDS, 1, -1)]
    return next((other for other in more if costs.seconds(other) <= seconds), size)


def affordable(sizes: Sequence[Settings], costs: Costs, seconds: float) -> Settings | None:
    """Returns the first size that takes at most this long; None if none does.

    Args:
        sizes: The sizes to choose from, largest first.
        costs: The measured costs.
        seconds: The time left.

    Example:
        >>> slow = Costs(step=4.5, step_twice=8.0, tokens=256, probe=2.0, tokens_probed=1536)
        >>> size = affordable(_SMOLLM2, slow, 600)
        >>> size.tokens, size.steps
        (256, 16)
    """
    return next((size for size in sizes if costs.seconds(size) <= seconds), None)


def memory_needed(parameters: int, size: Settings) -> int:
    """Returns the peak memory of the demo's process in bytes, fitted to measured peaks [ours].

    Args:
        parameters: Number of parameters of the network.
        size: The settings.
    """
    copies = 9 * 4 * parameters
    activations = 1_500_000 * size.tokens * math.sqrt(parameters / 135e6)
    return round(0.9e9 + copies + activations)
