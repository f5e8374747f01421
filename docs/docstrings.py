"""Docstrings as the site shows them: a Griffe extension."""

from __future__ import annotations

import re
from typing import Any

import griffe

_RULE = re.compile(r"^=+(?: +=+)+$")


def simple_tables(text: str) -> str:
    """Turns the simple tables of reStructuredText, of two columns or more, in a text into those of Markdown."""
    lines, found, rules = text.split("\n"), [], 0
    rows: list[list[str]] = []
    starts: list[int] = []
    for line in lines:
        if _RULE.match(line.strip()):
            rules += 1
            starts = [match.start() for match in re.finditer(r"=+", line)]
            if rules == 3:
                head, *rest = [f"| {' | '.join(row)} |" for row in rows]
                found += [head, "|" + " --- |" * len(starts), *rest]
                rows, rules = [], 0
            continue
        if not rules:
            found.append(line)
            continue
        cells = [line[a:b].strip().replace("|", "\\|") for a, b in zip(starts, [*starts[1:], None], strict=True)]
        if cells[0] and not (rules == 1 and rows):
            rows.append(cells)
        else:  # the cell above goes on
            rows[-1] = [" ".join(filter(None, pair)) for pair in zip(rows[-1], cells, strict=True)]
    return "\n".join(found)


def shown(text: str) -> str:
    """Turns a docstring into Markdown with sections that Griffe knows."""
    text = simple_tables(text)
    text = re.sub(r"^(\s*)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
    text = re.sub(r"\[((?:all )?(?:ours|paper)|second-hand)\]", r"\\[\1\\]", text)  # marks, not links
    return re.sub(r"::$", ":", text, flags=re.MULTILINE)


class Docstrings(griffe.Extension):
    """Applies `shown` to every docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = shown(obj.docstring.value)
            if obj.is_class and any(
                str(base) == "NamedTuple" for base in obj.bases
            ):  # whose fields Griffe takes for attributes
                obj.docstring.value = obj.docstring.value.replace("Args:", "Attributes:")
