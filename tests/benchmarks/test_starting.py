"""How long `import depthcb` and the command line take to start."""

from __future__ import annotations

import subprocess
import sys

import pytest
from benchmarking import alternate, note

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
COMMAND = "import sys; from depthcb.cli import main; main(sys.argv[1:])"


def test_starting_takes_a_moment() -> None:
    commands = {
        "python alone": ["-c", "pass"],
        "import depthcb": ["-c", "import depthcb"],
        "depthcb --version": ["-c", COMMAND, "--version"],
        "depthcb --help": ["-c", COMMAND, "--help"],
    }
    runs = {name: [sys.executable, *arguments] for name, arguments in commands.items()}
    times = alternate({name: lambda c=c: subprocess.run(c, capture_output=True) for name, c in runs.items()}, 5)
    for name, seconds in times.items():
        note(f"seconds for {name}", min(seconds), 1.0)
        assert min(seconds) < 2.0
