"""The trainings that test proposals: one per rule, mode and seed, with equal data order and budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from depthcb.advice import LAST, RANDOM, Proposal
from depthcb_recipes.studies.grid import RunConfig

Mode = Literal["full", "lora"]
#: How the modes are called in reports.
MODES: dict[Mode, str] = {"full": "the layers' own weights", "lora": "LoRA on the layers"}
#: Everything trains, which is no proposal within the budget but what it is compared with.
ALL = "all layers"
#: Learning rate of adapters / that of the weights [ours].
LORA_LR = 10.0
#: What is measured in each training: little, since it takes time.
_WATCH = {"class_path": "depthcb.DepthProfile", "init_args": {"probe_rows": 64}}


@dataclass(frozen=True)
class Arm:
    """A training that tests a rule.

    Args:
        rule: Name of the rule, or `ALL`.
        mode: What of the layers is trained.
        layers: The layers.
        config: The training; rules that choose the same layers share it.
    """

    rule: str
    mode: Mode
    layers: tuple[int, ...]
    config: RunConfig


def parse_modes(text: str) -> list[Mode]:
    """Returns the modes that a comma-separated list names.

    Raises:
        ValueError: One is unknown.

    Example:
        >>> parse_modes("lora")
        ['lora']
    """
    found = [name.strip() for name in text.split(",")]
    if not set(found) <= set(get_args(Mode)) or len(set(found)) < len(found):
        raise ValueError(f"--modes {text}: name full, lora or both, separated by a comma.")
    return [mode for mode in get_args(Mode) if mode in found]


def draws_of(seed: int, draws: int) -> range:
    """Returns the numbers of a seed's random sets: other ones for each seed, so that intervals cover the choice too.

    Example:
        >>> list(draws_of(2, 3))
        [6, 7, 8]
    """
    return range(draws * seed, draws * (seed + 1))


def arms(
    base: RunConfig,
    proposals: Sequence[Proposal],
    layers: int,
    modes: Sequence[Mode],
    seeds: int,
    draws: int,
    rank: int,
) -> list[Arm]:
    """Returns all trainings, seed by seed, so that an interrupted test has whole seeds.

    Args:
        base: The training that is repeated.
        proposals: What the rules propose; those without data are left out. Of rules that draw, ``seeds * draws`` sets.
        layers: Number of layers.
        modes: What of the layers is trained.
        seeds: Number of seeds, from 0 on: of new weights, dropout and data order.
        draws: Random sets per seed.
        rank: Rank of the adapters.
    """
    found = []
    for seed in range(seeds):
        for mode in modes:
            everything = tuple(range(layers))
            chosen = [(ALL, everything)]
            for proposal in proposals:
                numbers = draws_of(seed, draws) if proposal.rule.draws else [0]
                chosen += [(proposal.rule.name, proposal.sets[n]) for n in numbers if proposal.sets]
            found += [Arm(rule, mode, own, _config(base, own, mode, seed, rank)) for rule, own in chosen]
    return found


def candidates(proposals: Sequence[Proposal]) -> list[str]:
    """Returns the names of the rules that are compared with random sets and the last layers."""
    return [p.rule.name for p in proposals if p.sets and p.rule.name not in (RANDOM, LAST)]


def _at_the_end(base: RunConfig) -> dict[str, Any]:
    """Returns the options that validate once, after the last step, where the number of steps says when that is."""
    steps = base.options.get("trainer.max_steps", -1)
    if steps < 1:
        return {}
    batches = steps * (base.options.get("trainer.accumulate_grad_batches") or 1)
    return {"trainer.val_check_interval": batches, "trainer.check_val_every_n_epoch": None}


def _config(base: RunConfig, layers: tuple[int, ...], mode: Mode, seed: int, rank: int) -> RunConfig:
    own: dict[str, Any] = {"model.train_layers": list(layers), "trainer.callbacks": [_WATCH], **_at_the_end(base)}
    if mode == "lora":
        own |= {"model.lora_rank": rank, "model.lr": LORA_LR * base.options["model.lr"]}
    return dataclasses.replace(base, seed=seed, null_seeds=0, options={**base.options, **own})
