"""The depth profile: the change of each layer, and numbers that describe its shape."""

from __future__ import annotations

import dataclasses
import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from depthcb.style import show_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Interval = tuple[float, float]
FloatArray = npt.NDArray[np.float64]

#: A change below this many times the rounding error is marked in reports [ours].
RESOLVED = 10.0
#: Derived numbers, saved together with the stored ones so that a JSON file can be read without depthcb.
DERIVED = ("slope", "relative_slope", "spearman", "centre", "width", "mean")


@dataclass(frozen=True, repr=False)
class Profile:
    """The depth profile of one measure at one point in training.

    Args:
        change: Change c_l of each of the L layers, input side first (unit: that of the measure; 0 is unchanged).
        layer_names: Name of each layer's module.
        measure: Name of the measure of ``change``, for example ``"cka"``.
        step: The step number with which Lightning logs ``val/...`` at the same validation.
        epoch: The epoch of that validation.
        rows: Number of probe rows.
        band: 2.5 % and 97.5 % points of each layer's change over random halves of the probe, or None. With several rows
            per example or document, or a measure that depends on the number of rows, the halves are shifted so that
            their mean is the change.
        slope_interval: 95 % interval of ``slope`` over the same halves, or None. It covers the choice of probe rows,
            not training seeds [ours].
        relative_slope_interval: The same for ``relative_slope``.
        half_relative_slopes: The relative slope over each of these halves, None where it is undefined, in an order that
            depends on the examples alone: runs on the same probe are compared half by half.
        floor: Change of each layer that the rounding error of the forward alone gives, or None if it was not measured.
        title: Display name of the measure; defaults to that in `depthcb.similarity.MEASURES`, else to its name.
        unit: Axis label of the measure; same default.

    Raises:
        ValueError: There are fewer than 2 layers, a change is negative or not finite, or lengths differ.

    Example:
        >>> from depthcb import Profile
        >>> p = Profile((0.0, 0.1, 0.2), ("h.0", "h.1", "h.2"), "cka")
        >>> round(p.slope, 6), round(p.relative_slope, 6), round(p.centre, 6), round(p.width, 6)
        (0.2, 2.0, 0.833333, 0.6)
        >>> Profile.from_json(p.to_json()) == p
        True
    """

    change: tuple[float, ...]
    layer_names: tuple[str, ...]
    measure: str
    step: int = 0
    epoch: int = 0
    rows: int = 0
    band: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    slope_interval: Interval | None = None
    relative_slope_interval: Interval | None = None
    half_relative_slopes: tuple[float | None, ...] | None = None
    floor: tuple[float, ...] | None = None
    title: str = ""
    unit: str = ""

    def __post_init__(self) -> None:
        if not self.title or not self.unit:  # created by hand, or recorded before profiles had labels
            from depthcb.similarity import MEASURES  # lazy: imports torch, which reading a record does not need

            known = MEASURES.get(self.measure)
            for field in ("title", "unit"):
                value = getattr(self, field) or (getattr(known, field) if known else "") or self.measure
                object.__setattr__(self, field, value)  # as frozen dataclasses do themselves
        if len(self.change) < 2:
            raise ValueError(f"A depth profile needs at least 2 layers, got {len(self.change)}.")
        if len(self.change) != len(self.layer_names):
            raise ValueError(f"{len(self.change)} changes for {len(self.layer_names)} layer names: they must match.")
        for name, value in zip(self.layer_names, self.change, strict=True):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"The {self.measure} change of layer {name!r} is {value}: it must be finite and >= 0.")

    def __repr__(self) -> str:
        where = f"{self.measure} at step {self.step}, {len(self.change)} layers, {self.rows} rows"
        slope = f"{self.slope:+.3g}{show_interval(self.slope_interval)}"
        return f"<Profile {where}: slope {slope}, mean {self.mean:.3g}>"

    @classmethod
    def from_halves(cls, change: Sequence[float], halves: FloatArray, **fields: Any) -> Profile:
        """Creates a profile with intervals: the 2.5 % and 97.5 % points over the (H, L) changes of random halves.

        Half-samples of n rows vary as much as means of n rows do, so the intervals are not widened [ours]. Halves with
        an undefined (NaN) change are left out.
        """
        slopes, means = _slopes(halves), halves.mean(axis=1)
        relative = np.divide(slopes, means, where=means > 0, out=np.full(len(halves), np.nan))
        defined = ~np.isnan(slopes)
        low, high = np.percentile(halves[defined], (2.5, 97.5), axis=0).tolist()
        return cls(
            change=tuple(float(c) for c in change),
            band=(tuple(low), tuple(high)),
            slope_interval=interval_over_halves(slopes[defined]),
            relative_slope_interval=interval_over_halves(relative[defined]) if (means[defined] > 0).all() else None,
            half_relative_slopes=tuple(None if math.isnan(r) else r for r in relative.tolist()),
            **fields,
        )

    @property
    def depth(self) -> tuple[float, ...]:
        """Relative depth x_l = l / (L - 1) of each layer, 0 at the input side and 1 at the output side [ours]."""
        return tuple(float(x) for x in relative_depth(len(self.change)))

    @property
    def slope(self) -> float:
        """The locality gradient [paper]: least-squares slope of change on relative depth [ours]."""
        return slope(self.change)

    @property
    def unresolved(self) -> tuple[int, ...]:
        """Layers whose change is below 10 times the rounding error of the forward [ours]; none if it is not known."""
        floors = self.floor or (0.0,) * len(self.change)
        return tuple(i for i, (c, f) in enumerate(zip(self.change, floors, strict=True)) if 0 < c < RESOLVED * f)

    @property
    def mean(self) -> float:
        """Mean change over the layers."""
        return float(np.mean(self.change))

    @property
    def relative_slope(self) -> float | None:
        """``slope / mean`` [ours]; None when nothing changed."""
        return self.slope / self.mean if self.mean > 0 else None

    @property
    def depth_corrected_slope(self) -> float | None:
        """Relative slope times (L + 1) / (L - 1), for models of different depth [ours]; None when nothing changed.

        Changes that accumulate evenly (c_l proportional to l + 1) have relative slope 2 (L - 1) / (L + 1), which is 1.2
        for 4 layers and 1.92 for 48; corrected, it is 2 for any depth.
        """
        layers = len(self.change)
        return None if self.relative_slope is None else self.relative_slope * (layers + 1) / (layers - 1)

    @property
    def spearman(self) -> float | None:
        """Spearman's rank correlation of change with depth [ours]; None when all changes are equal."""
        order = ranks(np.asarray(self.change))
        if np.ptp(order) == 0:
            return None
        return float(np.corrcoef(order, np.arange(len(order)))[0, 1])

    @property
    def centre(self) -> float | None:
        """Centre of mass of the change, sum(x c) / sum(c), in [0, 1] [ours]; None when nothing changed."""
        total = float(np.sum(self.change))
        return float(np.dot(self.depth, self.change)) / total if total > 0 else None

    @property
    def width(self) -> float | None:
        """How many layers share the change: sum(c)^2 / (L sum(c^2)), in [1/L, 1] [ours]; None when nothing changed."""
        if self.mean == 0:
            return None
        scaled = np.asarray(self.change) / max(self.change)  # squares of 1e-200 would underflow
        return float(scaled.sum() ** 2 / (len(scaled) * (scaled**2).sum()))

    def to_dict(self) -> dict[str, Any]:
        """Returns the stored fields and, for readers without depthcb, the depth and the derived numbers."""
        names = (*(f.name for f in dataclasses.fields(self)), "depth", *DERIVED)
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Profile:
        """Recreates a profile from `to_dict`; derived numbers are recomputed.

        Raises:
            ValueError: A field is missing or invalid.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        try:
            return cls(**{name: _tuples(value) for name, value in fields.items() if name in known})
        except (TypeError, AttributeError) as error:
            raise ValueError(f"This is not a saved depth profile: {error}.") from error

    def to_json(self) -> str:
        """Returns the profile as a JSON object; floats survive the round trip exactly."""
        return self._json

    @cached_property
    def _json(self) -> str:  # every checkpoint asks for it again
        return json.dumps(self.to_dict(), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Profile:
        """Recreates a profile from `to_json`."""
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise ValueError(f"This is not a saved depth profile: a JSON {type(fields).__name__}, not an object.")
        return cls.from_dict(fields)

    def save(self, path: str | Path) -> None:
        """Writes `to_json` to a file."""
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Reads a file that `save` wrote."""
        return cls.from_json(Path(path).read_text(encoding="utf-8"))

    def plot(self, ax: Axes | None = None) -> Axes:
        """Plots the curve with its band on ``ax`` or a new figure; returns the axes."""
        return Profiles([self]).plot(ax)

    def _repr_html_(self) -> str:
        return Profiles([self])._repr_html_()


