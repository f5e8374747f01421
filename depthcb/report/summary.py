"""Reading a summary, and wording what it says."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from depthcb.profile import Profile

Summary = Mapping[str, Any]
Values = Sequence[float | None]

#: A layer whose effective rank is lower than this has a change that rests on a handful of directions [ours].
LOW_RANK = 5.0
#: Step ratios whose largest is more than this many times their smallest get a log axis.
LOG_ABOVE = 3.0
MISSING = "\N{EN DASH}"

MEASURES = {"cka": "change", "cka_normalized": "normalised change"}
UNITS = {"cka": "1 - CKA  (0 = unchanged)", "cka_normalized": "1 - CKA, rows normalised"}
RATIO_UNIT = "‖ΔW‖ / ‖W‖ per step"
_OPTIMIZERS = {"adamw": "AdamW", "adam": "Adam", "sgd": "SGD", "muon": "Muon"}


@dataclass(frozen=True)
class Style:
    """How an arm looks everywhere. Okabe-Ito blue and vermillion: 3:1 or better on white and on near-black."""

    color: str
    marker: str
    symbol: str
    dash_offset: float


# The offset makes the dashes of two nulls that coincide (often at 0) alternate, so that both stay visible.
STYLES = {"standard": Style("#0072B2", "o", "circle", 0), "equal_step": Style("#D55E00", "s", "square-open", 5)}


@dataclass(frozen=True)
class Arm:
    """One run; an arm that the summary lacks is one with nothing in it."""

    control: str
    finished: bool = False
    profiles: Mapping[str, tuple[Profile, ...]] = field(default_factory=dict)
    null: Mapping[str, tuple[Profile, ...]] = field(default_factory=dict)
    step_ratio: tuple[float, ...] = ()
    wanted_ratio: tuple[float, ...] = ()
    val_loss: tuple[tuple[float, float], ...] = ()

    @classmethod
    def read(cls, control: str, fields: Summary) -> Arm:
        def profiles(key: str) -> dict[str, tuple[Profile, ...]]:
            return {m: tuple(map(Profile.from_dict, rows)) for m, rows in (fields.get(key) or {}).items()}

        return cls(
            control=control,
            finished=bool(fields.get("finished")),
            profiles=profiles("profiles"),
            null=profiles("null"),
            step_ratio=_floats(fields.get("step_ratio")),
            wanted_ratio=_floats(fields.get("wanted_ratio")),
            val_loss=tuple((float(step), _float(loss)) for step, loss in fields.get("val_loss") or ()),
        )

    @property
    def name(self) -> str:
        return self.control.replace("_", "-")

    @property
    def label(self) -> str:
        """The name, and how far the run came if it did not finish."""
        steps = [p.step for profiles in self.profiles.values() for p in profiles]
        return self.name if self.finished or not steps else f"{self.name} (interrupted, last at step {max(steps)})"

    def last(self, measure: str) -> Profile | None:
        profiles = self.profiles.get(measure)
        return profiles[-1] if profiles else None

    def null_change(self, measure: str) -> tuple[float, ...]:
        """Mean change of each layer over the null's seeds; empty without a null."""
        seeds = self.null.get(measure)
        return tuple(np.mean([p.change for p in seeds], axis=0).tolist()) if seeds else ()

    def null_relative_slope(self, measure: str) -> float | None:
        """Mean relative slope over the null's seeds."""
        slopes = [p.relative_slope for p in self.null.get(measure, ())]
        known = [s for s in slopes if s is not None]
        return float(np.mean(known)) if known else None


@dataclass(frozen=True)
class Pair:
    """The standard and the equal-step arm of one optimizer, and what they say together."""

    optimizer: str
    arms: tuple[Arm, Arm]
    verdict: Summary | None

    @property
    def title(self) -> str:
        return _OPTIMIZERS.get(self.optimizer, self.optimizer)

    @property
    def measured(self) -> bool:
        return any(arm.last(m) for arm in self.arms for m in MEASURES)

    def null_slope(self, arm: Arm) -> float | None:
        """The null's relative slope as the verdict gives it, else from the arm's own null profiles."""
        given = ((self.verdict or {}).get("null_relative_slope") or {}).get(arm.control)
        return arm.null_relative_slope("cka") if given is None else float(given)


