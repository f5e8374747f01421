"""Heatmaps of the step ratios of units smaller than layers, for the loggers that draw."""

from __future__ import annotations

from collections.abc import Mapping

import lightning.pytorch as pl

from depthcb.callbacks.logging import deserves_pictures, log_units, rows_of
from depthcb.recording import Counting
from depthcb.unit_grid import UnitGrid, small_unit


class UnitPictures:
    """Passes rows to the loggers and the record, and draws the latest one's ratios.

    Args:
        callback: The callback that logs.
        trainer: Its Trainer.
        prefix: What precedes a unit's key in the columns to draw.
    """

    def __init__(self, callback: Counting, trainer: pl.Trainer, prefix: str) -> None:
        self._callback, self._trainer, self._prefix = callback, trainer, prefix
        self._log = rows_of(callback, trainer)
        self._asked = 0
        self._latest: tuple[dict[str, float], int] | None = None

    def log(self, row: Mapping[str, float], step: int) -> None:
        """Logs a row."""
        self._log(row, step)
        found = {key.removeprefix(self._prefix): value for key, value in row.items() if key.startswith(self._prefix)}
        found = {key: value for key, value in found.items() if small_unit(key)}
        if found:
            self._latest = found, step

    def draw(self, end: bool = False) -> None:
        """Draws the latest row, if it is new and its turn: the first 32 calls, then every 2nd, 4th, ...; or at the end.

        Args:
            end: Whether this is the last call.
        """
        if self._latest is None:
            return
        self._asked += 1
        if end or deserves_pictures(self._asked):
            values, step = self._latest
            log_units(self._callback, self._trainer, UnitGrid.of(values), step)
            self._latest = None
