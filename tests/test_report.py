"""The report's files and tables, for complete and interrupted runs, paired and unpaired."""

from __future__ import annotations

import dataclasses
import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from report_cases import CASES, printed
from runs import MEASURES, changed, make_run, make_runs

from depthcb import report
from depthcb.glossary import VERDICTS
from depthcb.report.charts import heatmaps, profile_chart, progress_chart, ratio_heatmaps
from depthcb.report.groups import conclusions, groups, replicates, verdict_lines
from depthcb.run import Record, Run
from depthcb.style import MISSING
from depthcb.verdict import judge

#: The record of a control none of whose steps was logged.
EMPTY = Record("EqualStep", {}, {}, {"seed": "0"})
HOSTILE = "</script><script>alert('$x_1$')</script>[bold]&<!--"


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def runs(request: pytest.FixtureRequest) -> list[Run]:
    return make_runs(**request.param)


class Page(HTMLParser):
    """What a page shows and what its tags could load."""

    LOADERS = ("src", "href", "action", "data", "srcset", "poster", "formaction", "background")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.shown: list[str] = []
        self.styles = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [str(value) for name, value in attrs if name in self.LOADERS]
        self.styles += "".join(str(value) for name, value in attrs if name == "style")

    def handle_data(self, data: str) -> None:
        if self.lasttag == "style":
            self.styles += data
        elif self.lasttag != "script":
            self.shown.append(data)


def page(runs: list[Run], folder: Path) -> str:
    report.write_html(runs, folder / "a.html")
    return (folder / "a.html").read_text(encoding="utf-8")


def panels(runs: list[Run]) -> list[list[Axes]]:
    """The figure's axes, one row per group."""
    return [list(sub.axes) for sub in report.figure(runs).subfigs]


def test_files_are_written_and_the_runs_come_back(runs: list[Run], tmp_path: Path) -> None:
    before = json.dumps([run.to_dict() for run in runs])
    report.write_png(runs, tmp_path / "a.png")
    page(runs, tmp_path)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert json.dumps([run.to_dict() for run in report.read_html(tmp_path / "a.html")]) == before


def test_the_page_loads_nothing(runs: list[Run], tmp_path: Path) -> None:
    text = page(runs, tmp_path)
    found = Page(text)
    assert found.loads == []
    assert not {"link", "iframe", "object", "embed", "base", "img"} & set(found.tags)
    assert "@import" not in found.styles
    assert "url(" not in found.styles
    assert re.search(r"Content-Security-Policy\" content=\"default-src 'none'", text)
    assert "cdn.plot.ly/plotly" not in re.sub(r"<script>.*?</script>", "", text, flags=re.S)


def test_hostile_names_are_shown_and_never_run(tmp_path: Path) -> None:
    def poison(record: dict[str, Any]) -> None:
        record["settings"][HOSTILE] = record["fit"]["module"] = HOSTILE

    hostile = [changed(run, "DepthProfile", poison) for run in make_runs(name=HOSTILE + "{}")]
    hostile[0] = dataclasses.replace(hostile[0], name=HOSTILE)
    report.write_png(hostile, tmp_path / "a.png", HOSTILE)
    expected, found = Page(page(make_runs(), tmp_path)), Page(page(hostile, tmp_path))
    assert found.tags.count("script") == expected.tags.count("script")
    assert "<script>alert" not in (tmp_path / "a.html").read_text(encoding="utf-8")
    assert found.shown.count(HOSTILE + "3") == 2, "once in the table of each pair"
    assert HOSTILE in found.shown
    assert report.read_html(tmp_path / "a.html") == hostile
    assert "[bold]" in printed(hostile[:1])
    assert "[bold]" in printed(hostile, bars=True)


def test_a_page_without_runs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text("<html></html>")
    with pytest.raises(ValueError, match=r"a\.html is not a depthcb report"):
        report.read_html(tmp_path / "a.html")


