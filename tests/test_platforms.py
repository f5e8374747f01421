"""Linux and macOS are fully supported, Windows only the callbacks: POSIX-only features are imported where used."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger
from not_posix_fit import MODULES, NAMES
from support import TinyLM, fit, run_script, seeded

from depthcb import DepthProfile, EqualStep, UpdateRatioMonitor
from depthcb.run import read_runs

ROOT = Path(__file__).parents[1]
OPTIONS = ("preexec_fn", "process_group", "start_new_session")  # of subprocess.Popen


def at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes evaluated when a module is imported: without function bodies and TYPE_CHECKING blocks."""
    yield tree
    below: list[ast.AST | None]
    if isinstance(tree, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        below = [*tree.args.defaults, *tree.args.kw_defaults, *getattr(tree, "decorator_list", [])]
    elif isinstance(tree, ast.If) and ast.unparse(tree.test).endswith("TYPE_CHECKING"):
        below = [*tree.orelse]
    else:
        below = [*ast.iter_child_nodes(tree)]
    for node in below:
        if node is not None:
            yield from at_import(node)


def posix_only(source: str) -> list[str]:
    """POSIX-only features that a module needs at import."""
    found = []
    for node in at_import(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.partition(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            module = str(node.module)
            own = module.partition(".")[0] in MODULES
            found += [f"{module}.{a.name}" for a in node.names if own or a.name in NAMES.get(module, ())]
        elif isinstance(node, ast.Attribute) and node.attr in NAMES.get(ast.unparse(node.value), ()):
            found.append(ast.unparse(node))
        elif isinstance(node, ast.keyword) and node.arg in OPTIONS:
            found.append(node.arg)
    return found


FOUND = {
    "import fcntl": ["fcntl"],
    "import json, ctypes.util": ["ctypes.util"],
    "try:\n    from resource import getrusage\nexcept ImportError: pass": ["resource.getrusage"],
    "from os import fork, path": ["os.fork"],
    "class A:\n    end = signal.SIGKILL": ["signal.SIGKILL"],
    "def f(end=os.killpg, *, by=signal.SIGKILL): ...": ["os.killpg", "signal.SIGKILL"],
    "@g(os.sched_getaffinity(0))\ndef f(): ...": ["os.sched_getaffinity"],
    "p = Popen(['a'], start_new_session=True)": ["start_new_session"],
    "def f():\n    import fcntl\n    os.kill(1, signal.SIGKILL)\nclass A:\n    async def g(self): os.fork()": [],
    "if TYPE_CHECKING:\n    import pwd\nend = signal.SIGTERM\nf = lambda: os.fork()": [],
    "from .resource import a": [],
}


@pytest.mark.parametrize("source", FOUND)
def test_the_scan_sees_what_is_needed_at_import(source: str) -> None:
    assert posix_only(source) == FOUND[source]


def test_no_module_needs_a_posix_system_to_be_imported() -> None:
    files = [*ROOT.glob("depthcb/**/*.py"), *ROOT.glob("recipes/**/*.py")]
    found = {str(f.relative_to(ROOT)): posix_only(f.read_text(encoding="utf-8")) for f in files}
    assert {"recipes/depthcb_recipes/studies/worker.py", "recipes/depthcb_recipes/stopping.py"} <= set(found)
    assert {name: uses for name, uses in found.items() if uses} == {}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fewer than 5 directions.*")
def test_the_callbacks_measure_the_same_without_a_posix_system(tmp_path: Path) -> None:
    """All modules of the library, and a fit with its record and progress bars, run without POSIX-only features."""
    done = run_script("not_posix_fit.py", tmp_path / "without")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    callbacks = [UpdateRatioMonitor(), EqualStep(), DepthProfile()]
    fit(seeded(TinyLM), callbacks, logger=CSVLogger(tmp_path / "with"), val_check_interval=2)
    (run,) = read_runs(tmp_path / "with")
    assert found["records"] == sorted(run.records)
    assert (found["control"], found["finished"], found["steps"]) == ("equal-step", True, 4)
    assert found["changes"] == [list(profile.change) for profile in run.profiles["cka"]]
    assert len(found["changes"]) == 2
    assert "depthcb.callbacks.depth_profile" in found["loaded"]
    assert "█" in done.stdout
