"""The parts of the pages that are made from the code, so that they cannot differ from it."""

from __future__ import annotations

import ast
import functools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from simple_tables import simple_tables

from depthcb.glossary import RATIO_UNIT, RUN_COLUMNS, VERDICTS

ROOT = Path(__file__).parents[1]
#: Classes whose docstrings have a table of what they log.
LOGGING = {
    "depthcb/callbacks/depth_profile.py": "DepthProfile",
    "depthcb/callbacks/equal_step.py": "EqualStep",
    "depthcb/callbacks/update_ratio.py": "UpdateRatioMonitor",
    "depthcb/callbacks/freeze_by_change.py": "FreezeByChange",
    "recipes/depthcb_recipes/objectives/objective_distance_monitor.py": "ObjectiveDistanceMonitor",
    "recipes/depthcb_recipes/objectives/objective.py": "Objective",
}


def docstring(file: str, name: str) -> str:
    """The docstring of a class, which is not imported: that would need torch."""
    body = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    found = next(node for node in body if isinstance(node, ast.ClassDef) and node.name == name)
    return ast.get_docstring(found) or ""


def tables(text: str) -> Iterator[str]:
    """Yields the Markdown tables of a text."""
    yield from (match[0] for match in re.finditer(r"(?:^\|.*\|$\n?)+", simple_tables(text), re.MULTILINE))


def keys(file: str, name: str) -> list[str]:
    """The documented keys of a class, as the first column of its table has them."""
    cells = [line.split("|")[1] for table in tables(docstring(file, name)) for line in table.splitlines()[2:]]
    return [key for cell in cells for key in re.findall(r"``([^`]+)``", cell)]


def logged_keys() -> str:
    """A section with a table for each class that logs."""
    sections = [f"## {name}\n\n" + "\n".join(tables(docstring(file, name))) for file, name in LOGGING.items()]
    return "\n\n".join(sections)


def glossary() -> str:
    """The columns of reports and the words of verdicts, with what they mean."""
    columns = [f"**{title}**{{#{_anchor(title)}}}\n:   {meaning}" for title, meaning in RUN_COLUMNS.items()]
    verdicts = [f"**{word}**{{#{_anchor(word)}}}\n:   {meaning}" for word, meaning in VERDICTS.items()]
    return "\n\n".join(
        ["## Columns of reports", *columns, f"Step ratios are {RATIO_UNIT}.", "## Words of a verdict", *verdicts]
    )


def _anchor(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower()).strip("-")


def notebook(path: Path) -> str:
    """A notebook with its outputs."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    parts = []
    for cell in cells:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        parts += [_output(output.get("data", output)) for output in cell.get("outputs", [])]
    return "\n\n".join(parts)


def _output(data: dict[str, list[str] | str]) -> str:
    """The richest form of an output."""
    kind = next(kind for kind in ("image/png", "text/html", "text/plain", "text") if kind in data)
    content = "".join(data[kind])
    if kind == "image/png":
        return f'<img alt="output" src="data:image/png;base64,{content.strip()}">'
    if kind == "text/html":  # in one line, which Markdown leaves as it is
        return "<div>" + " ".join(content.split("\n")) + "</div>"
    return f"```text\n{content.rstrip()}\n```"


PARTS: dict[str, Callable[[], str]] = {
    "glossary": glossary,
    "logged keys": logged_keys,
    **{f"notebook {p.stem}": functools.partial(notebook, p) for p in sorted((ROOT / "notebooks").glob("*.ipynb"))},
}