@pytest.mark.parametrize("layers", [6, 12, 30, 48])
def test_the_page_tells_the_numbers(layers: int, tmp_path: Path) -> None:
    runs = make_runs(layers)
    shown = set(Page(page(runs, tmp_path)).shown)
    for run in runs:
        for measure in MEASURES:
            last = run.profiles[measure][-1]
            assert last.slope_interval is not None
            low, high = last.slope_interval
            assert {f"{c:.3g}" for c in last.change} <= shown
            assert {f"{last.slope:+.3g}", f"[{low:+.3g}, {high:+.3g}]", f"{last.width:.3g}"} <= shown
        assert {f"{r:.3g}" for r in run.step_ratio.mean} <= shown
    assert {"2.5 !", "2.13.0", "0f" * 32, "adamw-standard", "CausalLM", "160"} <= shown


def test_settings_that_differ_come_first_and_are_marked(tmp_path: Path) -> None:
    def slower(record: dict[str, Any]) -> None:
        record["fit"]["optimizers"][0]["lr"] = 5e-5

    first, second = make_runs(arms=1)[0], changed(make_runs(arms=1)[0], "DepthProfile", slower)
    text = page([first, dataclasses.replace(second, name="slower")], tmp_path)
    rows = re.findall(r"<tr( class=\"differs\")?><td class=\"text\">([^<]*)</td>", text.split('class="settings"')[1])
    assert rows[0] == (' class="differs"', "optimizers.lr")
    assert [name for mark, name in rows if mark] == ["optimizers.lr"]
    assert "no verdict" not in text, "two standard runs are no pair"


def test_runs_pair_up_by_all_but_the_control() -> None:
    runs = make_runs()
    pairs = groups(runs)
    assert [(g.title, g.paired, [run.control for run in g.runs]) for g in pairs] == [
        ("AdamW", True, ["standard", "equal-step"]),
        ("SGD", True, ["standard", "equal-step"]),
    ]
    assert [[run.name for run in g.runs] for g in groups(runs[::-1])] == [
        ["sgd-standard", "sgd-equal-step"],
        ["adamw-standard", "adamw-equal-step"],
    ]

    def other_seed(record: dict[str, Any]) -> None:
        record["provenance"]["seed"] = "1"

    (rest,) = groups([runs[0], changed(runs[1], "DepthProfile", other_seed)])
    assert (rest.paired, rest.comparison, len(rest.runs)) == (False, None, 2)


def seeds_of(count: int) -> list[Run]:
    """Pairs under SGD that differ only in their seed."""

    def seeded(run: Run, seed: int) -> Run:
        def change(record: dict[str, Any]) -> None:
            record["provenance"]["seed"] = str(seed)
            record["settings"]["probe_hash"] = f"{seed:064d}"
            record["fit"]["hparams"] = {"lr": 0.1, "data_seed": seed}

        return dataclasses.replace(changed(run, "DepthProfile", change), name=f"{run.name}-{seed}")

    return [
        seeded(make_run(10 * seed + i, "SGD", control, 8, 4), seed)
        for seed in range(count)
        for i, control in enumerate(("standard", "equal-step"))
    ]


def test_pairs_of_four_seeds_have_a_verdict(tmp_path: Path) -> None:
    runs = seeds_of(4)
    found = groups(runs)
    assert [g.title for g in found] == [f"SGD, seed {seed}" for seed in range(4)]
    (four,) = replicates(found)
    slopes = [
        [run.profiles["cka"][-1].relative_slope for run in runs if run.control == c] for c in ("standard", "equal-step")
    ]
    expected = judge(*slopes)  # type: ignore[arg-type]
    assert four.verdicts["cka"] == expected
    assert list(four.verdicts) == list(MEASURES)
    title, *lines = verdict_lines(four)
    assert title.startswith(f"SGD, 4 pairs (seeds 0, 1, 2, 3): {expected.word}")
    assert any(expected.reason in line for line in lines)
    text = " ".join(printed(runs).split())
    shown = page(runs, tmp_path)
    for line in (title, *lines):
        assert line in text
        assert html.escape(line) in shown
    said = json.loads(json.dumps(conclusions(runs)))
    assert said["verdicts"][0]["verdicts"]["cka"]["word"] == expected.word
    assert len(said["pairs"]) == 4


