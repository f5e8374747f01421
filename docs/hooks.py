"""What MkDocs does before a page is rendered: it writes the generated parts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

from generated import PARTS  # noqa: E402

#: Pages whose tables need the whole width.
WIDE = ("method.md",)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Writes the generated parts."""
    if page.file.src_uri in WIDE:
        page.meta["hide"] = ["toc"]
    for name, make in PARTS.items():
        mark = f"<!-- generated: {name} -->"
        if mark in markdown:
            markdown = markdown.replace(mark, make())
    return markdown