class Profiles(list[Profile]):
    """A list of the profiles of one measure, oldest first, which notebooks display as a plot.

    Example:
        >>> from depthcb import Profile
        >>> p = Profile((0.0, 0.1, 0.2), ("h.0", "h.1", "h.2"), "cka")
        >>> Profiles([p, p]).plot().get_title()
        'change at step 0  (pale: 1 earlier)'
    """

    def __getitem__(self, index: Any) -> Any:  # slices are Profiles too
        found = super().__getitem__(index)
        return Profiles(found) if isinstance(index, slice) else found

    @property
    def mean_relative_slope(self) -> float | None:
        """Mean relative slope of the profiles with any change; None if there is none."""
        known = [p.relative_slope for p in self if p.relative_slope is not None]
        return float(np.mean(known)) if known else None

    def plot(self, ax: Axes | None = None) -> Axes:
        """Plots all curves, with the last one highlighted and with its band; requires matplotlib.

        Args:
            ax: The axes to plot on; None creates a new figure.

        Returns:
            The axes.
        """
        try:
            from depthcb.curves import draw_curves, new_axes
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"plot() needs {error.name}: pip install 'depthcb[report]'") from error

        ax = new_axes() if ax is None else ax
        draw_curves(ax, self)
        return ax

    def _repr_html_(self) -> str:
        try:
            from depthcb.curves import profiles_html
        except ModuleNotFoundError:  # without matplotlib, show the text representation
            return f"<pre>{html.escape(repr(self))}</pre>"
        return profiles_html(self)


def layer_key(index: int) -> str:
    """Returns the name of a layer in logged keys.

    >>> layer_key(7)
    'L07'
    """
    return f"L{index:02d}"


def relative_depth(layers: int) -> FloatArray:
    """Returns the relative depth x_l = l / (L - 1) of L layers [ours]."""
    return np.linspace(0.0, 1.0, layers)


def slope(change: Sequence[float] | FloatArray) -> float:
    """Returns the least-squares slope of L changes on relative depth (change per whole depth) [ours].

    >>> round(slope([1.0, 2.0, 3.0]), 12)
    2.0
    """
    return float(_slopes(np.asarray(change)))


def _slopes(changes: FloatArray) -> FloatArray:
    """Returns the slopes (...) of profiles (..., L)."""
    x = relative_depth(changes.shape[-1])
    x = x - x.mean()
    found: FloatArray = changes @ x / np.dot(x, x)
    return found


def interval_over_halves(values: FloatArray) -> Interval:
    """Returns the 2.5 % and 97.5 % points of values over random halves of the probe."""
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)


def ranks(values: FloatArray) -> FloatArray:
    """Returns ranks from 0; ties get their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts) - 1
    return (last - (counts - 1) / 2)[inverse]


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value
