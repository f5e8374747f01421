"""What freezing layers during a fit saved, and what the loss did against a run without it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from depthcb.intervals import mean_interval
from depthcb.report.groups import FREEZING, settings_key
from depthcb.run import Run

#: What is said of every comparison [ours].
OF_ONE_SEED = "one seed: another one may give another difference"


@dataclass(frozen=True)
class Frozen:
    """A run that froze layers, with its twin.

    Args:
        run: The run with `FreezeByChange`.
        twin: The run that differs only in that; None if there is none.
    """

    run: Run
    twin: Run | None

    @property
    def losses(self) -> tuple[float, float] | None:
        """Validation loss at the last step that both were validated at, with and without freezing; None if none."""
        found = [dict(run.validation_loss) for run in (self.run, self.twin) if run]
        common = set.intersection(*map(set, found)) if len(found) == 2 else set()
        return (found[0][max(common)], found[1][max(common)]) if common else None

    @property
    def seconds(self) -> tuple[float, float] | None:
        """Wall-clock seconds of both fits; None before both have finished."""
        found = [_seconds(run) for run in (self.run, self.twin)]
        return (found[0], found[1]) if found[0] is not None and found[1] is not None else None


def frozen_runs(runs: Sequence[Run]) -> list[Frozen]:
    """Returns the runs that could freeze layers, each with the run that differs from it in nothing else."""
    usual: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        if not run.unpaired and run.record(FREEZING) is None:
            usual[run.control + settings_key(run)].append(run)
    found = []
    for run in runs:
        if run.record(FREEZING) is not None:
            twins = [] if run.unpaired else usual[run.control + settings_key(run, freezing=False)]
            found.append(Frozen(run, twins.pop(0) if twins else None))
    return found


def freezing_lines(runs: Sequence[Run]) -> list[str]:
    """Returns what a report says of freezing; empty if no run had a `FreezeByChange`.

    One pair gives its two figures and no interval; pairs that differ only in their seed also give the mean of their
    differences with Student's interval over the seeds.
    """
    found = frozen_runs(runs)
    by_settings: dict[str, list[Frozen]] = defaultdict(list)
    for frozen in found:
        if frozen.losses is not None:
            by_settings[frozen.run.control + settings_key(frozen.run, seedless=True)].append(frozen)
    return [*map(_line, found), *(_over_seeds(own) for own in by_settings.values() if len(own) > 1)]


def _line(frozen: Frozen) -> str:
    """Says what one run froze, and how it and its twin ended."""
    run = frozen.run
    record = run.record(FREEZING)
    assert record is not None
    frozen_layers = record.rows[-1]["frozen"] if record.rows else record.settings["frozen"]
    told = f"{run.name} froze {len(frozen_layers)} of {len(record.settings['layers'])} layers"
    saved = (record.end or {}).get("saved_seconds")
    told += f", which saved about {saved:.1f} s by the durations of its own batches" if saved is not None else ""
    if frozen.twin is None:
        why = run.unpaired or "no run here differs from it in FreezeByChange alone"
        return f"{told}; what that did to the loss is not known: {why}"
    if frozen.losses is None:
        return f"{told}; it and {frozen.twin.name} have no validation loss at the same step"
    own, usual = frozen.losses
    told += f"; validation loss {own:.4f}, and {usual:.4f} without freezing ({frozen.twin.name}): {own - usual:+.4f}"
    if frozen.seconds is not None:
        told += "; the fits took {:.1f} s and {:.1f} s".format(*frozen.seconds)
    return f"{told} ({OF_ONE_SEED})"


def _over_seeds(own: Sequence[Frozen]) -> str:
    """Says the mean differences of pairs that differ only in their seed."""
    losses = [frozen.losses for frozen in own if frozen.losses]
    seconds = [frozen.seconds for frozen in own if frozen.seconds]
    told = f"over {len(losses)} seeds, loss with freezing minus without: {mean_interval([a - b for a, b in losses])}"
    if len(seconds) == len(losses):
        told += f"; seconds of the fit: {mean_interval([a - b for a, b in seconds])}"
    return told


def _seconds(run: Run | None) -> float | None:
    depth = run.record("DepthProfile") if run else None
    return float(depth.end["seconds"]) if depth and depth.end else None
