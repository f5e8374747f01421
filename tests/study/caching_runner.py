"""Runs of tests that write to the cache: the real runner without a fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from depthcb_recipes.cache import cache_folder, cached
from depthcb_recipes.studies import runner
from depthcb_recipes.studies.grid import RunConfig
from depthcb_recipes.studies.result import Result


def fit(config: RunConfig, folder: Path, precision: Any) -> None:
    cached(cache_folder() / "table.parquet", lambda: pa.table({"a": [1]}))


def run(config: RunConfig, folder: Path) -> Result:
    runner.fit = fit  # type: ignore[assignment]
    return runner.run(config, folder)
