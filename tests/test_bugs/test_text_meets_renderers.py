"""Names with dollars, underscores, tags or escape sequences broke plots, became links or commanded the terminal."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.text
import numpy as np
import pytest
from matplotlib.legend import Legend
from rich.console import Console
from runs import make_run, make_runs

from depthcb import Profile, report
from depthcb.cli import main
from depthcb.curves import curves_image, curves_page, heatmap_image
from depthcb.profile import Profiles
from depthcb.report.charts import heatmaps, profile_chart
from depthcb.report.groups import groups
from depthcb.run import Run, write_header, write_row

NAMES = ["$\\bad$", "cost_5$_and_6$", "_hidden", "\\$", '<a href="https://x.y">z</a>', "\x1b[31mred\x1b]0;title\x07"]


def renamed(name: str) -> list[Run]:
    """Two runs without a twin, with hostile names of run, layers and measure."""
    runs = make_runs(arms=4)
    fields = json.loads(
        json.dumps([run.to_dict() for run in (runs[0], runs[3])]).replace("model.layers.0", json.dumps(name)[1:-1])
    )
    for run in fields:
        for row in run["records"]["depth"]["rows"]:
            row["profiles"]["cka"] |= {"title": name, "unit": name}
    return [Run.from_dict(fields[0] | {"name": name}), Run.from_dict(fields[1])]


@pytest.mark.parametrize("name", NAMES[:5])
def test_matplotlib_shows_names_as_they_are(name: str, tmp_path: Path) -> None:
    fig = report.figure(renamed(name))
    fig.savefig(tmp_path / "a.png")
    shown = [text.get_text() for legend in fig.findobj(Legend) for text in legend.get_texts()]
    assert shown
    for text in fig.findobj(matplotlib.text.Text):
        decade = re.fullmatch(r"\$\\mathdefault\{10\^\{-?\d+\}\}\$", text.get_text())  # a tick of a log axis
        assert decade or not text._preprocess_math(text.get_text())[1], "no name is math"
    drawn = [text._preprocess_math(text.get_text())[0] for text in fig.findobj(matplotlib.text.Text)]
    assert name in [text.strip() for text in drawn], "the legend has the run"
    profiles = Profiles([Profile((0.1, 0.2), ("a", "b"), "m", title=name, unit=name)])
    for image in (curves_image({"m": profiles}), heatmap_image({"m": profiles})):
        assert image.std() > 0
    assert "<a href" not in curves_page({"m": profiles})


def test_plotly_makes_no_links_of_names(tmp_path: Path) -> None:
    (group,) = groups(renamed(NAMES[4]))
    for fig in (profile_chart(group), heatmaps(group)):
        text = json.dumps(json.loads(fig.to_json()))
        assert "<a href" not in text
        assert '&lt;a href=\\"https://x.y\\"&gt;z' in text
    report.write_html(group.runs, tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "<a href=" not in re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)


def test_terminals_obey_nothing() -> None:
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=False)
    runs = renamed(NAMES[5])
    report.print_runs(runs, console)
    for run in runs:
        report.print_bars(run, console)
    assert "\x1b" not in out.getvalue()
    assert "\x07" not in out.getvalue()
    assert "\\x1b[31mred" in out.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252"])
def test_terminals_without_utf_8(encoding: str, tmp_path: Path) -> None:
    run = make_run(0, "AdamW", "standard", 4, 2)
    for name, record in run.records.items():
        write_header(tmp_path / "run…", name, record.callback, 0, record.settings, record.fit)
        for row in record.rows:
            write_row(tmp_path / "run…", name, row)
    for command in (
        ["show", str(tmp_path)],
        ["report", str(tmp_path), "--out", str(tmp_path / "a…b.html")],
        ["show", "…"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "depthcb", *command],
            capture_output=True,
            cwd=tmp_path,
            env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert b"Traceback" not in done.stderr
        assert done.returncode == (2 if command[1] == "…" else 0), done.stderr


def test_json_has_no_nan(tmp_path: Path) -> None:
    write_header(tmp_path, "depth", "DepthProfile", 0, {"layers": [], "measures": {}})
    write_row(tmp_path, "depth", {"step": 1, "metrics": {"val/loss": float("nan"), "val/other": np.inf}})
    for line in (tmp_path / "depthcb" / "depth.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_a_character_that_the_terminal_lacks_is_a_question_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, io.TextIOWrapper(io.BytesIO(), encoding="latin-1"))
    assert main(["show", str(tmp_path / "…\x1b[31m")]) == 2
    sys.stderr.flush()
    assert b"?\\x1b[31m is not a folder" in sys.stderr.buffer.getvalue()  # type: ignore[attr-defined]