def read_pairs(summary: Summary) -> list[Pair]:
    """The arms of a summary, paired by optimizer in the order of their runs."""
    arms = {(a["optimizer"], a["control"]): a for a in summary.get("arms") or ()}
    verdicts = {v["optimizer"]: v for v in summary.get("verdicts") or ()}

    def arm(optimizer: str, control: str) -> Arm:
        return Arm.read(control, arms.get((optimizer, control), {}))

    optimizers = dict.fromkeys(optimizer for optimizer, _ in arms)
    return [Pair(o, (arm(o, "standard"), arm(o, "equal_step")), verdicts.get(o)) for o in optimizers]


def _float(value: Any) -> float:
    return math.nan if value is None else float(value)


def _floats(values: Iterable[Any] | None) -> tuple[float, ...]:
    return tuple(_float(v) for v in values or ())


def at(values: Sequence[float] | None, index: int) -> float | None:
    """One figure of a column that may be missing or short."""
    return None if values is None or index >= len(values) else _float(values[index])


def show(value: float | None, form: str = ".3g") -> str:
    """A figure, or a dash where there is none."""
    return MISSING if value is None or math.isnan(value) else format(value, form)


def show_interval(interval: tuple[float, float] | None) -> str:
    """An interval in brackets, after a space; nothing where there is none."""
    return "" if interval is None else f" [{interval[0]:+.3g}, {interval[1]:+.3g}]"


def headline(pair: Pair) -> str:
    """The verdict, never without the spread that the control removed."""
    if pair.verdict is None:
        absent = [arm.name for arm in pair.arms if arm.last("cka") is None]
        why = f"{' and '.join(absent)} not measured" if absent else "none was given"
        return f"{pair.title}: no verdict ({why})"
    spread = pair.verdict.get("spread")
    removed = f"a step-ratio spread of {spread:.3g}x" if spread is not None else "an unknown step-ratio spread"
    return f"{pair.title}: {pair.verdict['verdict']}; the control removed {removed}"


def context(pair: Pair) -> list[str]:
    """What must stand beside the verdict: its reason, whether the measures agree, and the null."""
    if pair.verdict is None:
        return []
    agree = "agree" if pair.verdict.get("measures_agree") else "DISAGREE"
    nulls = ", ".join(f"{arm.name} {_null(pair, arm)}" for arm in pair.arms)
    return [
        str(pair.verdict.get("reason", "")),
        f"plain and normalised change {agree} on the sign of the slope",
        f"relative slope of the null: {nulls}",
    ]


def _null(pair: Pair, arm: Arm) -> str:
    """The null's relative slope, and how much of the measured one random directions would give too."""
    null, last = pair.null_slope(arm), arm.last("cka")
    measured = last.relative_slope if last else None
    share = f" ({null / measured:.0%} of the run's)" if null is not None and measured else ""
    return show(null, "+.3g") + share


def arm_line(pair: Pair, arm: Arm) -> str:
    """Slope, interval, width and null of one arm."""
    p = arm.last("cka")
    if p is None:
        return f"{arm.name}: {MISSING} not measured"
    return (
        f"{arm.label}: slope {p.slope:+.3g}{show_interval(p.slope_interval)}, "
        f"relative slope {show(p.relative_slope, '+.3g')}{show_interval(p.relative_slope_interval)}, "
        f"width {show(p.width, '.2f')}, null relative slope {show(pair.null_slope(arm), '+.3g')}"
    )


def show_rank(value: float | None) -> str:
    """An effective rank, marked where it is low."""
    return show(value, ".1f") + (" !" if value is not None and value < LOW_RANK else "")


def tick_step(layers: int, ticks: int = 12) -> int:
    """Distance between labelled layers, so that at most about ``ticks`` labels share the axis."""
    steps: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, *range(10, layers + 20, 5))
    return next(step for step in steps if layers <= ticks * step)


def log_axis(arms: Iterable[Arm], *more: Sequence[float]) -> bool:
    """Whether step ratios span enough for a log axis; a ratio of 0 (a frozen layer) has no place on one."""
    ratios = [r for values in (*(arm.step_ratio for arm in arms), *more) for r in values if math.isfinite(r)]
    return bool(ratios) and min(ratios) > 0 and max(ratios) > LOG_ABOVE * min(ratios)


def layer_rows(pair: Pair, layers: Sequence[str], ranks: Sequence[float] | None) -> list[list[str]]:
    """Number, name, changes, normalised changes, step ratios (standard and equal-step each) and rank of each layer."""
    lasts = [arm.last(measure) for measure in MEASURES for arm in pair.arms]
    columns = [p.change if p else None for p in lasts] + [arm.step_ratio for arm in pair.arms]
    return [
        [str(i), name, *(show(at(column, i)) for column in columns), show_rank(at(ranks, i))]
        for i, name in enumerate(layers)
    ]
