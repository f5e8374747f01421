"""The command line: fast imports and clear errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger
from support import TinyLM, fit, seeded

from depthcb import DepthProfile, EqualStep
from depthcb.cli import main
from depthcb.report import read_html
from depthcb.run import read_runs
from depthcb_recipes.backbones.loading import load_backbone


def test_importing_the_package_is_light() -> None:
    code = "import sys, depthcb, depthcb.cli, depthcb_recipes; print([m for m in ('torch', 'lightning') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--backbone", "./no-such-model"], "./no-such-model"),
        (["demo", "--steps", "0"], "at least one step"),
        (["compare", "minilm", "minilm", "--text", "nowhere.txt"], "--text nowhere.txt is not a file"),
        (["report", "nowhere"], "nowhere is not a folder: pass the folder of a run"),
        (["show", "."], "contains no depthcb run"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"depthcb {arguments[0]}: ")
    assert message in error
    assert "Traceback" not in error


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    fit(seeded(TinyLM), [DepthProfile(), EqualStep()], logger=CSVLogger(tmp_path / "logs"), val_check_interval=2)
    return tmp_path / "logs" / "lightning_logs" / "version_0"


def test_report_and_show(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    out = tmp_path / "page.html"
    assert main(["report", str(run_folder), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out} (open it in a browser)\n"
    assert read_html(out) == read_runs(run_folder)
    assert main(["report", str(run_folder), "--out", str(tmp_path / "no" / "page.html")]) == 2
    assert "page.html cannot be written (No such file or directory)" in capsys.readouterr().err
    assert main(["show", str(run_folder)]) == 0
    shown = capsys.readouterr().out
    assert "lightning_logs/version_0, equal-step: change at step 3" in shown
    assert shown.count("█") > 4


def test_reports_need_no_torch(run_folder: Path, tmp_path: Path) -> None:
    """Commands respond immediately, since importing torch takes seconds."""
    code = f"""
import sys
from depthcb.cli import main
assert main(["report", {str(run_folder)!r}, "--out", {str(tmp_path / "a.html")!r}]) == 0
assert main(["show", {str(run_folder)!r}]) == 0
print([m for m in ("torch", "lightning") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model and a copy with one changed layer: the profile is zero before that layer and non-zero from it on."""
    model, tokenizer = load_backbone("minilm", head=None)
    model.encoder.layer[3].output.dense.weight.data.mul_(1.5)
    model.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"Line {i} speaks of {i * i} things, of which {i} matter." for i in range(12)))
    found = tmp_path / "profiles.json"
    local = str(tmp_path / "other")
    assert main(["compare", "minilm", local, "--text", str(text), "--json", str(found)]) == 0
    change = json.loads(found.read_text())["cka"]["change"]
    assert change[:3] == [0.0] * 3
    assert min(change[3:]) > 0
    printed = capsys.readouterr().out
    assert "relative slope" in printed
    assert f"{change[4]:.4g}" in printed
