"""Docstrings as the site shows them: a Griffe extension."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import griffe

sys.path.insert(0, str(Path(__file__).parent))

from simple_tables import simple_tables


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
