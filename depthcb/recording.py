"""What all front ends do to keep a record: tolerate what fails, let rows wait for the disk, describe optimizers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch.optim import Optimizer

from depthcb.engine.profile_recorder import ProfileRecorder
from depthcb.engine.step_hooks import Sink
from depthcb.plain import plain
from depthcb.profile import Profile
from depthcb.run import profile_row
from depthcb.warn import warn


class Named(Protocol):
    """A callback with a name that is unique in its run."""

    name: str


class Counting(Named, Protocol):
    """A callback that counts what it could not do."""

    @property
    def lost(self) -> Counter[str]:
        """How often it could not do what, in this fit."""
        ...


def _who(callback: Named) -> str:
    return f"{getattr(callback, 'kind', type(callback).__name__)} {callback.name!r}"


@contextmanager
def tolerated(callback: Counting, what: str, remedy: str) -> Iterator[None]:
    """Counts an error instead of raising it, so that a full disk or a broken logger doesn't end a fit; warns once.

    Args:
        callback: The callback.
        what: What is tried, such as "write the record in logs/version_0".
        remedy: What the user can do about it.
    """
    try:
        yield
    except Exception as error:
        if not callback.lost[what]:
            warn(
                f"{_who(callback)} cannot {what} ({type(error).__name__}: {error}). "
                f"Training goes on without it: {remedy}."
            )
        callback.lost[what] += 1


class Waiting:
    """The writes to a run's folder that its disk did not take yet, oldest first.

    Args:
        remedy: What the user can do so that this does not happen again.
    """

    def __init__(self, remedy: str) -> None:
        self.remedy = remedy
        self._writes: list[tuple[Named, Callable[[], None]]] = []

    def write(self, callback: Named, folder: Path, write: Callable[[Path], None]) -> None:
        """Writes to a folder, after what waits; if that raises an `OSError`, it waits too, with a warning once."""
        fresh = not self._writes
        self._writes.append((callback, lambda: write(folder)))
        error = self.retry()
        if error is not None and fresh:
            warn(
                f"{_who(callback)} cannot write its record in {folder} "
                f"({error.strerror or error}). Training goes on, and the record waits in memory: make room there, or "
                f"make it writable, before the fit ends. Next time, {self.remedy}."
            )

    def retry(self) -> OSError | None:
        """Writes what waits; returns the last error if the disk still does not take it."""
        last = None
        stuck: list[Named] = []
        for item in list(self._writes):
            owner, write = item
            if any(owner is other for other in stuck):  # its rows stay in order
                continue
            try:
                write()
            except OSError as error:
                stuck.append(owner)
                last = error
            else:
                self._writes.remove(item)
        return last

    def count(self, callback: Named) -> int:
        """Returns how many writes of the callback wait."""
        return sum(owner is callback for owner, _ in self._writes)


def sink_for(target: Any) -> Sink:
    """Returns a function that logs a row to a target.

    Args:
        target: A callable ``(row, step)``, a logger of Lightning, a TensorBoard ``SummaryWriter``, or a W&B run, whose
            rows get their step as ``trainer/global_step``, because steps of other rows may be ahead.

    Raises:
        ValueError: The target is none of these.

    Example:
        >>> rows = []
        >>> sink_for(lambda row, step: rows.append((step, row)))({"depth/cka/slope": 0.1}, 3)
        >>> rows
        [(3, {'depth/cka/slope': 0.1})]
    """
    if hasattr(target, "log_metrics"):
        return lambda row, step: target.log_metrics(dict(row), step=step)
    if hasattr(target, "add_scalar"):
        return lambda row, step: [target.add_scalar(key, value, step) for key, value in row.items()]
    if callable(target):
        found: Sink = target
        return found
    if hasattr(target, "log"):
        return lambda row, step: target.log({**row, "trainer/global_step": step})
    raise ValueError(
        f"{type(target).__name__} is not a sink: pass a W&B run, a TensorBoard SummaryWriter, a Lightning logger or a "
        "callable (row, step)."
    )


def tell_losses(callback: Counting, waiting: int, folder: Path | None) -> None:
    """Warns at the end of a fit of what a callback could not do, and of writes that still wait."""
    told = [f"could not {what} {count} times" for what, count in callback.lost.items()]
    if waiting:
        told.append(f"could not write the last {waiting} rows of its record in {folder}")
    if told:
        warn(
            f"{type(callback).__name__} {callback.name!r}: what it leaves is incomplete, because it {', '.join(told)}."
        )


def profile_settings(recorder: ProfileRecorder) -> dict[str, Any]:
    """Returns the settings of a profile's record, once the reference is there."""
    reference = recorder.reference
    assert reference is not None
    settings = reference.settings(recorder.measures, recorder.rows)
    sites = {site: there.layer_names for site, there in recorder.site_references.items()}
    return settings | recorder.contents() | ({"sites": sites} if sites else {})


def past_rows(recorder: ProfileRecorder) -> list[dict[str, Any]]:
    """Returns the rows of all profiles so far, because a resumed run may write to another folder."""
    blocks = _by_step(recorder.profiles_by_measure)
    inside = {site: _by_step(by_measure) for site, by_measure in recorder.profiles_by_site.items()}
    return [
        profile_row(blocks[step], {site: found[step] for site, found in inside.items() if step in found})
        for step in sorted(blocks)
    ]


def _by_step(by_measure: Mapping[str, Sequence[Profile]]) -> dict[int, dict[str, Profile]]:
    found: dict[int, dict[str, Profile]] = {}
    for measure, profiles in by_measure.items():
        for profile in profiles:
            found.setdefault(profile.step, {})[measure] = profile
    return found


def optimizer_settings(optimizer: Optimizer) -> dict[str, Any]:
    """Returns the settings of the first parameter group, and of the others what differs, with each one's size.

    Learning rates are those before any scheduler.
    """
    first, *others = [_group(group) for group in optimizer.param_groups]
    found = {"class": type(optimizer).__qualname__, **first}
    if others:
        found["groups"] = [{k: v for k, v in group.items() if v != first.get(k)} for group in others]
    return found


def _group(group: dict[str, Any]) -> dict[str, Any]:
    settings = {k: v for k, v in group.items() if k not in ("params", "initial_lr") and v is not None}
    lr = group.get("initial_lr", group.get("lr"))
    settings |= {"parameters": len(group["params"])} | ({} if lr is None else {"lr": float(lr)})
    return {k: plain(v) for k, v in settings.items()}
