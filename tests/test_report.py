"""The report's files and tables, from summaries as `depthcb demo` writes them, complete and interrupted."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from rich.console import Console

from depthcb import report
from depthcb.profile import Profile
from depthcb.report.charts import profile_chart
from depthcb.report.summary import MISSING, read_pairs
from depthcb.verdict import judge

MEASURES = ("cka", "cka_normalized")
HOSTILE = "</script><script>alert('$x_1$')</script>[bold]&<!--"


def make_profile(rng: np.random.Generator, names: Sequence[str], measure: str, size: float, step: int) -> Profile:
    depth = np.linspace(0, 1, len(names))
    change = size * (0.2 + depth**1.5) * np.exp(rng.normal(0, 0.1, len(names)))
    halves = change * np.exp(rng.normal(0, 0.12, (200, len(names))) + rng.normal(0, 0.05, (200, 1)))
    fields: dict[str, Any] = {"layer_names": tuple(names), "measure": measure, "step": step, "epoch": 0, "rows": 512}
    return Profile.from_halves(change.tolist(), halves, **fields)


def make_arm(
    seed: int, optimizer: str, control: str, names: Sequence[str], validations: int, finished: bool
) -> dict[str, Any]:
    """An arm whose change grows over the validations; with none of them it is one interrupted at its start."""
    rng = np.random.default_rng(seed)
    spread = np.exp(rng.normal(0, 0.05 if optimizer == "adamw" else 0.8, len(names)))
    wanted = (2e-4 * spread).tolist() if validations else None
    size = 0.02 if control == "standard" else 0.015
    steps = [20 * (i + 1) for i in range(validations)]
    sizes = [(i + 1) * size / max(validations, 1) for i in range(validations)]
    profiles = {
        m: [make_profile(rng, names, m, c, step).to_dict() for c, step in zip(sizes, steps, strict=True)]
        for m in MEASURES
    }
    null = {m: [make_profile(rng, names, m, size / 300, 0).to_dict() for _ in range(3)] for m in MEASURES}
    return {
        "name": f"{optimizer}-{control}",
        "optimizer": optimizer,
        "control": control,
        "finished": finished,
        "run_dir": f"{optimizer}-{control}",
        "profiles": profiles,
        "null": null if validations else {m: [] for m in MEASURES},
        "step_ratio": [float(np.mean(wanted))] * len(names) if wanted and control == "equal_step" else wanted,
        "wanted_ratio": wanted,
        "val_loss": [[s, 3.0 * 0.98**i] for i, s in enumerate(steps)],
        "seconds": 70.1,
        "probe_seconds": 13.2,
    }


def make_verdict(standard: dict[str, Any], equal: dict[str, Any]) -> dict[str, Any]:
    def last(arm: dict[str, Any]) -> dict[str, Profile]:
        return {m: Profile.from_dict(arm["profiles"][m][-1]) for m in MEASURES}

    def null(arm: dict[str, Any]) -> float:
        return float(np.mean([p["relative_slope"] for p in arm["null"]["cka"]]))

    found = judge(last(standard), last(equal), max(equal["wanted_ratio"]) / min(equal["wanted_ratio"]))
    context = {"spread": found.spread, "measures_agree": found.measures_agree, "reason": found.reason}
    nulls = {"standard": null(standard), "equal_step": null(equal)}
    return {"optimizer": standard["optimizer"], "verdict": found.verdict, "null_relative_slope": nulls, **context}


def make_summary(
    layers: int = 6, validations: Sequence[int] = (8, 8, 8, 8), name: str = "model.layers.{}", arms: int = 4
) -> dict[str, Any]:
    """A summary of up to four arms, each with its number of validations; the verdicts are those of complete pairs."""
    names = [name.format(i) for i in range(layers)]
    grid = [(o, c) for o in ("adamw", "sgd") for c in ("standard", "equal_step")]
    made = [
        make_arm(i, o, c, names, n, n == max(validations) > 0)
        for i, ((o, c), n) in enumerate(zip(grid[:arms], validations, strict=False))
    ]
    pairs = [(made[i], made[i + 1]) for i in range(0, len(made) - 1, 2) if all(validations[i : i + 2])]
    summary = {
        "depthcb": "0.1.0",
        "created": "2026-11-24T03:30:00+00:00",
        "backbone": "smollm2-135m",
        "settings": {"lr": 2e-5, "steps": 160, "device": "cpu"},
        "versions": {"torch": "2.13.0", "lightning": "2.6.6"},
        "corpus": {"sha256": "0f" * 32, "texts": 2000},
        "layers": names,
        "effective_rank": [2.5 + 3 * i for i in range(layers)],
        "arms": made,
        "verdicts": [make_verdict(*pair) for pair in pairs],
    }
    as_read: dict[str, Any] = json.loads(json.dumps(summary))
    return as_read


INTERRUPTED = {
    "no arm started": {"arms": 0},
    "no arm measured": {"validations": (0, 0, 0, 0)},
    "one arm only": {"validations": (8,), "arms": 1},
    "equal-step without profiles": {"validations": (8, 0, 0, 0)},
    "one validation": {"validations": (1, 1, 1, 1)},
    "second optimizer cut short": {"validations": (8, 8, 3, 0)},
}
CASES = {f"{n} layers": {"layers": n} for n in (6, 12, 30, 48)} | INTERRUPTED


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def summary(request: pytest.FixtureRequest) -> dict[str, Any]:
    return make_summary(**request.param)


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


def printed(summary: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=80, force_terminal=False)
    report.print_summary(summary, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def panels(summary: dict[str, Any]) -> list[list[Axes]]:
    """The figure's axes, a row per optimizer."""
    return [list(sub.axes) for sub in report.figure(summary).subfigs]


