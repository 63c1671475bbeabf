"""Every page that is made, in a real browser: quiet, offline, within the screen, its links whole, accessible.

Not part of `make test`; `make test-browser` runs it. It reads the committed report and what `make site` has built.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.browser.chromium import MARKS, ROOT, SCHEMES, SIZES, requests, show

pytestmark = MARKS

SITE = ROOT / "build" / "site"
BUILT = sorted(path for path in SITE.rglob("*.html") if "_static" not in path.parts)
PAGES = [ROOT / "report" / "report.html", *BUILT]


def test_the_site_is_built():
    assert SITE / "index.html" in BUILT


@pytest.fixture(
    scope="module",
    params=itertools.product(PAGES, SIZES, SCHEMES),
    ids=lambda view: f"{view[0].parent.name}-{view[0].stem}-{view[1]}-{view[2]}",
)
def view(driver, request):
    """One page, open at one size and in one scheme, for the tests below."""
    path, size, scheme = request.param
    show(driver, path, size, scheme)
    if folder := os.environ.get("FWDLIB_SCREENSHOT"):  # names a file: pictures of the pages' tops go beside it
        picture = Path(folder).expanduser().resolve().with_name(f"{path.stem}-{size}-{scheme}.png")
        picture.parent.mkdir(parents=True, exist_ok=True)
        driver.save_screenshot(str(picture))
    return driver


def test_says_nothing_and_asks_for_nothing(view):
    said = [entry["message"] for entry in view.get_log("browser")]
    assert [message for message in said if "[PST]" not in message] == []  # the theme names its mode
    asked = requests(view)
    assert any(url.startswith("file:") for url in asked), "the log does not even have the page"
    assert [url[:80] for url in asked if urlsplit(url).scheme not in ("file", "data", "blob")] == []


def test_nothing_is_wider_than_the_screen(view):
    wide, inner = view.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert wide <= inner
    out = """return [...document.querySelectorAll(
        'img, figure, figcaption, h1, h2, h3, div.table, pre')].filter(item => {
        const box = item.getBoundingClientRect();
        return item.checkVisibility() && (box.left < 0 || box.right > innerWidth + 0.5 || box.width === 0);
    }).map(item => item.outerHTML.slice(0, 120))"""
    assert view.execute_script(out) == []
    missing = "return [...document.images].filter(image => image.checkVisibility() && !image.naturalWidth).length"
    assert view.execute_script(missing) == 0


def test_what_scrolls_sideways_is_in_reach_of_the_keyboard(view):
    script = """const text = document.querySelector('article') ?? document.querySelector('main');
        return [...text.querySelectorAll('*')].filter(item => item.checkVisibility()
        && item.scrollWidth > item.clientWidth + 1
        && ['auto', 'scroll'].includes(getComputedStyle(item).overflowX)
        && !(item.tabIndex === 0 && item.role && item.ariaLabel)).map(item => item.outerHTML.slice(0, 120))"""
    assert view.execute_script(script) == []


def test_axe_finds_nothing_serious(view, axe):
    view.execute_script(axe)
    script = """const done = arguments[0];
        axe.run(document, {resultTypes: ['violations']}).then(found => done(found.violations.map(v =>
            [v.impact, v.id, v.nodes.length, v.nodes[0].html.slice(0, 160), v.nodes[0].failureSummary])),
            error => done([['critical', String(error)]]))"""
    found = view.execute_async_script(script)
    assert [violation for violation in found if violation[0] in ("serious", "critical")] == []
