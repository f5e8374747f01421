"""Objectives with parameters sharded over two real processes give the results of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import run_script


def fitted(folder: Path, name: str, ranks: int, tensor_parallel: int = 1) -> list[dict[str, Any]]:
    """Returns the observations of each process."""
    folder.mkdir()
    done = run_script("recipes/split_fit.py", folder, name, ranks, tensor_parallel)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["causal_lm", "masked_lm", "dpo"])
def test_pieces_give_what_the_whole_gives(name: str, tmp_path: Path) -> None:
    (alone,) = fitted(tmp_path / "one", name, 1)
    ranks = fitted(tmp_path / "two", name, 2)
    assert alone["pieces"] == 0
    for seen in ranks:
        assert seen["pieces"] > 20, "nothing was split, so nothing was tested"
        assert seen["weights"] == pytest.approx(alone["weights"], abs=1e-5)
        assert seen["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert seen["change"] == pytest.approx(alone["change"], rel=1e-3)
        assert seen["net_change"] == pytest.approx(alone["net_change"], rel=1e-3)
        for kind in ("null", "matched_null"):
            assert len(alone[kind]) == 2
            for null, whole in zip(seen[kind], alone[kind], strict=True):
                assert null == pytest.approx(whole, rel=1e-2 if kind == "matched_null" else 1e-3)
    assert min(alone["change"]) > 0
    assert min(alone["null"][0]) > 0


@pytest.mark.slow
def test_single_matrices_are_not_split(tmp_path: Path) -> None:
    done = run_script("recipes/split_fit.py", tmp_path, "causal_lm", 2, 2)
    assert done.returncode != 0
    assert "tensor_parallel_size=2 is not supported by the recipes: use" in done.stderr
