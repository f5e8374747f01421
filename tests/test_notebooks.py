"""Notebooks run in a fresh kernel and an empty folder; all are in git with their outputs."""

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


@pytest.mark.parametrize("name", sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")))
def test_outputs_are_committed_and_name_no_machine(name: str) -> None:
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert kinds(outputs) & {"text/html", "image/png"} or "│" in text(outputs) or "─" in text(outputs)
    assert not any(output.get("name") == "stderr" or output["output_type"] == "error" for output in outputs)
    assert "/tmp" not in text(outputs)


def test_the_quickstart_begins_with_the_readers_own_module() -> None:
    notebook = nbformat.read(NOTEBOOKS / "01_quickstart.ipynb", as_version=4)
    source = "\n".join(cell.source for cell in notebook.cells)
    assert "depthcb_recipes" not in source
    first = next(cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert "class Mine(pl.LightningModule)" in first
    assert len(first.splitlines()) <= 30


@pytest.mark.filterwarnings("ignore")  # set by the kernel
def test_quickstart(tmp_path: Path) -> None:
    outputs = execute("01_quickstart", tmp_path)
    assert {"text/html", "image/png"} <= kinds(outputs)
    assert any("<svg" in output.get("data", {}).get("text/html", "") for output in outputs), "an inline picture"
    told = " ".join(text(outputs).split())
    assert "SGD: equal-step minus standard relative slope " in told
    assert "null of standard: relative slope " in told
    assert "In plain words: " in told
    assert (tmp_path / "report.html").stat().st_size > 1_000_000
    assert (tmp_path / "pair.csv").read_text().startswith("panel,")


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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_your_model(tmp_path: Path) -> None:
    outputs = execute("03_your_model", tmp_path)
    told = text(outputs)
    assert "('h.0', 'h.2', 'h.4')" in told
    assert "'procrustes'" in told
    assert "step ratios of the merged weights: [" in told
    assert sum("<svg" in output.get("data", {}).get("text/html", "") for output in outputs) == 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_small_study(tmp_path: Path) -> None:
    outputs = execute("04_a_small_study", tmp_path)
    told = " ".join(text(outputs).split())
    assert "8 of 8 runs have figures, 0 failed." in told
    assert "image/png" in kinds(outputs)
    assert "C5" in told
    assert (tmp_path / "pairs.csv").is_file()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_what_to_freeze(tmp_path: Path) -> None:
    told = " ".join(text(execute("05_what_to_freeze", tmp_path)).split())
    assert "random" in told
    assert "Undecided: 2 of 4 seeds." in told
