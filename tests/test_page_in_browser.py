"""The report in headless Chromium: opening, sliding and hovering, in light and dark mode."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from advised import trained
from planted import OBJECTIVES, SMALL, paper, study
from playwright.sync_api import Browser, Page, sync_playwright
from runs import make_run, make_runs

from depthcb import report
from depthcb.run import Run
from depthcb_recipes.advice.page import write_tested
from depthcb_recipes.studies.page import write_study
from depthcb_recipes.studies.tables import pairs_table, runs_table

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]

#: The visible texts of a chart that must not touch each other.
BOXES = """plot => [...plot.querySelectorAll('svg text')]
    .filter(t => t.textContent.trim() && !t.closest('.hoverlayer') && t.getBoundingClientRect().width > 0
                 && getComputedStyle(t).opacity > 0 && getComputedStyle(t).visibility != 'hidden')
    .map(t => { const b = t.getBoundingClientRect();
                return {text: t.textContent, left: b.left, right: b.right, top: b.top, bottom: b.bottom}; })"""

#: The tick labels of each axis and colour bar of a page.
TICKS = """() => [...document.querySelectorAll('.js-plotly-plot')].flatMap(plot => {
    const axes = {};
    for (const t of plot.querySelectorAll('g[class*=tick] > text'))
        (axes[t.parentNode.getAttribute('class')] ||= []).push(t.textContent);
    return Object.values(axes); })"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as p:
        path = shutil.which("chromium") or shutil.which("google-chrome")
        assert path, "no Chromium: make test-all installs Debian's"
        chromium = p.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Opened:
    """An open page with its errors."""

    def __init__(self, browser: Browser, page: Path, scheme: Any = "light") -> None:
        self.address = page.as_uri()
        self.page: Page = browser.new_page(viewport={"width": 1280, "height": 1600}, color_scheme=scheme)
        self.faults: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda m: self.faults.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda e: self.faults.append(str(e)))
        self.page.on("request", lambda r: self.requests.append(r.url))
        self.page.goto(self.address)
        self.page.wait_for_selector(".js-plotly-plot .xtick, p")

    def chart(self, number: int) -> Any:
        return self.page.locator(f"#chart-{number}")

    def shot(self, name: str) -> None:
        """Saves a screenshot if requested."""
        folder = os.environ.get("DEPTHCB_SCREENSHOTS")
        if folder:
            self.page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)

    def check(self) -> None:
        assert self.faults == []
        assert self.requests == [self.address], "a page asks nobody for anything"
        numbers = [
            [text for text in axis if re.fullmatch(r"[\d.]+(e.\d+)?", text) and text != "0"]
            for axis in self.page.evaluate(TICKS)
        ]
        assert all(len({"e" in text for text in axis}) <= 1 for axis in numbers), "an axis writes numbers in one way"
        self.page.close()


def written(runs: list[Run], folder: Path) -> Path:
    report.write_html(runs, folder / "a.html")
    return folder / "a.html"


