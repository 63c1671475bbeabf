"""The report and the course's pages in a real browser: quiet, offline, within the screen, sortable, accessible.

Not part of `make test`; `make test-browser` runs it, through tests/browser.sh, which says what it needs. It reads the
pages that lie in report/; `make page` writes them.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import itertools
import json
import os
import shutil
import tarfile
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from fwdlib import runtime
from report.page import pandoc
from tests.test_browser import FLAGS, wait_until

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(os.environ.get("FWDLIB_BROWSER") != "1", reason="run by `make test-browser`"),
]

REPORT = Path(__file__).resolve().parents[2] / "report"
PAGES = [REPORT / "report.html", *sorted((REPORT / "site").glob("*.html"))]
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
SCHEMES = ("light", "dark")
AXE = "https://registry.npmjs.org/axe-core/-/axe-core-4.14.1.tgz"
AXE_SHA512 = "FHfa+lmNjQZfJz1q8wKqIDwC6DExcHt/pkjNQb09a3NPjCKg2rhu5qb2S4r76ASyFNNtuFooJpZe37OgudVGtQ=="


@pytest.fixture(scope="module")
def driver() -> Iterator:
    from selenium import webdriver

    with tempfile.TemporaryDirectory(prefix="fwdlib-", ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        for flag in (*FLAGS.split(), f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
        driver = webdriver.Chrome(options=options, service=service)
        try:
            yield driver
        finally:
            driver.quit()


@pytest.fixture(scope="module")
def axe() -> str:
    """The source of axe-core, from the npm registry or an earlier download; checked, as it will run in the pages."""
    cached = runtime.cache_dir() / Path(AXE).name
    try:
        if not cached.is_file():
            with urllib.request.urlopen(AXE, timeout=20) as answer:
                content = answer.read()
            cached.parent.mkdir(parents=True, exist_ok=True)
            cached.write_bytes(content)
    except OSError as error:
        pytest.skip(f"axe-core cannot be had from the npm registry: {error}")
    digest = hashlib.sha512(cached.read_bytes()).digest()
    assert base64.b64encode(digest).decode() == AXE_SHA512, f"{cached} is not what was asked for: delete it"
    with tarfile.open(cached) as archive:
        return archive.extractfile("package/axe.min.js").read().decode()


def show(driver, path: Path, size: str = "desktop", scheme: str = "light") -> None:
    """Open a page on a screen of that size, after forgetting what was logged before."""
    width, height = SIZES[size]
    screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == "phone"}
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    driver.get("about:blank")
    for log in ("performance", "browser"):
        driver.get_log(log)
    driver.get(path.as_uri())
    driver.execute_async_script("const done = arguments[0]; requestAnimationFrame(() => setTimeout(done, 100))")


def requests(driver) -> list[str]:
    """Return the addresses that were asked for, over any protocol, since the page was opened."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    names = {"Network.requestWillBeSent": "request", "Network.webSocketCreated": None}
    sent = [message for message in messages if message["method"] in names]
    return [(m["params"].get("request") or m["params"])["url"] for m in sent]


