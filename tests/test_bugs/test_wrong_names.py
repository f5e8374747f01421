"""A misspelt name is answered at once, with the names that there are."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch import nn

from depthcb import DepthProfile, LayerStack, Profile, depth_profile
from depthcb.cli import main
from depthcb.engine import ProfileRecorder
from depthcb_recipes.backbones.loading import load_backbone


def said(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    assert main(argv) == 2
    told = capsys.readouterr()
    return told.out, told.err


def test_a_misspelt_backbone_is_not_looked_for_on_the_hub() -> None:
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"'gpt2-mni' is unknown: did you mean 'gpt2-mini'\?"):
        load_backbone("gpt2-mni")
    assert time.perf_counter() - start < 1


def test_one_wrong_backbone_does_not_hide_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = said(["backbones", "minilm", "gpt2-mni", "neox-mimi"], capsys)
    assert "encoder" in out
    assert "did you mean 'gpt2-mini'?" in err
    assert "did you mean 'neox-mini'?" in err


@pytest.mark.parametrize("argv", [["--config", "causal_ml"], ["--config=causal_ml"]])
def test_configurations_are_listed(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        "There is no configuration 'causal_ml': name a YAML file, or one of causal_lm,"
        in said(["fit", *argv], capsys)[1]
    )


def test_studies_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    told = said(["study", "status", "minni"], capsys)[1]
    assert "There is no study 'minni': name a YAML file, or one of mini, mini-smoke, paper," in told


def test_rows_are_checked_at_construction() -> None:
    with pytest.raises(ValueError, match="rows='meen' is unknown: use one of"):
        DepthProfile(rows="meen")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="probe_rows=3: a comparison needs at least 4"):
        ProfileRecorder(probe_rows=3)


def test_rows_of_a_dataset_are_to_be_collated() -> None:
    model, rows = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), list(torch.randn(8, 4))
    with pytest.raises(ValueError, match=r"collate them with torch.utils.data.default_collate\(rows\)"):
        depth_profile(model, model, rows)
    assert depth_profile(model, model, torch.utils.data.default_collate(rows))["cka"].change == (0.0, 0.0)


def test_rival_stacks_stand_one_per_line_with_the_argument_to_copy() -> None:
    towers = nn.ModuleDict({name: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)) for name in ("image", "text")})
    with pytest.raises(ValueError, match="2 equally plausible stacks") as error:
        LayerStack.find(towers)
    lines = str(error.value).splitlines()[1:]
    assert [line.partition(":")[0] for line in lines] == ["  layers='text'", "  layers='image'"]
    assert LayerStack.find(towers, "text").names == ("text.0", "text.1")


def test_a_profile_is_printed_in_one_line(tmp_path: Path) -> None:
    profile = Profile((0.0, 0.1, 0.2), ("a", "b", "c"), "cka", step=7, rows=9, slope_interval=(0.1, 0.3))
    assert str(profile) == "<Profile cka at step 7, 3 layers, 9 rows: slope +0.2 [+0.1, +0.3], mean 0.1>"
