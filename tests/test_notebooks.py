"""Notebooks run in a fresh kernel and an empty folder, and have no output in git."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def execute(name: str, folder: Path) -> list[Any]:
    """Returns all outputs; raises an error if a cell fails."""
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def text(outputs: list[Any]) -> str:
    return "\n".join(o.get("text") or str(o.get("data", {}).get("text/plain", "")) for o in outputs)


def kinds(outputs: list[Any]) -> set[str]:
    return {kind for output in outputs for kind in output.get("data", {})}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits threads, since other tests run in parallel: two threads on one core are many times slower than one."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_no_output_is_kept(path: Path) -> None:
    for cell in nbformat.read(path, as_version=4).cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # set by the kernel
def test_quickstart(tmp_path: Path) -> None:
    outputs = execute("01_quickstart", tmp_path)
    assert {"text/html", "image/png"} <= kinds(outputs)
    assert any("<svg" in output.get("data", {}).get("text/html", "") for output in outputs), "an inline picture"
    assert "equal-step: relative slope +" in text(outputs)
    assert "'equal-step', 4)" in text(outputs)
    assert (tmp_path / "report.html").stat().st_size > 1_000_000
    assert len(list((tmp_path / "runs").glob("wandb/offline-run-*"))) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_is_it_the_gradient(tmp_path: Path) -> None:
    outputs = execute("02_is_it_the_gradient", tmp_path)
    assert "image/png" in kinds(outputs)
    told = text(outputs)
    for seed in range(4):
        for control in ("standard", "equal-step"):
            assert told.count(f"sgd-{control}-seed{seed}: ") == 2
        assert f"SGD, seed {seed}: difference" in told
    assert "SGD, 4 pairs (seeds 0, 1, 2, 3): " in told
    assert "change-matched null: " in told