@pytest.fixture(
    scope="module",
    params=itertools.product(PAGES, SIZES, SCHEMES),
    ids=lambda view: f"{view[0].stem}-{view[1]}-{view[2]}",
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
    assert [entry["message"] for entry in view.get_log("browser")] == []
    asked = requests(view)
    assert any(url.startswith("file:") for url in asked), "the log does not even have the page"
    assert [url[:80] for url in asked if urlsplit(url).scheme not in ("file", "data", "blob")] == []


def test_nothing_is_wider_than_the_screen(view):
    wide, inner = view.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert wide <= inner
    out = """return [...document.querySelectorAll('img, figure, figcaption, h1, h2, h3, .table, pre')].filter(item => {
        const box = item.getBoundingClientRect();
        return item.checkVisibility() && (box.left < 0 || box.right > innerWidth + 0.5 || box.width === 0);
    }).map(item => item.outerHTML.slice(0, 120))"""
    assert view.execute_script(out) == []
    missing = "return [...document.images].filter(image => image.checkVisibility() && !image.naturalWidth).length"
    assert view.execute_script(missing) == 0


def test_what_scrolls_sideways_is_in_reach_of_the_keyboard(view):
    script = """return [...document.querySelectorAll('main *')].filter(item => item.checkVisibility()
        && item.scrollWidth > item.clientWidth + 1
        && ['auto', 'scroll'].includes(getComputedStyle(item).overflowX)
        && !(item.tabIndex === 0 && item.role && item.ariaLabel)).map(item => item.outerHTML.slice(0, 120))"""
    assert view.execute_script(script) == []


def test_every_internal_link_resolves(view):
    links = "return [...document.links].map(link => [link.getAttribute('href'), link.href])"
    broken, here = [], urlsplit(view.current_url).path
    for written, url in view.execute_script(links):
        parts = urlsplit(url)
        if parts.scheme != "file":
            assert parts.scheme in ("https", "http", "mailto"), written
        elif parts.path != here:
            broken += [written] * (not Path(unquote(parts.path)).is_file())
        elif parts.fragment:
            found = view.execute_script("return !!document.getElementById(arguments[0])", unquote(parts.fragment))
            broken += [written] * (not found)
    assert broken == []


def test_axe_finds_nothing_serious(view, axe):
    view.execute_script(axe)
    script = """const done = arguments[0];
        axe.run(document, {resultTypes: ['violations']}).then(found => done(found.violations.map(v =>
            [v.impact, v.id, v.nodes.length, v.nodes[0].html.slice(0, 160), v.nodes[0].failureSummary])),
            error => done([['critical', String(error)]]))"""
    found = view.execute_async_script(script)
    assert [violation for violation in found if violation[0] in ("serious", "critical")] == []


# --- tables ----------------------------------------------------------------------------------------------------------

TABLE = """\
---
title: A table
lang: en
---

## Results {#results}

| model | time | $n_k$ | share | R~f~ |
|:------|-----:|------:|------:|-----:|
| b, "the second" | 1.05 [1.00, 1.10] ms | 1,234 | 98.2 % | $x^2$ |
| a10 | 12 s | never | 3.2e-05 | 2 |
| a9 | 382 [372, 392] \N{MICRO SIGN}s | 99 | 98.2 % | 10 |
| c | more than 2 min | \N{MINUS SIGN}5 | 7 | never |

: Made up.
"""
ORDERS = {  # column -> first cells, up and down; what has no value is last either way, ties stay as they were
    0: (["a9", "a10", 'b, "the second"', "c"], ["c", 'b, "the second"', "a10", "a9"]),
    1: (["a9", 'b, "the second"', "a10", "c"], ["c", "a10", 'b, "the second"', "a9"]),
    2: (["c", "a9", 'b, "the second"', "a10"], ['b, "the second"', "a9", "c", "a10"]),
    3: (["a10", "c", 'b, "the second"', "a9"], ['b, "the second"', "a9", "c", "a10"]),
    4: (["a10", "a9", 'b, "the second"', "c"], ["a9", "a10", 'b, "the second"', "c"]),
}
FIRST_CELLS = "return [...document.querySelectorAll('tbody tr')].map(row => row.cells[0].textContent)"


@pytest.fixture
def table(driver, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(pandoc.to_html(TABLE), encoding="utf-8")
    show(driver, path)
    return driver


def press(driver, element) -> None:
    from selenium.webdriver.common.keys import Keys

    driver.execute_script("arguments[0].focus()", element)
    element.send_keys(Keys.ENTER)


@pytest.mark.parametrize("column", ORDERS)
def test_a_table_sorts_by_keyboard_up_down_and_back(table, column):
    from selenium.webdriver.common.by import By

    headers = table.find_elements(By.CSS_SELECTOR, "thead th")
    button, (up, down) = headers[column].find_element(By.TAG_NAME, "button"), ORDERS[column]
    before = [text.replace("\N{RIGHT DOUBLE QUOTATION MARK}", '"') for text in table.execute_script(FIRST_CELLS)]
    for state, expected in (("ascending", up), ("descending", down), (None, None)):
        press(table, button)
        cells = table.execute_script(FIRST_CELLS)
        plain = [text.translate({0x201C: '"', 0x201D: '"'}) for text in cells]
        assert plain == (expected or [text.translate({0x201C: '"'}) for text in before])
        assert [header.get_attribute("aria-sort") for header in headers].count(state) == (5 if state is None else 1)
        assert headers[column].get_attribute("aria-sort") == state
        said = table.find_element(By.CSS_SELECTOR, "[role=status]").get_attribute("textContent")
        assert (state or "original") in said


def test_axe_finds_nothing_serious_in_a_sortable_table(table, axe):
    from selenium.webdriver.common.by import By

    test_axe_finds_nothing_serious(table, axe)
    button = table.find_elements(By.CSS_SELECTOR, "thead button")[2]
    assert button.accessible_name == "n_k"  # a formula alone would be no name


def test_a_second_column_takes_over(table):
    from selenium.webdriver.common.by import By

    first, second, *_ = table.find_elements(By.CSS_SELECTOR, "thead button")
    press(table, first)
    press(table, second)
    sorted_by = [header.get_attribute("aria-sort") for header in table.find_elements(By.TAG_NAME, "th")]
    assert sorted_by[:3] == [None, "ascending", None]
    assert table.execute_script(FIRST_CELLS)[0] == "a9"


def download(driver, button, folder: Path) -> Path:
    behavior = {"behavior": "allow", "downloadPath": str(folder)}
    driver.execute_cdp_cmd("Browser.setDownloadBehavior", behavior)
    press(driver, button)
    (path,) = wait_until("the download", lambda: [*folder.glob("*.csv"), *folder.glob("*.svg")], 20)
    return path


def test_a_table_is_saved_as_csv(table, tmp_path):
    from selenium.webdriver.common.by import By

    path = download(table, table.find_element(By.CSS_SELECTOR, ".tools button"), tmp_path)
    assert path.name == "page-results.csv"
    rows = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline="")))
    assert rows[0] == ["model", "time", "n_k", "share", "R_f"]
    assert rows[1] == ["b, \u201cthe second\u201d", "1.05 [1.00, 1.10] ms", "1,234", "98.2 %", "x^2"]
    assert [len(row) for row in rows] == [5] * 5
    assert all(urlsplit(url).scheme in ("file", "blob", "data") for url in requests(table))


