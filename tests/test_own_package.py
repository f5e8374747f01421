"""An objective, a data module and a network of another package, as the documentation shows them, in a fit and a study."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pages import ROOT, blocks, commands, write_files

from depthcb_recipes.studies.grid import read_study

PAGE = ROOT / "docs" / "how-to" / "own-package.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page's files, and the package installed into its subfolder ``site``."""
    folder = tmp_path_factory.mktemp("mylab")
    write_files(PAGE, folder)
    (folder / "mylab" / "__init__.py").touch()
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
    command += ["--target", "site", "."]
    subprocess.run(command, cwd=folder, check=True)
    run(folder, "make_backbone.py")
    return folder


def run(folder: Path, *arguments: str) -> str:
    """Runs Python in an empty environment but for the installed package; not from the package's own folder."""
    paths = [str(folder / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_pages_commands_work_as_they_stand(folder: Path) -> None:
    told = [
        run(folder, "-m", "depthcb", *own) for b in blocks(PAGE) if b.language == "bash" for own in commands(b.text)
    ]
    assert len(told) == 4
    assert (folder / "depthcb-report.html").is_file()
    assert "2 of 2 runs have figures, 0 failed." in told[2]
    assert "sums" in told[3], "the objective's name is that of its file"
    results = [json.loads(path.read_text()) for path in folder.glob("depthcb-studies/study/*/*/result.json")]
    assert {result["backbone"]["layers"] for result in results} == {4}
    assert {result["config"]["control"] for result in results} == {"standard", "equal-step"}
    assert len({(result["data_order"], result["initial_weights"]) for result in results}) == 1, "they are a pair"


def test_a_run_is_what_its_file_says(tmp_path: Path) -> None:
    write_files(PAGE, tmp_path)
    write_files(PAGE, tmp_path / "elsewhere")
    before = read_study(tmp_path / "study.yaml")
    assert [run.hash for run in before] == [run.hash for run in read_study(tmp_path / "elsewhere" / "study.yaml")]
    recipe = yaml.safe_load((tmp_path / "sums.yaml").read_text())
    recipe["model"]["init_args"]["smoothing"] = 0.2
    (tmp_path / "sums.yaml").write_text(yaml.safe_dump(recipe))
    after = read_study(tmp_path / "study.yaml")
    assert {run.hash for run in before}.isdisjoint(run.hash for run in after)
    assert {run.objective for run in after} == {"sums"}


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("nowhere.yaml", None, "nowhere.yaml cannot be read (No such file or directory)"),
        ("mine.yaml", "data: {class_path: mylab.data.Sums}", "must have 'model:' and 'data:'"),
        ("mine.yaml", "model: {class_path: a.B}\ndata: {class_path: a.C, on: 2020-01-01}", "put quotes around it"),
        ("mine.yaml", "model: [", "is not YAML"),
        ("causal_lm.yaml", "model: {class_path: a.B}\ndata: {class_path: a.C}", "rename the file"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(name: str, text: str | None, told: str, tmp_path: Path) -> None:
    write_files(PAGE, tmp_path)
    if text is not None:
        (tmp_path / name).write_text(text)
    study = yaml.safe_load((tmp_path / "study.yaml").read_text())
    study["grid"]["objective"] = [name]
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    with pytest.raises(ValueError, match=r"study\.yaml") as error:
        read_study(tmp_path / "study.yaml")
    assert told in str(error.value)
    assert name in str(error.value)


def test_bundled_recipes_keep_their_hashes() -> None:
    """Those of results that are on disk: the hash was computed before a run could have a file of its own."""
    first = read_study(ROOT / "recipes" / "depthcb_recipes" / "studies" / "mini-smoke.yaml")[0]
    assert (first.hash, "recipe" in first.to_dict()) == ("d186df72aecaa4ad", False)