def test_files_are_written_and_the_summary_comes_back(summary: dict[str, Any], tmp_path: Path) -> None:
    before = json.dumps(summary)
    report.write_png(summary, tmp_path / "a.png")
    report.write_html(summary, tmp_path / "a.html")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert report.read_summary(tmp_path / "a.html") == summary
    assert json.dumps(summary) == before


def test_the_page_loads_nothing(summary: dict[str, Any], tmp_path: Path) -> None:
    report.write_html(summary, tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.loads == []
    assert not {"link", "iframe", "object", "embed", "base", "img"} & set(page.tags)
    assert "@import" not in page.styles
    assert "url(" not in page.styles
    assert re.search(r"Content-Security-Policy\" content=\"default-src 'none'", text)
    assert "cdn.plot.ly/plotly" not in re.sub(r"<script>.*?</script>", "", text, flags=re.S)


def test_hostile_names_are_shown_and_never_run(tmp_path: Path) -> None:
    summary = make_summary(name=HOSTILE + "{}")
    summary["backbone"] = HOSTILE
    summary["settings"] = {HOSTILE: HOSTILE}
    summary["verdicts"][0]["reason"] = HOSTILE
    summary["arms"][0]["name"] = HOSTILE
    report.write_html(summary, tmp_path / "a.html")
    report.write_png(summary, tmp_path / "a.png")
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    clean = make_summary()
    report.write_html(clean, tmp_path / "b.html")
    expected = Page((tmp_path / "b.html").read_text(encoding="utf-8"))
    page = Page(text)
    assert page.tags.count("script") == expected.tags.count("script")
    assert "<script>alert" not in text
    assert page.shown.count(HOSTILE + "3") == 2, "once in the table of each optimizer"
    assert report.read_summary(tmp_path / "a.html") == summary
    assert "[bold]" in printed(summary)


def test_a_page_without_summary_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text("<html></html>")
    with pytest.raises(ValueError, match=r"a\.html is not a depthcb report"):
        report.read_summary(tmp_path / "a.html")


@pytest.mark.parametrize("layers", [6, 12, 30, 48])
def test_the_page_tells_the_numbers(layers: int, tmp_path: Path) -> None:
    summary = make_summary(layers)
    report.write_html(summary, tmp_path / "a.html")
    shown = Page((tmp_path / "a.html").read_text(encoding="utf-8")).shown
    for arm in summary["arms"]:
        for measure in MEASURES:
            last = arm["profiles"][measure][-1]
            low, high = last["slope_interval"]
            assert {f"{c:.3g}" for c in last["change"]} <= set(shown)
            assert {f"{last['slope']:+.3g}", f"[{low:+.3g}, {high:+.3g}]", f"{last['width']:.3g}"} <= set(shown)
    assert {"2.5 !", "2.13.0", "0f" * 32, "smollm2-135m"} <= {s.replace("Depth profile of ", "") for s in shown}


def test_the_slider_holds_every_validation() -> None:
    summary = make_summary(12, (8, 5, 0, 0))
    standard, equal = summary["arms"][:2]
    (pair, _) = read_pairs(summary)
    chart = profile_chart(pair, summary["layers"])
    steps = chart.layout.sliders[0].steps
    assert [s.label for s in steps] == [str(20 * (i + 1)) for i in range(8)]
    for i, step in enumerate(steps):
        ys = step.args[0]["y"]  # band, change and null of each of two arms under each of two measures
        assert list(ys[1]) == standard["profiles"]["cka"][i]["change"]
        assert list(ys[4]) == (equal["profiles"]["cka"][i]["change"] if i < 5 else [None] * 12)
        assert list(ys[7]) == standard["profiles"]["cka_normalized"][i]["change"]
        assert (ys[2][0] is not None, ys[5][0] is not None) == (i == 7, i == 4), "the null belongs to the last one"
    assert [list(t.y) for t in chart.data] == [list(y) for y in steps[-1].args[0]["y"]]


@pytest.mark.parametrize("layers", [6, 12, 30, 48])
def test_the_figure_holds_the_data(layers: int) -> None:
    summary = make_summary(layers)
    for row, (axes, verdict) in enumerate(zip(panels(summary), summary["verdicts"], strict=True)):
        arms = summary["arms"][2 * row : 2 * row + 2]
        for ax, measure in zip(axes, MEASURES, strict=False):
            expected = [y for arm in arms for y in (arm["profiles"][measure][-1]["change"], null_mean(arm, measure))]
            assert [list(line.get_ydata()) for line in ax.lines] == expected
            assert ax.get_ylim()[0] <= 0
            bands = [arm["profiles"][measure][-1]["band"] for arm in arms]
            for drawn, band in zip(ax.collections, bands, strict=True):
                edges = drawn.get_paths()[0].vertices[:, 1]
                assert (edges.min(), edges.max()) == (min(band[0]), max(band[1]))
        assert [list(line.get_ydata()) for line in axes[2].lines] == [arm["step_ratio"] for arm in arms]
        spread = max(arms[0]["step_ratio"]) / min(arms[0]["step_ratio"])
        assert axes[2].get_yscale() == ("log" if spread > 3 else "linear")
        title = report.figure(summary).subfigs[row].get_suptitle()
        assert f"{verdict['verdict']}; the control removed a step-ratio spread of {verdict['spread']:.3g}x" in title


def null_mean(arm: dict[str, Any], measure: str) -> list[float]:
    mean: list[float] = np.mean([p["change"] for p in arm["null"][measure]], axis=0).tolist()
    return mean


@pytest.mark.parametrize("layers", [6, 12, 30, 48, 49, 97])
def test_labels_do_not_overlap(layers: int) -> None:
    fig = report.figure(make_summary(layers))
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


def test_an_unmeasured_arm_is_named_and_not_drawn() -> None:
    (axes, _) = panels(make_summary(6, (8, 0, 0, 2)))
    assert all("equal-step: not measured" in ax.get_title() for ax in axes)
    assert [len(ax.lines) for ax in axes] == [2, 2, 1]


def test_a_figure_without_profiles_says_so() -> None:
    fig = report.figure(make_summary(validations=(0, 0, 0, 0)))
    assert not fig.axes
    assert "No depth profile was measured (adamw-standard, " in fig.texts[-1].get_text()


def test_drawing_leaves_matplotlib_alone(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    report.write_png(make_summary(), tmp_path / "a.png")
    assert dict(matplotlib.rcParams) == before


def test_a_frozen_layer_keeps_the_ratio_axis_linear() -> None:
    summary = make_summary()
    summary["arms"][2]["step_ratio"][1] = 0.0
    assert panels(summary)[1][2].get_yscale() == "linear"


def test_a_diverged_run_is_reported(tmp_path: Path) -> None:
    summary = make_summary()
    summary["arms"][0]["val_loss"][-1][1] = float("inf")
    summary["arms"][1]["step_ratio"][0] = None
    report.write_png(summary, tmp_path / "a.png")
    report.write_html(summary, tmp_path / "a.html")
    assert report.read_summary(tmp_path / "a.html") == summary
    assert MISSING in printed(summary)


@pytest.mark.parametrize("layers", [6, 12, 30, 48])
def test_the_terminal_shows_numbers_and_verdict(layers: int) -> None:
    summary = make_summary(layers)
    text = printed(summary)
    assert max(map(len, text.splitlines())) <= 80
    flat = " ".join(text.split())
    for arm in summary["arms"]:
        last = arm["profiles"]["cka"][-1]
        numbers = [*last["change"], *arm["profiles"]["cka_normalized"][-1]["change"], *arm["step_ratio"]]
        assert all(f" {n:.3g} " in text for n in numbers)
        low, high = last["slope_interval"]
        assert f"slope {last['slope']:+.3g} [{low:+.3g}, {high:+.3g}]" in flat
    for verdict in summary["verdicts"]:
        assert f"{verdict['verdict']}; the control removed a step-ratio spread of {verdict['spread']:.3g}x" in flat
        assert f"relative slope of the null: standard {verdict['null_relative_slope']['standard']:+.3g}" in flat
    assert flat.count("agree on the sign of the slope") == 2
    assert flat.count("2.5 !") == 2
    assert f" {summary['effective_rank'][-1]:.1f} " in flat
    assert f"layers.{layers - 1} " in text


def test_the_terminal_marks_what_is_missing(summary: dict[str, Any]) -> None:
    text = printed(summary)
    assert "None" not in text
    assert "nan" not in text
    for arm in summary["arms"]:
        if not arm["profiles"]["cka"]:
            assert f"{arm['control'].replace('_', '-')}: {MISSING} not measured" in text


def test_long_names_keep_their_end() -> None:
    text = printed(make_summary(30, name="base_model.model.transformer.decoder.blocks.{}"))
    assert "…blocks.29 " in text
    assert max(map(len, text.splitlines())) <= 80


def test_disagreeing_measures_stand_out() -> None:
    summary = make_summary()
    summary["verdicts"][0]["measures_agree"] = False
    assert "plain and normalised change DISAGREE on the sign" in " ".join(printed(summary).split())
