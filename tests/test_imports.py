"""Import structure: the library never imports the recipes, and there are no import cycles."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from runs import make_runs

from depthcb.run import write_header, write_row

ROOT = Path(__file__).parents[1]
ROOMS = {"depthcb": ROOT / "depthcb", "depthcb_recipes": ROOT / "recipes" / "depthcb_recipes"}
NAME = re.compile(r"depthcb(_recipes)?(\.\w+)*")


def modules() -> dict[str, ast.Module]:
    """The source of every module by name."""
    found = {}
    for package, folder in ROOMS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def named(tree: ast.Module) -> Iterator[str]:
    """All imports of a module, including local ones, and all module names in its strings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and NAME.fullmatch(node.value):
            yield node.value


def arrows() -> dict[str, set[str]]:
    """The internal imports of each module. A package's ``__init__`` only re-exports names, so it has none."""
    found: dict[str, set[str]] = {}
    trees = modules()
    for name, tree in trees.items():
        needed = set()
        for target in named(tree):
            while target and target not in trees:
                target = target.rpartition(".")[0]
            needed.add(target)
        found[name] = needed - {name, "", *ROOMS}
    return found


def test_the_library_knows_no_recipe() -> None:
    words = {name: list(named(tree)) for name, tree in modules().items() if name.partition(".")[0] == "depthcb"}
    assert len(words) > 30
    assert {name: w for name, ws in words.items() for w in ws if w.startswith("depthcb_recipes")} == {}


def test_no_module_leads_back_to_itself() -> None:
    found = {name: needed for name, needed in arrows().items() if name not in ROOMS}
    assert "depthcb.profile" in found["depthcb.run"], "the arrows are really read"
    assert len(list(TopologicalSorter(found).static_order())) == len(found)  # raises CycleError, which names the cycle


def imported_by(*arguments: str | Path) -> set[str]:
    command = [sys.executable, "-X", "importtime", *map(str, arguments)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {line.rpartition("|")[2].strip() for line in told.splitlines()}


@pytest.mark.parametrize(
    "arguments", [["-c", "import depthcb"], ["-m", "depthcb", "--version"], ["-m", "depthcb", "--help"]]
)
def test_the_package_and_its_help_import_nothing_slow(arguments: list[str]) -> None:
    imported = imported_by(*arguments)
    assert "depthcb" in imported
    assert not {"torch", "lightning", "transformers", "numpy", "pandas", "pyarrow", "scipy", "wandb"} & imported


def test_reading_a_record_imports_only_what_it_shows(tmp_path: Path) -> None:
    run = make_runs(layers=6, validations=(3,))[0]
    for name, record in run.records.items():
        write_header(tmp_path, name, record.callback, 0, record.settings, record.fit, record.parts)
        for row in record.rows:
            write_row(tmp_path, name, dict(row))
    show = imported_by("-m", "depthcb", "show", tmp_path)
    report = imported_by("-m", "depthcb", "report", tmp_path, "--out", tmp_path / "page.html")
    for imported in (show, report):
        assert not {"torch", "lightning", "transformers", "matplotlib", "pandas", "scipy.stats", "wandb"} & imported
    assert "plotly" in report - show
