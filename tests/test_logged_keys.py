"""The page of logged keys names what a real fit logs, all of it and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from generated import LOGGING, glossary, keys, logged_keys
from lightning.pytorch.loggers import TensorBoardLogger
from pages import ROOT
from recipes_families import tiny
from support import Rows, TinyLM, fit, seeded
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from depthcb import DepthProfile, EqualStep, FreezeByChange, UpdateRatioMonitor
from depthcb.step_extras import EXTRAS
from depthcb_recipes import CausalLM, PackedText
from depthcb_recipes.backbones.loading import load_tokenizer
from depthcb_recipes.objectives.objective_distance_monitor import ObjectiveDistanceMonitor


def documented(*names: str) -> set[str]:
    return {key for file, name in LOGGING.items() if name in names for key in keys(file, name)}


def general(logged: set[str]) -> set[str]:
    """The keys of layer 0 and of the first measure, for those of all layers and measures."""
    without = {re.sub(r"/L\d+", "/L00", key).replace("cka_normalized", "cka") for key in logged}
    return {key for key in without if key not in ("epoch", "hp_metric", "step")}


def test_the_callbacks_log_what_the_page_says(tmp_path: Path) -> None:
    watch = DepthProfile(pretrained="cpu", null_draws=1, sites=("block", "attention", "mlp", "head"))
    callbacks = [EqualStep(), UpdateRatioMonitor(extras=EXTRAS), watch, FreezeByChange()]
    fit(seeded(TinyLM), callbacks, max_steps=4, val_check_interval=2, logger=TensorBoardLogger(tmp_path, "", ""))
    events = EventAccumulator(str(tmp_path)).Reload()
    logged = general({*events.Tags()["scalars"], *events.Tags()["images"]}) - {"train/loss", "val/loss"}
    expected = documented("DepthProfile", "EqualStep", "UpdateRatioMonitor", "FreezeByChange")
    expected |= {"depth/cka/slope_low", "depth/cka/slope_high"}  # which the row of the slope names
    assert {"slope_low", "slope_high"} <= set(re.findall(r"``(slope_\w+)``", logged_keys()))
    sites = {key for key in logged if re.match(r"depth/(attention|mlp)/cka/", key)}
    assert {key for key in sites if key.endswith("L00")} <= expected
    assert {re.sub("/(attention|mlp)/", "/", key) for key in sites} <= expected, "all of these for what a site writes"
    assert logged - sites == {key for key in expected if key not in sites}


@pytest.mark.filterwarnings("ignore:.*batch noise dominates.*")
def test_the_recipes_log_what_the_page_says(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("minilm")
    tiny("gpt2", "ForCausalLM", vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    data = PackedText(str(tmp_path), block_size=8, train_rows=8, val_rows=24, batch_size=4)
    rows = Rows()
    monitor = ObjectiveDistanceMonitor(most_batches=6, procrustes=True)
    fit(CausalLM(str(tmp_path)), [monitor], (data,), max_steps=1, val_check_interval=1, logger=rows)
    logged = general({key for row in rows.rows for key in row}) - {"val/perplexity"}
    expected = documented("Objective", "ObjectiveDistanceMonitor")
    distance = "depth/objective_distance"
    expected |= {f"{distance}_high", f"{distance}_procrustes_uncorrected/L00"}  # the rows of the others name them
    assert logged == expected


def test_generated_parts_are_on_their_pages() -> None:
    assert "<!-- generated: glossary -->" in (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    assert "<!-- generated: logged keys -->" in (ROOT / "docs" / "reference" / "keys.md").read_text(encoding="utf-8")
    assert "**undecided**" in glossary()
