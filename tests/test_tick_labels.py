"""The numbers on an axis are all written in one way, whatever they are."""

from __future__ import annotations

import re

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import AutoLocator
from runs import make_runs

from depthcb.curves import draw_units
from depthcb.report.charts import ratio_heatmaps
from depthcb.report.groups import groups
from depthcb.report.paper_figure import draw_figure, panels_of
from depthcb.report.static_figure import figure
from depthcb.run import Run
from depthcb.style import tick_texts
from depthcb.unit_grid import UnitGrid


def way(label: str) -> str:
    """How a number is written: plainly, as a power of ten, or with an exponent; of zero it says nothing."""
    if label in ("", "0"):
        return ""
    return "power" if r"\mathdefault" in label else "exponent" if "e" in label else "plain"


def ways(labels: list[str]) -> set[str]:
    return {way(label) for label in labels} - {""}


def test_ticks_of_any_range_are_written_in_one_way_and_right() -> None:
    rng = np.random.default_rng(0)
    for exponent in rng.uniform(-8, 3, 2000):
        low = -rng.integers(0, 2) * rng.uniform() * 10**exponent
        ticks = AutoLocator().tick_values(low, 10**exponent).tolist()
        labels = tick_texts(ticks)
        assert len(ways(labels)) == 1, labels
        assert [float(label) for label in labels] == pytest.approx(ticks, rel=1e-3, abs=1e-15)


@pytest.mark.parametrize("size", [0.01, 0.011, 3e-5])
def test_figures_for_papers_and_of_the_report(size: float) -> None:
    runs = [scaled(run, size) for run in make_runs(12, (4, 4), arms=2)]
    for fig in (draw_figure(panels_of(runs, "pair"), 2), figure(runs)):
        FigureCanvasAgg(fig).draw()
        found = [ways([label.get_text() for label in ax.get_yticklabels()]) for ax in fig.findobj(Axes)]
        assert all(len(each) <= 1 for each in found)
        assert {"power"} in found
        assert ({"exponent"} in found) == (size < 0.01)


def scaled(run: Run, size: float) -> Run:
    """The run with this as its largest change."""
    fields = run.to_dict()
    for row in fields["records"]["depth"]["rows"]:
        for profile in row["profiles"].values():
            factor = size / max(profile["change"])
            profile["change"] = [factor * value for value in profile["change"]]
            profile["band"] = [[factor * value for value in edge] for edge in profile["band"]]
    return Run.from_dict(fields)


@pytest.mark.parametrize("ratios", [(8.1e-5, 1.4e-3), (8.1e-5, 2.3e-2), (1.2e-3, 4.5e-2)])
def test_color_bars_of_step_ratios(ratios: tuple[float, float]) -> None:
    ends = [float(f"{ratio:.2g}") for ratio in ratios]
    ax = Figure().subplots()
    draw_units(ax, UnitGrid(("L00", "L01"), ("a",), np.array(ratios)[:, None]), "title")
    labels = [label.get_text() for label in ax.images[0].colorbar.ax.get_yticklabels()]
    assert len(ways(labels)) == 1
    assert [float(labels[0]), float(labels[-1])] == ends
    (group,) = groups(make_runs(6, (4,), arms=1))
    run = group.runs[0]
    run.layer_ratio.table[:] = ratios[0]
    run.layer_ratio.table[0, 0] = ratios[1]
    texts = list(ratio_heatmaps(group).layout.coloraxis.colorbar.ticktext)
    assert len(ways(texts)) == 1
    assert [float(texts[0]), float(texts[-1])] == ends
    assert all(re.fullmatch(r"[\d.]+(e-\d+)?", text) for text in texts)