def test_a_figure_is_saved_as_it_was_drawn(driver, tmp_path):
    from selenium.webdriver.common.by import By

    show(driver, PAGES[0])
    button = driver.find_element(By.CSS_SELECTOR, "#fig-summary-total .tools button")
    path = download(driver, button, tmp_path)
    assert path.read_bytes() == (REPORT / "figures" / "summary-total.svg").read_bytes()


def test_all_tables_of_the_report_sort_and_keep_their_rows(driver):
    from selenium.webdriver.common.by import By

    show(driver, PAGES[0])
    tables = driver.find_elements(By.CSS_SELECTOR, "main table")
    assert len(tables) >= 6
    for table in tables:
        rows = "return [...arguments[0].tBodies[0].rows].map(row => row.textContent)"
        before = driver.execute_script(rows, table)
        buttons = table.find_elements(By.CSS_SELECTOR, "thead button")
        assert buttons or len(before) < 2
        moved = False
        for button in buttons:
            press(driver, button)
            press(driver, button)
            moved |= driver.execute_script(rows, table) != before
            assert sorted(driver.execute_script(rows, table)) == sorted(before)
            press(driver, button)
            assert driver.execute_script(rows, table) == before
        assert moved or len(set(before)) < 2
    assert driver.get_log("browser") == []


# --- ways around -----------------------------------------------------------------------------------------------------


def test_the_first_tab_skips_to_the_text(driver):
    from selenium.webdriver.common.keys import Keys

    show(driver, PAGES[0])
    driver.switch_to.active_element.send_keys(Keys.TAB)
    skip = driver.switch_to.active_element
    assert skip.text == "Skip to the text"
    skip.send_keys(Keys.ENTER)
    assert driver.switch_to.active_element.get_attribute("id") == "content"


def test_a_folded_solution_opens_by_keyboard(driver):
    from selenium.webdriver.common.by import By

    show(driver, REPORT / "site" / "1b_logistic_forward.html")
    details = driver.find_element(By.CSS_SELECTOR, "main details")
    code = details.find_element(By.TAG_NAME, "pre")
    assert not code.is_displayed()
    press(driver, details.find_element(By.TAG_NAME, "summary"))
    assert code.is_displayed()


def test_the_contents_are_open_where_there_is_room(driver):
    script = "return document.querySelector('.contents details').open"
    for width, is_open in ((1500, True), (1280, False)):
        show(driver, PAGES[0])
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        wait_until("the contents to follow", lambda is_open=is_open: driver.execute_script(script) == is_open, 5)


def test_the_page_is_complete_without_its_script(driver):
    text = "return document.querySelector('main').textContent.replace(/Save as (CSV|SVG)|Link(?=Save)/g, '').length"
    count = "return document.querySelectorAll('main button').length"
    show(driver, PAGES[0])
    assert driver.execute_script(count) > 20
    full = driver.execute_script(text)
    driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        driver.get(PAGES[0].as_uri())
    finally:
        driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    assert driver.execute_script(count) == 0
    assert driver.execute_script(text) == pytest.approx(full, abs=200)


def test_prints_its_folded_parts_and_not_its_buttons(driver):
    show(driver, REPORT / "site" / "1b_logistic_forward.html")
    driver.execute_script("dispatchEvent(new Event('beforeprint'))")
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    shown = """return ['.tools', 'nav', '.skip', 'main details pre'].map(css =>
        [...document.querySelectorAll(css)].some(item => item.checkVisibility()))"""
    assert driver.execute_script(shown) == [False, False, False, True]
    assert driver.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    driver.execute_script("dispatchEvent(new Event('afterprint'))")
    assert not driver.execute_script("return document.querySelector('main details').open")
