"""Figures for papers: their sizes, letters and fonts, and the numbers beside them."""

from __future__ import annotations

import csv
import dataclasses
import re
import struct
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from runs import changed, make_run, make_runs
from scipy import stats

from depthcb import report
from depthcb.cli import main
from depthcb.report.paper_figure import _RC, FORMATS, KINDS, draw_figure, panels_of
from depthcb.run import FOLDER, Run, write_header, write_row


def seeds(count: int = 4, backbones: tuple[str, ...] = ("gpt2-mini", "bert-mini")) -> list[Run]:
    """Pairs of several networks and seeds."""

    def given(run: Run, backbone: str, seed: int) -> Run:
        def change(record: dict[str, Any]) -> None:
            record["provenance"]["seed"] = str(seed)
            record["fit"]["hparams"] = {"lr": 0.1, "data_seed": seed, "backbone": backbone}

        return dataclasses.replace(changed(run, "DepthProfile", change), name=f"{backbone}-{run.name}-{seed}")

    return [
        given(make_run(100 * n + 10 * seed + i, "SGD", control, 6, 4), backbone, seed)
        for n, backbone in enumerate(backbones)
        for seed in range(count)
        for i, control in enumerate(("standard", "equal-step"))
    ]


def runs_for(kind: str, layers: int = 12) -> list[Run]:
    return seeds() if kind == "study" else make_runs(layers, (8, 8), arms=2)


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_width_is_a_column_of_a_journal_and_the_fonts_are_there(kind: Any, columns: int, tmp_path: Path) -> None:
    inches = {1: 3.3, 2: 6.9}[columns]
    for ending in FORMATS:
        report.write_figure(runs_for(kind), kind, tmp_path / f"a.{ending}", columns=columns)
    pdf = (tmp_path / "a.pdf").read_bytes()
    box = re.search(rb"/MediaBox \[ 0 0 ([\d.]+) ", pdf)
    assert box is not None
    assert float(box[1]) == pytest.approx(72 * inches)
    assert b"/FontFile2" in pdf
    assert b"/CIDFontType2" in pdf
    assert b"/Subtype /Type3" not in pdf
    svg = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert f'width="{72 * inches:g}pt"' in svg
    assert "<text" in svg, "letters stay letters"
    png = (tmp_path / "a.png").read_bytes()
    assert struct.unpack(">I", png[16:20]) == (round(300 * inches),)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("columns", "layers"), [(1, 6), (1, 48), (2, 30)])
def test_letters_have_7_or_8_points_and_do_not_touch(kind: Any, columns: int, layers: int) -> None:
    with matplotlib.rc_context(_RC):
        fig = draw_figure(panels_of(runs_for(kind, layers), kind), columns, study=kind == "study")
        FigureCanvasAgg(fig).draw()
        page, boxes = fig.bbox, {}
        for text in fig.findobj(Text):
            assert isinstance(text, Text)
            if text.get_text() and text.get_visible() and (box := text.get_window_extent()).width:
                assert text.get_fontsize() in (7, 8), text
                if _shown(text, fig):
                    boxes[text] = box
    assert len(boxes) > 8
    for text, box in boxes.items():
        assert page.x0 - 1 <= box.x0, text
        assert box.x1 <= page.x1 + 1, text
        assert not any(box.overlaps(other) for them, other in boxes.items() if them is not text), text


def _shown(text: Text, fig: Any) -> bool:
    """Whether a label of a tick lies within its axis; matplotlib keeps others and does not draw them."""
    for ax in fig.axes:
        for axis, limits in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
            for tick in axis.get_major_ticks():
                if text in (tick.label1, tick.label2):
                    return bool(min(limits) <= tick.get_loc() <= max(limits)) and text.get_visible()
    return True


def test_beside_a_pair_lie_its_numbers(tmp_path: Path) -> None:
    runs = make_runs(6, (8, 8), arms=2)
    found = rows_of(report.write_figure(runs, "pair", tmp_path / "a.pdf"))

    def column(title: str, series: str, name: str = "y") -> list[float]:
        return [float(row[name]) for row in found if row["panel"] == title and row["series"] == series]

    for run in runs:
        last = run.profiles["cka"][-1]
        assert last.band is not None
        assert column("change, with 95 % band", run.control) == list(last.change)
        assert column("change, with 95 % band", run.control, "low") == list(last.band[0])
        assert column("change, with 95 % band", run.control, "high") == list(last.band[1])
        assert column("mean step ratio", run.control) == run.step_ratio.mean
        shape = np.array(column("shape of change", run.control))
        assert np.allclose(shape, np.array(last.change) / np.mean(last.change), rtol=1e-14)
        assert np.polyfit(np.linspace(0, 1, 6), shape, 1)[0] == pytest.approx(last.relative_slope)
        draws = np.array([p.change for p in run.null["cka"]])
        draws /= draws.mean(axis=1, keepdims=True)
        name = f"null of {run.control} (same weight change)"
        assert np.allclose(column("shape of change", name), draws.mean(axis=0), rtol=1e-14)
        assert np.allclose(column("shape of change", name, "high"), draws.max(axis=0), rtol=1e-14)
    other = rows_of(report.write_figure(runs, "pair", tmp_path / "b.pdf", measure="cka_normalized"))
    assert other[0]["y_axis"] == runs[0].profiles["cka_normalized"][-1].unit