def overlapping(boxes: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [
        (a["text"], b["text"])
        for i, a in enumerate(boxes)
        for b in boxes[i + 1 :]
        if min(a["right"], b["right"]) - max(a["left"], b["left"]) > 1
        and min(a["bottom"], b["bottom"]) - max(a["top"], b["top"]) > 2
    ]


def luminance(color: str) -> float:
    parts = [int(c) / 255 for c in re.findall(r"\d+", color)[:3]]
    red, green, blue = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(first: str, second: str) -> float:
    """Contrast as defined by WCAG 2."""
    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("layers", [6, 12, 30, 48])
def test_a_pair_of_runs(layers: int, scheme: str, browser: Browser, tmp_path: Path) -> None:
    runs = make_runs(layers, (8, 8), arms=2)
    opened = Opened(browser, written(runs, tmp_path), scheme)
    page, first = opened.page, opened.chart(1)

    charts = page.locator(".js-plotly-plot").count()
    assert charts == 5
    for number in range(1, charts + 1):
        boxes = opened.chart(number).evaluate(BOXES)
        assert len(boxes) > 10
        assert overlapping(boxes) == []

    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert luminance(back) > 0.9 if scheme == "light" else luminance(back) < 0.1
    for selector in ("p, li, td, th", ".js-plotly-plot svg .xtick text", ".js-plotly-plot svg .legendtext"):
        property = "fill" if "svg" in selector else "color"
        ink = page.locator(selector).first.evaluate(f"e => getComputedStyle(e).{property}")
        assert contrast(ink, back) > 4.5, selector
    for line in ("rgb(0, 114, 178)", "rgb(213, 94, 0)"):
        assert contrast(line, back) > 3

    def shown() -> list[float]:
        found: list[float] = first.evaluate("plot => Array.from(plot.data[1].y)")
        return found

    assert shown() == list(runs[0].profiles["cka"][-1].change)
    rail = first.locator(".slider-rail-touch-rect").bounding_box()
    page.mouse.click(rail["x"] + 2, rail["y"] + rail["height"] / 2)
    first.get_by_text("validation at step 20", exact=True).wait_for()
    assert shown() == list(runs[0].profiles["cka"][0].change), "the slider shows the first validation"
    assert overlapping(first.evaluate(BOXES)) == []

    area = first.locator(".nsewdrag").first.bounding_box()
    page.mouse.move(area["x"] + area["width"] * (layers // 2 + 0.5) / layers, area["y"] + area["height"] / 2)
    page.wait_for_selector("#chart-1 .hoverlayer text")
    told = first.locator(".hoverlayer").text_content()
    assert f"model.layers.{layers // 2}" in told
    assert "standard" in told
    assert page.locator("th[title*='U-centred']").count() >= 2, "definitions on hover"
    opened.shot(f"pair-{layers}-{scheme}")
    opened.check()


@pytest.mark.parametrize(
    ("runs", "says"),
    [
        (make_runs(validations=(0,), arms=1), "No depth profile was measured."),
        (make_runs(validations=(1,), arms=1), "The slider has a single step, because there is only one validation so far."),
        ([make_run(i, "AdamW", "standard", 6 + i, 4) for i in range(5)], "relative depth (0 = input side)"),
        (make_runs(12, (8, 8, 3, 0)), "SGD: no comparison (equal-step not measured)"),
        ([make_run(0, "SGD", "equal-step", 48, 400)], "Depth profile of sgd-equal-step"),
    ],
    ids=["empty", "one validation", "five runs of any depth", "interrupted", "400 validations"],
)  # fmt: skip
def test_other_reports(runs: list[Run], says: str, browser: Browser, tmp_path: Path) -> None:
    opened = Opened(browser, written(runs, tmp_path))
    assert says in opened.page.locator("main").inner_text() or says in opened.page.locator("main").text_content()
    for number in range(1, opened.page.locator(".js-plotly-plot").count() + 1):
        assert overlapping(opened.chart(number).evaluate(BOXES)) == []
    opened.shot(re.sub(r"\W+", "-", says)[:30])
    opened.check()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_study(scheme: str, browser: Browser, tmp_path: Path) -> None:
    runs = runs_table(study(paper, SMALL, objectives=OBJECTIVES[:3]))
    write_study(runs, pairs_table(runs), tmp_path / "study.html", title="planted")
    opened = Opened(browser, tmp_path / "study.html", scheme)
    page, chart = opened.page, opened.chart(1)
    pairs = len(SMALL) * 3 * 2
    assert page.locator("table tbody tr").count() == pairs + pairs / 2, "two seeds per cell"
    boxes = chart.evaluate(BOXES)
    assert len(boxes) > pairs, "a label for each pair"
    assert overlapping(boxes) == []
    claims = page.locator(".verdict h3").all_text_contents()
    assert [claim.split(":")[0] for claim in claims][:5] == [
        "C1 supported", "C2 supported", "C3 not enough models", "C4 not enough objectives (3 of 5)", "C5 not supported",
    ]  # fmt: skip
    opened.shot(f"study-{scheme}")
    opened.check()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_losses_by_budget(scheme: str, browser: Browser, tmp_path: Path) -> None:
    for share in (0.5, 0.25, 0.125):
        page = write_tested(tmp_path, "a", share, [trained(tmp_path, share)[0]], "planted")
    opened = Opened(browser, page, scheme)
    boxes = opened.chart(1).evaluate(BOXES)
    texts = {box["text"] for box in boxes}
    assert {"budget 12.5 %100", "budget 25 %200", "budget 50 %400", "all layers800", "validation loss (nats)"} <= texts
    assert overlapping(boxes) == []
    opened.shot(f"budgets-{scheme}")
    opened.check()
