"""A cache folder that cannot be written was a traceback, and in a study one failure per run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from depthcb.cli import main
from depthcb_recipes.backbones.pretraining import pretrain
from depthcb_recipes.backbones.zoo import ZOO
from depthcb_recipes.cache import CacheError, cache_folder, cached
from depthcb_recipes.studies.grid import RunConfig
from depthcb_recipes.studies.pool import Pool, run_study
from depthcb_recipes.studies.store import Store


@pytest.fixture
def no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Sets a file as the cache folder, and returns what is then said."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    folder = tmp_path / "file" / "depthcb"
    return f"The cache folder {folder} cannot be written (Not a directory): set XDG_CACHE_HOME to a folder that can."


def test_a_table_that_cannot_be_cached(no_folder: str) -> None:
    with pytest.raises(CacheError) as raised:
        cached(cache_folder() / "table.parquet", lambda: pa.table({"a": [1]}))
    assert str(raised.value) == no_folder


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # jsonargparse's own
@pytest.mark.parametrize(
    "arguments", [["pretrain", "--model", "gpt2-tiny"], ["fit", "--config", "causal_lm", "--model.backbone", "minilm"]]
)
def test_commands_say_so_in_one_sentence(
    arguments: list[str], no_folder: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"depthcb {arguments[0]}: {no_folder}"


@pytest.mark.slow
def test_a_study_stops_at_the_first_run(no_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is recorded: with another cache folder, the same command makes all runs."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "study"), prepend=os.pathsep)
    configs = [RunConfig("a", "causal_lm", "sgd", "standard", seed) for seed in range(2)]
    with pytest.raises(CacheError) as raised:
        run_study(configs, Store(tmp_path), Pool(1, runner="caching_runner"))
    assert str(raised.value) == no_folder
    assert not list(tmp_path.glob("runs/*/result.json"))


#: Mounts a read-only file system with this machine's models and texts in a private namespace.
READ_ONLY = """
mount -t tmpfs tmpfs "$XDG_CACHE_HOME" || exit 99
mkdir "$XDG_CACHE_HOME/depthcb" && cp -r "$FROM/corpus" "$FROM/mini-zoo" "$XDG_CACHE_HOME/depthcb"
mount -o remount,ro tmpfs "$XDG_CACHE_HOME" || exit 99
exec "$@"
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("unshare") is None, reason="needs Linux and unshare")
def test_a_cache_that_has_everything_need_not_be_writable(tmp_path: Path) -> None:
    folder = pretrain("gpt2-tiny", ZOO["gpt2-tiny"])
    run = [sys.executable, "-m", "depthcb", "pretrain", "--model", "gpt2-tiny"]
    variables = {**os.environ, "FROM": str(cache_folder()), "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", READ_ONLY, "sh", *run], capture_output=True, text=True, env=variables
    )
    if done.returncode == 99:
        pytest.skip("this user may not mount a file system of its own")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(tmp_path / "depthcb" / "mini-zoo" / folder.name)], "nothing is pretrained"