def test_fewer_seeds_have_no_verdict(tmp_path: Path) -> None:
    (three,) = replicates(groups(seeds_of(3)))
    assert verdict_lines(three) == ["SGD, 3 pairs (seeds 0, 1, 2): no verdict (it needs at least 4 seeds)"]
    assert replicates(groups(seeds_of(1))) == []
    text = page(seeds_of(1), tmp_path)
    assert "one pair: this speaks of its probe rows, not of training" in text
    assert not any(f": {word}" in text for word in VERDICTS)


def test_other_settings_are_no_replicates() -> None:
    def faster(record: dict[str, Any]) -> None:
        record["fit"]["hparams"] = {"lr": 0.2}

    runs = seeds_of(4)
    runs[-2:] = [changed(run, "DepthProfile", faster) for run in runs[-2:]]
    (three,) = replicates(groups(runs))
    assert len(three.pairs) == 3


def test_runs_of_any_number_and_depth_share_a_chart(tmp_path: Path) -> None:
    runs = [dataclasses.replace(make_run(i, "AdamW", "standard", 6 + i, 3), name=f"run{i}") for i in range(10)]
    (group,) = groups(runs)
    chart = profile_chart(group)
    lines = [trace for trace in chart.data if trace.mode == "lines+markers"]
    assert {len(line.x) for line in lines} == set(range(6, 16))
    assert {line.x[-1] for line in lines} == {1.0}, "layers of models of different depth stand at their relative depth"
    looks = {(line.line.color, line.line.dash) for line in lines}
    assert len(looks) == 10
    page(runs, tmp_path)
    printed(runs)


def test_runs_without_a_null_are_drawn_too(tmp_path: Path) -> None:
    runs = [Run(run.name, {k: r for k, r in run.records.items() if k != "null"}) for run in make_runs(arms=2)]
    steps = profile_chart(groups(runs)[0]).layout.sliders[0].steps
    assert [len(step.args[0]["y"]) for step in steps] == [8] * 8, "band and change of two runs by two measures"
    report.write_png(runs, tmp_path / "a.png")
    shown = html.unescape(page(runs, tmp_path))
    assert "Shape of the latest profile" not in shown
    assert "null of standard: not measured: DepthProfile(pretrained='cpu') measures it" in shown
    assert "whether noise alone would give the standard slope was not measured" in shown
    assert f"null relative slope {MISSING}" in printed(runs)


def test_the_slider_holds_every_validation() -> None:
    standard, equal, *_ = runs = make_runs(12, (8, 5, 0, 0))
    chart = profile_chart(groups(runs)[0])
    steps = chart.layout.sliders[0].steps
    assert [s.label for s in steps] == [str(20 * (i + 1)) for i in range(8)]
    for i, step in enumerate(steps):
        ys = step.args[0]["y"]  # band and change for two runs and two measures
        assert ys[1] == standard.profiles["cka"][i].change
        assert list(ys[3]) == (list(equal.profiles["cka"][i].change) if i < 5 else [None] * 12)
        assert ys[5] == standard.profiles["cka_normalized"][i].change
    assert [list(t.y) for t in chart.data] == [list(y) for y in steps[-1].args[0]["y"]]


def test_a_very_long_run_is_thinned_in_pictures_and_whole_in_the_data(tmp_path: Path) -> None:
    run = make_run(0, "AdamW", "standard", 4, 400)
    (group,) = groups([run])
    steps = [int(s.label) for s in profile_chart(group).layout.sliders[0].steps]
    assert (len(steps), steps[0], steps[-1]) == (100, 20, 8000)
    assert [len(trace.x) for trace in heatmaps(group).data] == [300, 300]
    page([run], tmp_path)
    assert report.read_html(tmp_path / "a.html") == [run]


