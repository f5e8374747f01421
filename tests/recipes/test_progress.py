"""Progress output in a log and in a terminal."""

from __future__ import annotations

import re
import time
from io import StringIO
from pathlib import Path
from typing import Any

import pexpect
import pytest
from rich.console import Console
from support import TinyLM, fit

from depthcb import DepthProfile
from depthcb_recipes.fit_progress import FitProgress
from depthcb_recipes.progress import Progress


def log() -> tuple[StringIO, Console]:
    text = StringIO()
    return text, Console(file=text, width=200)


def test_a_log_has_a_line_for_each_start_and_each_validation() -> None:
    text, console = log()
    with Progress(8, console) as progress:
        for name in ("first", "second"):
            shown = FitProgress(name, progress)
            fit(TinyLM(), [DepthProfile(), shown], val_check_interval=2, enable_progress_bar=True)
    lines = [re.sub(r"^\d+:\d\d | about .*", "", line) for line in text.getvalue().splitlines()]
    assert [line.partition("; ")[2].rstrip(",") for line in lines] == [
        "0/8 steps", "2/8 steps", "4/8 steps", "4/8 steps", "6/8 steps", "8/8 steps",
    ]  # fmt: skip
    assert [line.partition(":")[0] for line in lines] == ["first"] * 3 + ["second"] * 3
    assert re.search(r"first: validated after 2 steps, depth/cka/slope -?[\d.e-]+;", text.getvalue())
    assert text.getvalue().count("left") == 5, "an estimate from the first step on"


def test_a_log_never_falls_silent_even_in_one_long_step() -> None:
    text, console = log()
    with Progress(2, console, every=0.2) as progress:
        progress.say("working")
        time.sleep(0.9)
        assert len(text.getvalue().splitlines()) >= 4
        progress.now("working on")
        time.sleep(0.3)
    assert "working on; 0/2 steps" in text.getvalue()
    ended = text.getvalue()
    time.sleep(0.4)
    assert text.getvalue() == ended


def test_time_left_follows_the_plan_at_the_pace_so_far() -> None:
    with Progress(10, log()[1], planned=100) as progress:
        assert progress.seconds_left == 100
        time.sleep(0.2)
        progress.advance(steps=1, seconds=50)  # half of the planned time, independent of the steps
        assert progress.seconds_left == pytest.approx(0.2, abs=0.1)
        progress.advance(steps=9, seconds=60)
        assert progress.seconds_left == 0
    with Progress(None, log()[1]) as progress:
        progress.advance(steps=1)
        assert progress.seconds_left is None


def test_a_terminal_has_a_bar_with_an_estimate(tmp_path: Path) -> None:
    code = (
        "import time; from depthcb_recipes.progress import Progress\n"
        "with Progress(4) as progress:\n"
        "    for i in range(4):\n"
        "        progress.now('training'); time.sleep(0.2); progress.advance(steps=1)\n"
    )
    import sys

    terminal: Any = pexpect.spawn(sys.executable, ["-c", code], encoding="utf-8", dimensions=(24, 120), timeout=60)
    terminal.expect(pexpect.EOF)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.before)
    assert re.search(r"training .*━.* 3/4 steps, about \d s left", shown)
