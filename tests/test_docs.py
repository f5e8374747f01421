"""Everything the documentation refers to exists, and every block of code in it runs or is parsed."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from pages import PAGES, ROOT, Block, blocks, commands, write_files
from support import TinyLM, loaders, texts
from torch.utils.data import DataLoader

import depthcb
from depthcb import DepthProfile, EqualStep, UpdateRatioMonitor
from depthcb.cli import parser
from depthcb.report.groups import conclusions
from depthcb.run import read_runs
from depthcb_recipes.studies.grid import load_study

#: Files that are not run here: another test runs all of that page, or it takes several processes.
ELSEWHERE = {"own-package.md", "fsdp.md"}
WITH_PYTHON = sorted({block.page for block in blocks(*PAGES) if block.language == "python"})
SHELL = [block for block in blocks(*PAGES) if block.language == "bash"]


class Data(pl.LightningDataModule):
    """What a reader's own module is trained on."""

    def train_dataloader(self) -> Any:
        return loaders(count=16)[0]

    def val_dataloader(self) -> Any:
        return loaders()[1]


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that blocks take for granted, in an empty folder; and Trainers that are short and silent."""
    monkeypatch.chdir(tmp_path)
    short = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False,
             "enable_checkpointing": False, "num_sanity_val_steps": 0, "log_every_n_steps": 1}  # fmt: skip
    trainer = functools.partial(pl.Trainer, **short, max_steps=4, check_val_every_n_epoch=1)
    monkeypatch.setattr(pl, "Trainer", functools.partial(pl.Trainer, **short))
    return {
        "__name__": "page", "pl": pl, "Trainer": functools.partial(trainer, logger=CSVLogger("logs")), "torch": torch,
        "DepthProfile": functools.partial(DepthProfile, null_draws=1), "EqualStep": EqualStep, "UpdateRatioMonitor": UpdateRatioMonitor,
        "CSVLogger": CSVLogger, "DataLoader": DataLoader, "depthcb": depthcb, "MyModule": functools.partial(TinyLM, layers=2), "MyData": Data,
        "batch": next(iter(loaders()[1])), "dataset": texts(), "texts": loaders()[1],
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.name)
def test_the_python_of_a_page_runs_from_top_to_bottom(page: Path, reader: dict[str, Any]) -> None:
    if page.name == "loggers.md":  # it reads a run that the reader has made
        fit = pl.Trainer(max_steps=2, val_check_interval=1, callbacks=[DepthProfile()], logger=CSVLogger("runs"))
        fit.fit(TinyLM(), *loaders())
    for block in blocks(page):
        if block.language == "python":
            code = compile("\n" * (block.line - 1) + block.text, page, "exec")
            if runs(block):
                exec(code, reader)
    if page.name == "verdict.md":
        (found,) = conclusions(read_runs("runs"))["verdicts"]
        assert set(found["verdicts"]) == {"cka", "cka_normalized"}, "the word that the page promises"


@pytest.mark.filterwarnings("ignore")
def test_the_script_of_the_readme_prints_what_it_says(
    reader: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """To the digits that do not depend on the machine."""
    script, output = (
        next(b for b in blocks(ROOT / "README.md") if b.language == language) for language in ("python", "text")
    )
    exec(compile(script.text, "README.md", "exec"), reader)
    said, promised = (
        [line for line in text.splitlines() if "<Profile" in line] for text in (capsys.readouterr().out, output.text)
    )
    for line, expected in zip(said, promised, strict=True):
        number = r"[-+]?\d+(?:\.\d+)?"
        assert re.sub(number, "", line) == re.sub(number, "", expected)
        numbers = [[float(n) for n in re.findall(number, text)] for text in (line, expected)]
        assert numbers[0] == pytest.approx(numbers[1], rel=0.02)


def runs(block: Block) -> bool:
    """Whether a block is run, and not only parsed. In the README, those that begin with an import are whole scripts."""
    if block.page.name == "README.md":
        return block.text.startswith("import ")
    return not block.parsed_only and block.page.name not in ELSEWHERE


def test_few_blocks_are_parsed_only() -> None:
    only = [block.name for block in blocks(*PAGES) if block.parsed_only]
    assert len(only) < 10, "a block that is not run is a promise that is not kept"


@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.name)
def test_every_command_is_one_that_there_is(block: Block) -> None:
    for own in commands(block.text):
        args, rest = parser().parse_known_args(own)
        assert args.takes_options or not rest, own


def test_commands_are_found_in_every_kind_of_line() -> None:
    text = "A=1 depthcb show x  # a word\nsbatch --wrap 'depthcb study run paper --jobs 1'\npip install . && depthcb report \\\n  y\n"
    assert commands(text) == [["show", "x"], ["study", "run", "paper", "--jobs", "1"], ["report", "y"]]


def test_only_what_can_be_installed_is_told_to_be_installed() -> None:
    """Nothing is on PyPI: a clone is installed."""
    on_site = [block for block in SHELL if block.page.is_relative_to(ROOT / "docs")]
    lines = [line for block in on_site for line in block.text.splitlines() if "pip install" in line]
    assert len(lines) > 3
    assert [line for line in lines if re.search(r"install (-\S+ )*'?depthcb", line)] == []


@pytest.mark.slow
@pytest.mark.parametrize("title", ["my-study.yaml", "study.yaml"])
def test_every_study_of_a_page_can_be_read(title: str, tmp_path: Path) -> None:
    (block,) = [block for block in blocks(*PAGES) if block.title == title]
    write_files(block.page, tmp_path)
    assert load_study(tmp_path / title).runs


def test_every_test_and_file_that_the_method_names_exists() -> None:
    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    tests = re.findall(r"`([\w/]+\.py)::(\w+)`", text)
    assert len(tests) > 25
    for file, name in tests:
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"{file}::{name}"
    files = re.findall(r"\| `((?:depthcb_recipes/)?[\w/]+\.py)` \|", text)
    assert len(files) > 15
    for file in files:
        room = ROOT / "recipes" if file.startswith("depthcb_recipes/") else ROOT / "depthcb"
        assert (room / file).is_file(), file
