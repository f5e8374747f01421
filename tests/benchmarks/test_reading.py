"""What it costs to read a long record: against reading its lines as JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarking import median_ratio, note

from depthcb.run import write_header, write_row

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
ROWS, LAYERS = 100_000, 12

#: Prints the seconds since the start and the peak of the memory, in MB.
#: That of `getrusage` would be the parent's where that is larger.
PEAK = "import re, time; status = open('/proc/self/status').read(); print(time.process_time(), int(re.search(r'VmHWM:\\s*(\\d+)', status)[1]) / 1024)"
LINES = "import json, sys\nfor line in open(sys.argv[-1]): json.loads(line)\n"
COMMAND = "import sys; from depthcb.cli import main; main(sys.argv[1:])\n"


def record(folder: Path) -> Path:
    """The record of an EqualStep of 12 layers that has logged 100,000 steps, and of two measurements beside it."""
    write_header(folder, "equal_step", "EqualStep", 0)
    write_header(
        folder, "depth", "DepthProfile", 0, {"layers": [f"h.{i}" for i in range(LAYERS)], "measures": {"cka": ""}}
    )
    for step in (0, ROWS - 1):
        change = [0.01 * (step + i) / ROWS for i in range(LAYERS)]
        profile = {"change": change, "layer_names": [f"h.{i}" for i in range(LAYERS)], "measure": "cka"}
        profile |= {"step": step, "title": "change", "unit": "1 - CKA"}
        write_row(folder, "depth", {"step": step, "profiles": {"cka": profile}})
    path = folder / "depthcb" / "equal_step.jsonl"
    with open(path, "a", encoding="utf-8") as file:
        for step in range(ROWS):
            row: dict[str, float] = {"step": step, "equal_step/target": 1e-3, "equal_step/spread": 1.0 + 1 / (step + 1)}
            for i in range(LAYERS):
                row[f"equal_step/ratio/L{i:02d}"] = 1e-3 * (i + 1) / (step + 7)
                row[f"equal_step/scale/L{i:02d}"] = 1 / (i + 1 + step / 13)
                row[f"equal_step/realised/L{i:02d}"] = 1e-3 + 1e-9 * step / 17
            file.write(json.dumps(row) + "\n")
    return path


def test_a_long_record_is_read_about_as_fast_as_json(tmp_path: Path) -> None:
    path = record(tmp_path)
    commands = {
        "json": [LINES, str(path)],
        "show": [COMMAND, "show", str(tmp_path)],
        "report": [COMMAND, "report", str(tmp_path), "--out", str(tmp_path / "page.html")],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    peak = dict.fromkeys(commands, 0.0)
    for _ in range(3):
        for name, (code, *arguments) in commands.items():
            ran = subprocess.run(
                [sys.executable, "-c", code + PEAK, *arguments], capture_output=True, text=True, check=True
            )
            time, memory = map(float, ran.stdout.split("\n")[-2].split())
            seconds[name].append(time)
            peak[name] = memory
    for name in ("show", "report"):
        slower = median_ratio(seconds, name, "json")
        note(f"depthcb {name} of 100,000 rows, in readings of them as JSON", slower, 3.0)
        note(f"depthcb {name} of 100,000 rows, MB", peak[name], 300.0)
        assert slower < 3.0
        assert peak[name] < 300.0
