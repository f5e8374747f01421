"""How large the demo is: a short list of sizes, and the choice of the first that fits the machine."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from depthcb_recipes.objectives.objective import OptimizerName

OPTIMIZERS: tuple[OptimizerName, ...] = ("adamw", "sgd")
CONTROLS = ("standard", "equal-step")
FITS = len(OPTIMIZERS) * len(CONTROLS)


@dataclass(frozen=True)
class Settings:
    """What the demo runs.

    Args:
        backbone: A name that `load_backbone` takes.
        steps: Optimizer steps of each of the four fits.
        batch_size: Blocks in a step.
        block_size: Tokens in a block.
        validate_every: Steps between validations, each of which measures a profile.
        val_blocks: Blocks in the validation set.
        probe_rows: Examples in the probe.
        probe_length: Tokens in a probe example.
        null_seeds: Draws of noise behind each null profile.
        lr_adamw: Peak learning rate under AdamW.
        lr_sgd: Peak learning rate under SGD with momentum 0.9.
        warmup_steps: Steps until the peak.
        seed: Seed of data order and dropout, the same in all fits.
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
    null_seeds: int = 2
    lr_adamw: float = 1e-4
    lr_sgd: float = 0.02
    warmup_steps: int = 4
    seed: int = 0
    precision: str = "auto"

    @property
    def tokens(self) -> int:
        """Tokens in a training step."""
        return self.batch_size * self.block_size

    @property
    def validations(self) -> int:
        """Validations in each fit."""
        return self.steps // self.validate_every


def _sacrifices(full: Settings) -> list[Settings]:
    """A full size and what is left of it as one thing after the other is given up."""
    less: list[dict[str, Any]] = [
        {"probe_rows": 32},
        {"block_size": full.block_size // 2},
        {"batch_size": full.batch_size // 2},
        *({"steps": steps, "validate_every": steps // 2} for steps in (16, 12) if steps < full.steps),
    ]
    return list(itertools.accumulate(less, lambda size, given_up: replace(size, **given_up), initial=full))


_SMOLLM2 = _sacrifices(Settings())
_MINILM = _sacrifices(Settings("minilm", steps=16, block_size=64, validate_every=4, lr_adamw=5e-4, lr_sgd=0.2))
#: The sizes in the order in which they are given up: the probe's rows, the blocks' length, the batch, the steps down to
#: 12, then the backbone.
SIZES: dict[str, Settings] = {
    f"{size.backbone.partition('-')[0]}-{number}": size
    for sizes in (_SMOLLM2, _MINILM)
    for number, size in enumerate(sizes, start=1)
}
#: Where ``--quick`` begins.
QUICK = _MINILM[0]

#: Minutes that the demo takes, and ``--quick``.
MINUTES, QUICK_MINUTES = 7.0, 1.0
#: Seconds that a fit and the whole take beside their steps, validations and probe passes: loggers, pictures, the page.
_EACH_FIT, _REPORT = 2.0, 5.0
#: A step of the four fits takes this share of the costliest one's (AdamW under the control), which is the one timed.
_MEAN_STEP = 0.85
#: A fit's first step takes about so many steps longer, for the optimizer's state and the control's copies.
_FIRST_STEP = 2
#: A forward pass is this share of a training step.
_FORWARD = 1 / 3


def chosen(
    name: str | None = None,
    *,
    quick: bool = False,
    backbone: str | None = None,
    steps: int | None = None,
    precision: str = "auto",
) -> list[Settings]:
    """The sizes that the command line leaves to choose from, the largest first.

    Args:
        name: Of the only one.
        quick: Whether to begin with those of the smaller backbone.
        backbone: In place of the sizes' own.
        steps: In place of the sizes' own.
        precision: Of all of them.

    Raises:
        ValueError: There is no size of this name.

    Example:
        >>> [size.tokens for size in chosen(quick=True)]
        [512, 512, 256, 128, 128]
    """
    if name is not None and name not in SIZES:
        raise ValueError(f"--sizes {name} is none of {', '.join(SIZES)}.")
    sizes = [SIZES[name]] if name else _MINILM if quick else _SMOLLM2 if backbone else list(SIZES.values())
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
    """What was measured on this machine, with one backbone.

    Args:
        step: Seconds of a training step of ``tokens`` tokens with the control in it.
        step_twice: The same of twice as many tokens: the optimizer's share of a step does not grow with them.
        tokens: Tokens in the shorter step.
        probe: Seconds of a probe pass over ``tokens_probed`` tokens, measures included.
        tokens_probed: Tokens in that probe.
    """

    step: float
    step_twice: float
    tokens: int
    probe: float
    tokens_probed: int

    def step_seconds(self, size: Settings) -> float:
        """A mean training step, on the line through the two timed ones; noise makes it no flatter than a quarter."""
        growth = min(1.0, max(0.25, self.step_twice / self.step - 1))
        return _MEAN_STEP * self.step * (1 + growth * (size.tokens / self.tokens - 1))

    def probe_seconds(self, size: Settings) -> float:
        """A pass over the probe."""
        return self.probe * size.probe_rows * size.probe_length / self.tokens_probed

    def validation_seconds(self, size: Settings) -> float:
        """A validation with its probe pass."""
        validated = size.val_blocks * size.block_size / size.tokens
        return self.step_seconds(size) * validated * _FORWARD + self.probe_seconds(size)

    def null_seconds(self, size: Settings) -> float:
        """A fit's null, and what else a fit takes beside its steps and validations."""
        return size.null_seeds * self.probe_seconds(size) + _EACH_FIT

    def fit_seconds(self, size: Settings) -> float:
        """One of the four fits, with its null."""
        trained = (size.steps + _FIRST_STEP) * self.step_seconds(size)
        return trained + size.validations * self.validation_seconds(size) + self.null_seconds(size)

    def seconds(self, size: Settings) -> float:
        """The whole demo from here on."""
        return FITS * self.fit_seconds(size) + _REPORT


def affordable(sizes: Sequence[Settings], costs: Costs, seconds: float) -> Settings | None:
    """The first size that takes at most so long; None if none does.

    Example:
        >>> slow = Costs(step=4.5, step_twice=8.0, tokens=256, probe=2.0, tokens_probed=1536)
        >>> size = affordable(_SMOLLM2, slow, 420)
        >>> size.tokens, size.steps
        (256, 16)
    """
    return next((size for size in sizes if costs.seconds(size) <= seconds), None)


def memory_needed(parameters: int, size: Settings) -> int:
    """Bytes that the demo takes at its peak, process included.

    Args:
        parameters: Numbers in the network.
        size: What is run.
    """
    copies = 9 * 4 * parameters
    activations = 1_500_000 * size.tokens * math.sqrt(parameters / 135e6)
    return round(0.9e9 + copies + activations)
