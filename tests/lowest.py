"""The lowest version of each dependency that pyproject.toml allows: ``python tests/lowest.py > constraints-lowest.txt``."""

from __future__ import annotations

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

HEAD = """\
# The lowest versions that pyproject.toml declares, made by tests/lowest.py (Python 3.11). The fast tests pass with them and -W default.
# Two things need newer ones: W&B's files are read by `wandb leet inspect --json` of 0.31 (WANDB_READER), and the README's picture is
# compared pixel by pixel from matplotlib 3.11 on. torch apart: only that of constraints.txt.
"""


def lowest() -> dict[str, str]:
    """The highest lower bound of each requirement, over all extras but those that only build or document."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {name: lines for name, lines in project["optional-dependencies"].items() if name not in ("dist", "docs")}
    found: dict[str, str] = {}
    for line in [*project["dependencies"], *(line for lines in extras.values() for line in lines)]:
        requirement = Requirement(line)
        if requirement.name not in ("depthcb", "torch"):
            (bound,) = [each.version for each in requirement.specifier if each.operator == ">="]
            found[requirement.name] = max(found.get(requirement.name, "0"), bound, key=Version)
    return found


def text() -> str:
    return HEAD + "".join(
        f"{name}=={version}\n" for name, version in sorted(lowest().items(), key=lambda x: x[0].lower())
    )


if __name__ == "__main__":
    print(text(), end="")
