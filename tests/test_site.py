"""The site: it builds without a warning, so that no link or anchor leads nowhere, and needs nothing from the network."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pages import ROOT


def build(source: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(source)}
    return subprocess.run(command, cwd=source, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    done = build(ROOT, out)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_it_has_a_page_for_each_source_and_loads_nothing_from_elsewhere(site: Path) -> None:
    sources = {path.relative_to(ROOT / "docs").with_suffix("") for path in (ROOT / "docs").rglob("*.md")}
    assert {site / f"{source}.html" for source in sources} <= set(site.rglob("*.html"))
    assert list(site.rglob("*.py")) == []
    for page in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|img|iframe)\b[^>]*\bsrc="([^"]+)"', text := page.read_text(encoding="utf-8"))
        loaded += re.findall(r'<link\b[^>]*\brel="(?:stylesheet|preconnect|preload)"[^>]*\bhref="([^"]+)"', text)
        assert len(loaded) > 3
        assert [each for each in loaded if re.match(r"(\w+:)?//", each)] == [], page


def test_generated_parts_and_docstrings_are_on_it(site: Path) -> None:
    assert "The pairs do not carry a word" in (site / "glossary.html").read_text(encoding="utf-8")
    assert "depth/cka/relative_slope" in (site / "reference" / "keys.html").read_text(encoding="utf-8")
    callbacks = (site / "reference" / "callbacks.html").read_text(encoding="utf-8")
    assert "every_n_validations" in callbacks
    assert not re.search(r"={5,}", callbacks), "tables of docstrings are tables"


@pytest.mark.slow
@pytest.mark.parametrize(
    "broken", ["[x](nowhere.md)", "[x](method.md#nowhere)", "[x][depthcb.nowhere]", "::: depthcb.nowhere"]
)
def test_a_link_that_leads_nowhere_is_an_error(broken: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    for package in ("depthcb", "recipes"):
        (tmp_path / package).symlink_to(ROOT / package)
    with open(tmp_path / "docs" / "limits.md", "a", encoding="utf-8") as file:
        file.write(f"\n{broken}\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    assert "nowhere" in done.stdout + done.stderr


@pytest.mark.slow
def test_the_search_works_from_a_folder(site: Path) -> None:
    from playwright.sync_api import sync_playwright

    chromium = next(path for name in ("chromium", "google-chrome") if (path := shutil.which(name)))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page, asked = browser.new_page(), list[str]()
        page.on("request", lambda request: asked.append(request.url))
        page.goto((site / "how-to" / "vision.html").as_uri())
        page.locator("input.md-search__input").click()
        page.keyboard.type("objective distance", delay=20)
        first = page.locator(".md-search-result__link").first
        first.wait_for(timeout=20_000)
        assert "matching documents" in page.locator(".md-search-result__meta").inner_text()
        found = [link.get_attribute("href") or "" for link in page.locator(".md-search-result__link").all()]
        assert any("how-to/recipes.html" in link for link in found)
        assert [url for url in asked if not url.startswith("file:")] == []
        browser.close()
