"""A study's summary in Weights & Biases: one run per cell."""

from __future__ import annotations

from typing import Any

import pandas as pd
import wandb

#: Columns of `cells_table` in the configuration and in the summary of a cell's run.
FACTS = ("model", "family", "block", "size", "layers", "objective", "optimizer")
FIGURES = (
    "slope", "slope_low", "slope_high", "equal", "share", "above", "above_low", "above_high", "keeps", "word",
    "null_low", "null_high", "null_word", "floor", "spread", "width", "distance", "distance_low",
    "distance_high", "seeds", "pairs",
)  # fmt: skip


def publish(cells: pd.DataFrame, study: str, project: str) -> int:
    """Logs one W&B run per cell with its estimates, null, rounding floor, spread and verdict under ``study/``.

    Args:
        cells: Rows of `cells_table`, of any optimizers.
        study: The study's name, which groups the runs.
        project: The W&B project; ``WANDB_MODE=offline`` keeps the runs on this machine.

    Returns:
        The number of runs.
    """
    for _, cell in cells.iterrows():
        name = f"{cell['model']} {cell['objective']} {cell['optimizer']}"
        facts = {key: _plain(cell[key]) for key in FACTS} | {"depthcb_control": "study", "study": study}
        settings = wandb.Settings(silent=True, console="off")
        known = {f"study/{key}": value for key in FIGURES if (value := _plain(cell[key])) is not None}
        with wandb.init(project=project, group=study, name=name, config=facts, settings=settings) as run:
            run.summary.update(known)
    return len(cells)


def _plain(value: Any) -> Any:
    """Returns a value of a table as W&B takes it; None for NaN."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and value != value else value
