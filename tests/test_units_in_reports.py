"""Step ratios of units smaller than layers: in loggers, records, the report and the terminal."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from offline import history
from rich.console import Console
from runs import changed, make_run
from support import TinyLM, fit, logged, seeded
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from depthcb import DepthProfile, EqualStep, UpdateRatioMonitor, report
from depthcb.report.charts import progress_chart, unit_heatmaps
from depthcb.report.groups import groups, layer_rows, replicates
from depthcb.report.static_figure import figure
from depthcb.run import Run, read_runs
from depthcb.unit_grid import UnitGrid

MATRICES = ["attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight", "vectors"]


def both() -> list[Any]:
    return [EqualStep(unit="matrix"), UpdateRatioMonitor(unit="group", extras=("grad_norm",)), DepthProfile()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a fit with validations after the steps 1 and 3."""
    at = tmp_path_factory.mktemp("units")
    loggers = [TensorBoardLogger(at, name="", version="tb"), CSVLogger(at, name="", version="csv")]
    fit(seeded(TinyLM), both(), logger=loggers, val_check_interval=2)
    loggers[1].save()
    return at


def test_loggers_that_draw_get_heatmaps_instead_of_hundreds_of_lines(folder: Path) -> None:
    events = EventAccumulator(str(folder / "tb"), size_guidance={"images": 0, "scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith(("equal_step", "update_ratio"))]
    assert sorted(tags) == ["equal_step/spread", "equal_step/target", "update_ratio/spread"]
    for name in ("equal_step", "update_ratio"):
        assert [image.step for image in events.Images(f"{name}/units")] == [1, 3]


def test_other_loggers_and_the_record_get_every_number(folder: Path) -> None:
    logger = CSVLogger(folder, name="", version="csv")
    text = Path(logger.log_dir, "metrics.csv").read_text().splitlines()
    names = text[0].split(",")
    for unit in MATRICES:
        assert f"equal_step/realised/L03/{unit}" in names
    assert "update_ratio/grad_norm/L00/attention" in names
    (run,) = read_runs(folder / "tb")
    assert run.step_ratio.units == tuple(f"L{i:02d}/{kind}" for i in range(4) for kind in MATRICES)
    assert run.step_ratio.steps == (0, 1, 2, 3)
    rows = [dict(zip(names, line.split(","), strict=True)) for line in text[1:]]
    rows = [row for row in rows if row["equal_step/target"]]
    for kind, ratios in (("realised", run.step_ratio), ("ratio", run.wanted_ratio)):
        table = [[float(row[f"equal_step/{kind}/{unit}"]) for unit in ratios.units] for row in rows]
        assert ratios.table == pytest.approx(np.array(table), rel=1e-12)
    assert run.step_ratio.spread == pytest.approx(1, abs=1e-4)
    assert not run.layer_ratio.units
    assert run.records["equal_step"].settings["unit"] == "matrix"
    assert run.records["equal_step"].settings["layers"] == run.layers


@pytest.mark.filterwarnings("ignore:.*legacy license classifiers.*")
def test_wandb_gets_a_heatmap(tmp_path: Path) -> None:
    settings = wandb.Settings(silent=True, console="off", mode="offline")
    logger = WandbLogger(project="p", save_dir=tmp_path, settings=settings)
    fit(seeded(TinyLM), both(), logger=logger, val_check_interval=2)
    logger.experiment.finish()
    rows = history(tmp_path)
    keys = {key for row in rows for key in row if key.startswith(("equal_step", "update_ratio")) and "units" not in key}
    assert keys == {"equal_step/spread", "equal_step/target", "update_ratio/spread"}
    for name in ("equal_step", "update_ratio"):
        drawn = [row for row in rows if f"{name}/units._type" in row]
        assert [row["trainer/global_step"] for row in drawn] == [1, 3]
        assert {row[f"{name}/units._type"] for row in drawn} == {"image-file"}


def test_a_missing_unit_is_a_gap_and_depth_orders_the_rest() -> None:
    """Units without an update have no column at first; they are sorted into their layer."""

    def late(found: dict[str, Any]) -> None:
        found["rows"] = [
            {"step": 0, "update_ratio/L01/mlp": 0.2, "update_ratio/spread": 1.0, "update_ratio/grad_norm/L01/mlp": 9.0},
            {"step": 1, "update_ratio/L00/mlp": 0.1, "update_ratio/L10/mlp": 0.4},
        ]

    run = changed(make_run(0, "SGD", "standard", 3, 2), "UpdateRatioMonitor", late)
    assert run.step_ratio.units == ("L00/mlp", "L01/mlp", "L10/mlp")
    assert run.step_ratio.ratios == ((None, 0.2, None), (0.1, None, 0.4))
    assert run.step_ratio.grid.layers == ("L00", "L01", "L10")


def finer(run: Run, unit: str = "matrix") -> Run:
    """The run with matrices in place of layers, at one step."""
    rng, equal = np.random.default_rng(3), run.control == "equal-step"
    prefix = "equal_step/ratio" if equal else "update_ratio"
    row = {f"{prefix}/L{i:02d}/{k}": float(10 ** rng.uniform(-4, -2)) for i in range(len(run.layers)) for k in MATRICES}

    def change(found: dict[str, Any]) -> None:
        found |= {"settings": {"unit": unit}, "rows": [{"step": 0, **row}]}

    return changed(run, "EqualStep" if equal else "UpdateRatioMonitor", change)


def pair(seed: int, unit: str) -> list[Run]:
    runs = [make_run(seed, "SGD", control, 6, 2) for control in ("standard", "equal-step")]

    def number(found: dict[str, Any]) -> None:
        found["provenance"]["seed"] = str(seed)

    runs = [changed(run, "DepthProfile", number) for run in runs]
    return [runs[0], finer(runs[1], unit) if unit != "layer" else runs[1]]


def test_only_pairs_of_the_same_unit_are_replicates() -> None:
    by_layer, by_matrix = ([run for seed in seeds for run in pair(seed, unit)] for seeds, unit in (((0, 1), "layer"), ((2, 3), "matrix")))  # fmt: skip
    found = replicates(groups([*by_layer, *by_matrix]))
    assert [len(same.pairs) for same in found] == [2, 2]
    assert [{p.runs[1].controlled.get("unit") for p in same.pairs} for same in found] == [{None}, {"matrix"}]


def test_reports_draw_layer_by_kind(tmp_path: Path) -> None:
    runs = [finer(make_run(0, "SGD", "standard", 6, 3)), make_run(1, "SGD", "equal-step", 6, 3)]
    (group,) = groups(runs)
    (trace,) = unit_heatmaps(group).data
    grid = UnitGrid.of({k.removeprefix("update_ratio/"): v for k, v in runs[0].records["update_ratio"].rows[0].items() if "L" in k})  # fmt: skip
    assert 10 ** np.array(trace.z, dtype=float) == pytest.approx(grid.values, rel=1e-9)
    assert list(trace.x) == ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "vectors"]
    lines = [line for line in progress_chart(group).data if line.xaxis == "x2"]
    assert {len(line.y) for line in lines} == {6}, "only the run by layer is a line over layers"
    assert all(row[-3] == "\N{EN DASH}" != row[-2] for row in layer_rows(group, group.measures))
    heatmap = figure(runs).subfigs[0].axes[3]  # after two measures and the ratio by layer
    assert np.allclose(heatmap.images[0].get_array(), grid.values)
    report.write_html(runs, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "Mean step ratio inside the layers" in page
    assert report.read_html(tmp_path / "page.html")[0].unit_ratio.units == runs[0].unit_ratio.units


def test_show_prints_the_extremes_of_each_kind() -> None:
    run = finer(make_run(0, "SGD", "standard", 6, 3))
    console = Console(width=80, record=True, file=io.StringIO())
    report.print_bars(run, console)
    text, grid = console.export_text(), run.unit_ratio.grid
    for kind, ratios in zip(grid.labels, grid.values.T, strict=True):
        low, high = int(ratios.argmin()), int(ratios.argmax())
        cells = [kind, f"{ratios[low]:.3g}", f"L{low:02d}", f"{ratios[high]:.3g}", f"L{high:02d}"]
        assert re.search(r"\s+".join(map(re.escape, cells)), text)


def test_the_page_says_how_far_matrices_are_apart_inside_equal_layers(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    fit(seeded(TinyLM), [EqualStep(), DepthProfile()], logger=logger)
    (run,) = read_runs(tmp_path)
    rows = [row for row in logged(logger) if "equal_step/target" in row]
    spreads = [np.mean([row[f"equal_step/matrix_spread/L0{i}"] for row in rows]) for i in range(4)]
    assert run.matrix_spread == pytest.approx(spreads, rel=1e-12)
    report.write_html([run], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert ">matrix spread, " in page
    assert all(f"<td>{spread:.3g}</td>" in page for spread in spreads)
