"""The command line: light, and kind about bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from depthcb.cli import main
from recipes.backbones import load_backbone


def test_importing_the_package_is_light() -> None:
    code = "import sys, depthcb, depthcb.cli, recipes; print([m for m in ('torch', 'lightning') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--backbone", "./no-such-model"], "./no-such-model"),
        (["demo", "--steps", "0"], "at least one step"),
        (["compare", "minilm", "minilm", "--text", "nowhere.txt"], "--text nowhere.txt is not a file"),
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


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model against a saved copy with one layer changed: nothing before that layer, something from it on."""
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