def test_beside_an_evolution_lie_all_validations(tmp_path: Path) -> None:
    runs = make_runs(6, (8, 8), arms=2)
    found = rows_of(report.write_figure(runs, "evolution", tmp_path / "a.svg"))
    for run in runs:
        for profile in run.profiles["cka"]:
            drawn = [r for r in found if r["panel"] == run.control and r["series"] == f"step {profile.step}"]
            assert [float(row["y"]) for row in drawn] == list(profile.change)


def test_a_studys_means_have_students_intervals(tmp_path: Path) -> None:
    runs = seeds()
    found = rows_of(report.write_figure(runs, "study", tmp_path / "a.pdf"))
    for control in ("standard", "equal-step"):
        for backbone in ("gpt2-mini", "bert-mini"):
            slopes = [
                run.profiles["cka"][-1].relative_slope
                for run in runs
                if run.control == control and run.name.startswith(backbone)
            ]
            dots = [r for r in found if r["series"] == f"{control}, each seed" and r["x"] == backbone]
            assert [float(row["y"]) for row in dots] == slopes
            (mean,) = [r for r in found if r["series"] == f"{control}, mean with 95 % interval" and r["x"] == backbone]
            low, high = stats.t.interval(0.95, 3, np.mean(slopes), stats.sem(slopes))  # type: ignore[arg-type]
            assert [float(mean[k]) for k in ("y", "low", "high")] == pytest.approx([np.mean(slopes), low, high])  # type: ignore[arg-type]


def test_step_ratios_have_whole_decades_in_every_figure() -> None:
    for runs in (make_runs(6, (8, 8), arms=2), make_runs(6)[2:]):
        with matplotlib.rc_context(_RC):
            fig = draw_figure(panels_of(runs, "pair"), 2)
            axis = fig.axes[2]
            assert axis.get_yscale() == "log"
            ends = np.log10(axis.get_ylim())
            assert np.allclose(ends, np.round(ends))
            ratios = [r for run in runs for r in run.step_ratio.mean if r]
            assert axis.get_ylim()[0] <= min(ratios) <= max(ratios) <= axis.get_ylim()[1]
            labelled = [y for y, t in zip(axis.get_yticks(), axis.get_yticklabels(), strict=True) if t.get_text()]
            assert labelled == [10.0**e for e in range(round(ends[0]), round(ends[1]) + 1)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The records of four seeds of a pair on disk."""
    for run in seeds(4, ("gpt2-mini",)):
        for name, record in run.records.items():
            at = tmp_path / "runs" / run.name
            write_header(at, name, record.callback, 0, record.settings, record.fit)
            for row in record.rows:
                write_row(at, name, row)
            write_row(at, name, {"step": 1, "end": record.end or {}})
            path = at / FOLDER / f"{name}.jsonl"
            seed = f'"seed": "{record.provenance["seed"]}"'
            path.write_text(re.sub(r'"seed": (null|"\d+")', seed, path.read_text()))
    return tmp_path


def test_the_command(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(folder)
    assert main(["figure", "runs", "--kind", "study", "--columns", "1", "--output", "a.pdf"]) == 0
    assert capsys.readouterr().out == "a.pdf, its numbers in a.csv\n"
    assert Path("a.pdf").read_bytes().startswith(b"%PDF")
    assert {row["x"] for row in rows_of(Path("a.csv"))} == {"SGD, 4 pairs (seeds 0, 1, 2, 3)"}
    names = [f"runs/gpt2-mini-sgd-{control}-0" for control in ("standard", "equal-step")]
    assert main(["figure", *names, "--kind", "pair", "--format", "svg", "--output", "b"]) == 0
    assert "<svg" in Path("b").read_text()
    wrong = {
        "--output c": "its name says no format: end it in .pdf, .svg or .png",
        "--output c.pdf --measure cca": "no run measured 'cca': choose one of cka, cka_normalized",
        "--output c.pdf --kind pair": "have 4 pairs (SGD, seed 0; SGD, seed 1; ",
        "--output no/c.pdf": "--output no/c.pdf cannot be written (No such file or directory)",
    }
    capsys.readouterr()
    for options, message in wrong.items():
        assert main(["figure", "runs", *options.split()]) == 2
        assert message in capsys.readouterr().err
    assert not Path("c.csv").exists()


def test_runs_with_nothing_to_show_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no depth profile was measured in these runs"):
        report.write_figure(make_runs(validations=(0,), arms=1), "profile", tmp_path / "a.pdf")
    with pytest.raises(ValueError, match="no finished pair of a standard and an equal-step run"):
        report.write_figure(make_runs(arms=1), "study", tmp_path / "a.pdf")
    with pytest.raises(ValueError, match="16 runs are too many for one figure"):
        report.write_figure(seeds(), "evolution", tmp_path / "a.pdf")


def test_a_figure_is_the_same_again(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    for name in ("a.pdf", "b.pdf", "a.svg", "b.svg"):
        report.write_figure(make_runs(6, (8, 8), arms=2), "pair", tmp_path / name)
    assert (tmp_path / "a.pdf").read_bytes() == (tmp_path / "b.pdf").read_bytes()
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert dict(matplotlib.rcParams) == before
