"""A full disk, on a small real file system."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from studies import command, figures, smoke

#: Mounts a small file system in a private namespace, runs a study, frees space and runs it again.
SCRIPT = """
mount -t tmpfs -o size=24k tmpfs "$1" || exit 99
shift
"$@"; echo "first $?"
mount -o remount,size=10m tmpfs "$OUT"
"$@"; echo "second $?"
cp -r "$OUT"/runs "$KEPT"
"""


def can_mount() -> bool:
    if sys.platform != "linux" or shutil.which("unshare") is None:
        return False
    return (
        subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True).returncode == 0
    )


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="this user may not mount a file system of its own")
def test_a_full_disk_stops_the_study_and_loses_nothing(tmp_path: Path) -> None:
    study, out, kept = smoke(tmp_path, "gpt2-tiny"), tmp_path / "out", tmp_path / "kept"
    out.mkdir()
    kept.mkdir()
    run = ["unshare", "-rm", "sh", "-c", SCRIPT, "sh", str(out), *command("run", study, out)]
    ended = subprocess.run(run, capture_output=True, text=True, env={"OUT": str(out), "KEPT": str(kept), **os.environ})
    assert "first 2" in ended.stdout, ended.stderr
    assert f"The disk of {out} is full: free some space and repeat the command." in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "second 0" in ended.stdout, ended.stderr
    assert len(figures(study, kept)) == 4
