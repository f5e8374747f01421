"""Plots of profiles: contents of the axes, and labels that do not overlap."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ET

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from runs import MEASURES, make_run

from depthcb import Profile
from depthcb.curves import curves_page, draw_curves, draw_heatmap, heatmap_image
from depthcb.profile import Profiles
from depthcb.similarity import MEASURES as ALL_MEASURES


def profiles(layers: int = 6, validations: int = 5) -> Profiles:
    return make_run(0, "AdamW", "standard", layers, validations).profiles["cka"]


def test_every_measure_has_its_words() -> None:
    for measure in ALL_MEASURES.values():
        assert measure.title
        assert measure.unit
        assert measure.definition.endswith("Dimensionless.")


def test_all_curves_are_drawn_the_last_one_with_its_band() -> None:
    found = profiles()
    ax = Figure().subplots()
    assert found.plot(ax) is ax
    assert [list(line.get_ydata()) for line in ax.lines] == [list(p.change) for p in found]
    (band,) = ax.collections
    edges = band.get_paths()[0].vertices[:, 1]
    last = found[-1].band
    assert last is not None
    assert (edges.min(), edges.max()) == (min(last[0]), max(last[1]))
    assert ax.get_title() == "change at step 100  (pale: 4 earlier)"
    widths = [line.get_linewidth() for line in ax.lines]
    assert widths[-1] > 1.5 * max(widths[:-1])


def test_a_profile_alone_and_a_part_of_the_list() -> None:
    found = profiles()
    for drawn in (found[2].plot(), found[1:3].plot()):
        assert list(drawn.lines[-1].get_ydata()) == list(found[2].change)
        plt.close(drawn.figure)
    assert isinstance(found[1:3], Profiles)
    assert isinstance(found[0], Profile)


def test_very_many_curves_are_thinned_and_the_title_says_so() -> None:
    ax = profiles(validations=200).plot(Figure().subplots())
    assert len(ax.lines) == 25
    assert ax.get_title().endswith("(pale: 24 of 199 earlier)")


def test_without_a_profile_a_sentence_takes_their_place() -> None:
    ax = Figure().subplots()
    draw_curves(ax, [])
    assert [text.get_text() for text in ax.texts] == ["no profile measured yet"]
    assert Profiles()._repr_html_() == "<p>No depth profile was measured yet.</p>"


def test_a_notebook_shows_the_curves_and_the_figures() -> None:
    found = profiles()
    for shown in (found._repr_html_(), found[-1]._repr_html_()):
        svg = shown[shown.index("<svg") : shown.index("</svg>") + 6]
        ET.fromstring(svg)
        assert "currentColor" in svg, "text follows the notebook's light or dark mode"
        assert "#010203" not in svg
        assert re.search(rf"slope {re.escape(format(found[-1].slope, '+.3g'))} \[", shown)
        assert "512 rows" in shown


def test_the_heatmap_holds_the_changes_from_zero() -> None:
    found = profiles()
    ax = Figure().subplots()
    draw_heatmap(ax, found)
    (image,) = ax.images
    assert np.array_equal(np.asarray(image.get_array()).T, [p.change for p in found])
    assert image.get_clim() == (0, max(max(p.change) for p in found))
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["20", "40", "60", "80", "100"]
    alone = Figure().subplots()
    draw_heatmap(alone, found[:1])
    assert alone.get_title() == "change, one validation so far"


def test_a_heatmap_where_nothing_changed() -> None:
    still = Profiles([Profile((0.0, 0.0, 0.0), ("a", "b", "c"), "cka")])
    assert heatmap_image({"cka": still}).shape == (420, 560, 3)
    assert "change at step 0" in curves_page({"cka": still})


@pytest.mark.parametrize("layers", [6, 12, 30, 48, 97])
@pytest.mark.parametrize("draw", [draw_curves, draw_heatmap])
def test_labels_do_not_overlap(layers: int, draw: object) -> None:
    run = make_run(0, "AdamW", "standard", layers, 40)
    fig = Figure(figsize=(11.2, 4.2))
    for ax, measure in zip(fig.subplots(1, 2), MEASURES, strict=True):
        draw(ax, run.profiles[measure])  # type: ignore[operator]
    FigureCanvasAgg(fig).draw()
    texts = [t for ax in fig.axes for t in (*ax.get_xticklabels(), ax.title, ax.xaxis.label)]
    for ax in fig.axes:
        low, high = ax.get_ylim()
        texts += [t for y, t in zip(ax.get_yticks(), ax.get_yticklabels(), strict=True) if low <= y <= high]
    boxes = [(t.get_text(), t.get_window_extent()) for t in texts if t.get_text()]
    assert len(boxes) > 20
    for (a, first), (b, second) in itertools.combinations(boxes, 2):
        assert not first.overlaps(second), (a, b)
