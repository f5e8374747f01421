"""Everything the documentation refers to exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_test_and_file_that_the_method_names_exists() -> None:
    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    tests = re.findall(r"`([\w/]+\.py)::(\w+)`", text)
    assert len(tests) > 25
    for file, name in tests:
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"{file}::{name}"
    files = re.findall(r"\| `((?:depthcb_recipes/)?[\w/]+\.py)` \|", text)
    assert len(files) > 15
    for file in files:
        room = ROOT / "recipes" if file.startswith("depthcb_recipes/") else ROOT / "depthcb"
        assert (room / file).is_file(), file
