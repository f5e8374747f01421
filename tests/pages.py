"""The code blocks of the documentation."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
_FENCE = re.compile(
    r"(?P<mark>^ *<!-- parsed only -->\n)?^(?P<indent> *)```(?P<info>\S[^\n]*)\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block of code.

    Args:
        page: The file.
        line: Line of its first line of code, counted from 1.
        language: As the fence says.
        title: The name of the file that it is; empty if it is none.
        text: The code.
        parsed_only: Whether the page says that it can't be run as it stands.
    """

    page: Path
    line: int
    language: str
    title: str
    text: str
    parsed_only: bool = False

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(*pages: Path) -> Iterator[Block]:
    for page in pages:
        source = page.read_text(encoding="utf-8")
        for match in _FENCE.finditer(source):
            title = re.search(r'title="([^"]*)"', match["info"])
            text = "".join(line.removeprefix(match["indent"]) for line in match["text"].splitlines(keepends=True))
            line = source.count("\n", 0, match.start("info")) + 2
            name = title[1] if title else ""
            yield Block(page, line, match["info"].split()[0], name, text, bool(match["mark"]))


def commands(text: str) -> list[list[str]]:
    """The arguments of each ``depthcb`` command in a shell block, also of one that another command is given."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        inner = [word for word in words if word.startswith("depthcb ")]  # sbatch --wrap 'depthcb …'
        words = shlex.split(inner[0]) if inner else words
        if "depthcb" in words:
            found.append(words[words.index("depthcb") + 1 :])
    return found


def write_files(page: Path, folder: Path) -> None:
    """Writes the blocks of a page that have a title into files of that name."""
    for block in blocks(page):
        if block.title:
            path = folder / block.title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