def test_charts_over_time_hold_the_data() -> None:
    runs = make_runs(6, (8, 8), arms=2)
    (group,) = groups(runs)
    for trace, (run, measure) in zip(heatmaps(group).data, [(r, m) for r in runs for m in MEASURES], strict=True):
        assert [tuple(column) for column in zip(*trace.z, strict=True)] == [p.change for p in run.profiles[measure]]
        assert list(trace.x) == [str(p.step) for p in run.profiles[measure]]
    for trace, run in zip(ratio_heatmaps(group).data, runs, strict=True):
        shown = [[cell[1] for cell in row] for row in trace.customdata]
        assert [tuple(column) for column in zip(*shown, strict=True)] == list(run.step_ratio.ratios)
        assert np.allclose(np.array(trace.z, dtype=float), np.log10(np.array(run.step_ratio.ratios, dtype=float).T))
    lines = {(t.name, t.xaxis): list(t.y) for t in progress_chart(group).data if t.mode == "lines+markers"}
    for run in runs:
        assert lines[run.control, "x"] == [p.slope for p in run.profiles["cka"]]
        assert lines[run.control, "x2"] == run.step_ratio.mean
        assert lines[run.control, "x3"] == [loss for _, loss in run.metrics["val/loss"]]


@pytest.mark.parametrize("layers", [6, 48, *(pytest.param(n, marks=pytest.mark.slow) for n in (12, 30))])
def test_the_figure_holds_the_data(layers: int) -> None:
    runs = make_runs(layers)
    for row, (axes, group) in enumerate(zip(panels(runs), groups(runs), strict=True)):
        for ax, below, measure in zip(axes, axes[3:], MEASURES, strict=False):
            last = [run.profiles[measure][-1] for run in group.runs]
            assert [list(line.get_ydata()) for line in ax.lines] == [list(p.change) for p in last]
            assert ax.get_ylim()[0] <= 0
            for drawn, profile in zip(ax.collections, last, strict=True):
                edges, band = drawn.get_paths()[0].vertices[:, 1], profile.band
                assert band is not None
                assert (edges.min(), edges.max()) == (min(band[0]), max(band[1]))
            shapes = [
                y for run, p in zip(group.runs, last, strict=True) for y in (relative(p.change), null(run, measure))
            ]
            assert np.allclose([line.get_ydata() for line in below.lines], shapes, rtol=1e-12)
            assert below.get_ylabel() == "change / its mean"
        assert [list(line.get_ydata()) for line in axes[2].lines] == [run.step_ratio.mean for run in group.runs]
        assert axes[2].get_yscale() == "log"
        assert axes[2].get_ylim() == panels(runs)[0][2].get_ylim(), "one rule for all rows"
        assert group.comparison is not None
        title = report.figure(runs).subfigs[row].get_suptitle()
        assert f"standard relative slope {group.comparison.difference} (" in title
        assert f"; the control removed a step-ratio spread of {group.spread:.3g}x" in title


def relative(change: Any) -> Any:
    return np.array(change) / np.mean(change)


def null(run: Run, measure: str) -> Any:
    return np.mean([relative(p.change) for p in run.null[measure]], axis=0)


@pytest.mark.parametrize("layers", [6, 48, 97, *(pytest.param(n, marks=pytest.mark.slow) for n in (12, 30, 49))])
def test_labels_do_not_overlap(layers: int) -> None:
    fig = report.figure(make_runs(layers))
    FigureCanvasAgg(fig).draw()
    for sub in fig.subfigs:
        texts = []
        for ax in sub.axes:
            low, high = ax.get_ylim()
            texts += ax.get_xticklabels()
            texts += [t for y, t in zip(ax.get_yticks(), ax.get_yticklabels(), strict=True) if low <= y <= high]
            texts += [ax.title, ax.xaxis.label, ax.yaxis.label]
            assert len(ax.get_xticks()) >= 6
        legend = sub.legends[0]
        texts += [*legend.get_texts()]
        boxes = [text.get_window_extent() for text in texts]
        top = sub._suptitle.get_window_extent()
        for i, box in enumerate(boxes):
            assert not box.overlaps(top)
            assert not any(box.overlaps(other) for other in boxes[i + 1 :]), texts[i]


