"""Tables of docstrings."""

from __future__ import annotations

import re

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
        cut = bool(rows) and rows[-1][0].count("``") % 2 == 1  # a key that was too long for its column
        if cells[0] and not cut and not (rules == 1 and rows):
            rows.append(cells)
        else:  # the row above goes on
            (first, *others), rows[-1] = zip(rows[-1], cells, strict=True), []
            rows[-1] = [
                ("" if cut else " ").join(filter(None, first)),
                *(" ".join(filter(None, pair)) for pair in others),
            ]
    return "\n".join(found)
