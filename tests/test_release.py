"""What a release consists of, besides the package itself: versions, citation, changelog."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import lowest
import pytest
import yaml
from pages import ROOT

import depthcb

GIT = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]


def version(folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "setuptools_scm"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_version_is_the_tag_and_any_copy_has_one(tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    folder.mkdir()
    shutil.copy(ROOT / "pyproject.toml", folder)
    assert version(folder) == "0.1.0.dev0", "a folder without git"

    def git(*arguments: str) -> None:
        subprocess.run([*GIT, *arguments], cwd=folder, check=True)

    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    assert re.fullmatch(r"0\.1\.0\.dev1\+g\w+", version(folder)), "before the first tag"
    git("tag", "v1.2.0")
    assert version(folder) == "1.2.0"
    git("commit", "--quiet", "--allow-empty", "-m", "second")
    assert re.fullmatch(r"1\.2\.1\.dev1\+g\w+", version(folder)), "after it"
    git("clone", "--quiet", "--depth=1", "--no-tags", folder.as_uri(), str(tmp_path / "shallow"))
    assert version(tmp_path / "shallow").startswith("0.1.0.dev1"), "a clone that has neither history nor tags"


def test_the_installed_version_is_told() -> None:
    assert re.match(r"\d", depthcb.__version__)
    told = subprocess.run(
        [sys.executable, "-m", "depthcb", "--version"], capture_output=True, text=True, check=True
    ).stdout
    assert told == f"depthcb {depthcb.__version__}\n"


def test_lowest_versions_are_the_declared_ones() -> None:
    assert (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8") == lowest.text()


def test_the_changelog_has_the_headings_of_keep_a_changelog() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## \[Unreleased\]$", text, re.MULTILINE)
    found = re.findall(r"^### (.*)$", text, re.MULTILINE)
    assert found
    assert set(found) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


@pytest.mark.parametrize("path", ["CITATION.cff", ".github/workflows/ci.yml", ".github/ISSUE_TEMPLATE/bug.yml"])
def test_what_other_programs_read_is_yaml(path: str) -> None:
    assert isinstance(yaml.safe_load((ROOT / path).read_text(encoding="utf-8")), dict)


def test_ci_runs_what_everybody_runs() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert commands == [".ci/run", "make docs"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100