def test_an_unmeasured_run_is_named_and_not_drawn() -> None:
    (axes, _) = panels(make_runs(6, (8, 0, 0, 2)))
    assert all("equal-step: not measured" in ax.get_title() for ax in axes[:2])
    assert "equal-step: no step ratios, add UpdateRatioMonitor() to the callbacks" in axes[2].get_title()
    assert [len(ax.lines) for ax in axes] == [1, 1, 1, 2, 2]


def test_a_figure_without_profiles_says_so() -> None:
    fig = report.figure(make_runs(validations=(0, 0, 0, 0)))
    assert not fig.axes
    assert "No depth profile was measured (adamw-standard, " in fig.texts[-1].get_text()


def test_one_validation_says_so_on_the_page(tmp_path: Path) -> None:
    note = "The slider has a single step, because there is only one validation so far."
    assert note in page(make_runs(validations=(1,), arms=1), tmp_path)
    assert "No depth profile was measured." in page(make_runs(validations=(0,), arms=1), tmp_path)


def test_drawing_leaves_matplotlib_alone(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    runs = make_runs()
    report.write_png(runs, tmp_path / "a.png")
    runs[0].profiles["cka"]._repr_html_()
    assert dict(matplotlib.rcParams) == before


def test_a_frozen_layer_is_left_out_of_its_ratios(tmp_path: Path) -> None:
    def freeze(record: dict[str, Any]) -> None:
        for row in record["rows"]:
            del row["update_ratio/L01"]

    runs = make_runs()
    runs[2] = changed(runs[2], "UpdateRatioMonitor", freeze)
    assert runs[2].step_ratio.mean[1] is None
    assert np.isnan(panels(runs)[1][2].lines[0].get_ydata()[1])
    page(runs, tmp_path)
    assert MISSING in printed(runs)


def test_a_diverged_run_is_reported(tmp_path: Path) -> None:
    def diverge(record: dict[str, Any]) -> None:
        record["rows"][-1]["metrics"]["val/loss"] = float("inf")

    runs = make_runs()
    runs[0] = changed(runs[0], "DepthProfile", diverge)
    report.write_png(runs, tmp_path / "a.png")
    page(runs, tmp_path)
    assert report.read_html(tmp_path / "a.html") == runs


def test_a_run_without_interval_is_not_compared_and_says_why() -> None:
    def bare(record: dict[str, Any]) -> None:
        for row in record["rows"]:
            for profile in row["profiles"].values():
                profile["half_relative_slopes"] = None

    standard, equal = make_runs(arms=2)
    (group,) = groups([changed(standard, "DepthProfile", bare), equal])
    assert group.comparison is None
    told = " ".join(printed(list(group.runs)).split())
    assert "no comparison (standard has no interval: it takes a probe of at least 8 different examples)" in told


def test_a_pair_without_ratios_is_compared_and_says_what_is_missing(tmp_path: Path) -> None:
    runs = [
        Run(run.name, {k: r for k, r in run.records.items() if k not in ("update_ratio", "equal_step")} | kept)
        for run, kept in zip(make_runs(arms=2), ({}, {"equal_step": EMPTY}), strict=True)
    ]
    (group,) = groups(runs)
    assert group.comparison is not None
    assert "is not known: lower the Trainer's log_every_n_steps" in " ".join(printed(runs).split())
    axes = panels(runs)[0]
    assert "add UpdateRatioMonitor() to the callbacks" in " ".join(t.get_text() for t in axes[2].texts).replace(
        "\n", " "
    )
    assert "add UpdateRatioMonitor() to the callbacks" in page(runs, tmp_path)
