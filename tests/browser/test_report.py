"""The report in a real browser: its tables sort, tables and figures can be saved, and the keyboard reaches everything.

Not part of `make test`; `make test-browser` runs it. It reads the committed report; `make publish` writes that.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from report.page.render import to_html
from tests.browser.chromium import MARKS, ROOT, press, requests, show, wait_until
from tests.browser.test_pages import test_axe_finds_nothing_serious as find_nothing_serious

pytestmark = MARKS

REPORT = ROOT / "report"
PAGE = REPORT / "report.html"

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
    path.write_text(to_html(TABLE, tmp_path), encoding="utf-8")
    show(driver, path)
    return driver


@pytest.mark.parametrize("column", ORDERS)
def test_a_table_sorts_by_keyboard_up_down_and_back(table, column):
    headers = table.find_elements("css selector", "thead th")
    button, (up, down) = headers[column].find_element("tag name", "button"), ORDERS[column]
    before = [text.replace("\N{RIGHT DOUBLE QUOTATION MARK}", '"') for text in table.execute_script(FIRST_CELLS)]
    for state, expected in (("ascending", up), ("descending", down), (None, None)):
        press(table, button)
        cells = table.execute_script(FIRST_CELLS)
        plain = [text.translate({0x201C: '"', 0x201D: '"'}) for text in cells]
        assert plain == (expected or [text.translate({0x201C: '"'}) for text in before])
        assert [header.get_attribute("aria-sort") for header in headers].count(state) == (5 if state is None else 1)
        assert headers[column].get_attribute("aria-sort") == state
        said = table.find_element("css selector", "[role=status]").get_attribute("textContent")
        assert (state or "original") in said


def test_axe_finds_nothing_serious_in_a_sortable_table(table, axe):
    find_nothing_serious(table, axe)
    button = table.find_elements("css selector", "thead button")[2]
    assert button.accessible_name == "n_k"  # a formula alone would be no name


def test_a_second_column_takes_over(table):
    first, second, *_ = table.find_elements("css selector", "thead button")
    press(table, first)
    press(table, second)
    sorted_by = [header.get_attribute("aria-sort") for header in table.find_elements("tag name", "th")]
    assert sorted_by[:3] == [None, "ascending", None]
    assert table.execute_script(FIRST_CELLS)[0] == "a9"


def download(driver, button, folder: Path) -> Path:
    behavior = {"behavior": "allow", "downloadPath": str(folder)}
    driver.execute_cdp_cmd("Browser.setDownloadBehavior", behavior)
    press(driver, button)
    (path,) = wait_until("the download", lambda: [*folder.glob("*.csv"), *folder.glob("*.svg")], 20)
    return path


def test_a_table_is_saved_as_csv(table, tmp_path):
    path = download(table, table.find_element("css selector", ".tools button"), tmp_path)
    assert path.name == "page-results.csv"
    rows = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline="")))
    assert rows[0] == ["model", "time", "n_k", "share", "R_f"]
    assert rows[1] == ["b, \u201cthe second\u201d", "1.05 [1.00, 1.10] ms", "1,234", "98.2 %", "x^2"]
    assert [len(row) for row in rows] == [5] * 5
    assert all(urlsplit(url).scheme in ("file", "blob", "data") for url in requests(table))


def test_a_figure_is_saved_as_it_was_drawn(driver, tmp_path):
    show(driver, PAGE)
    button = driver.find_element("css selector", "#fig-summary-total .tools button")
    path = download(driver, button, tmp_path)
    assert path.read_bytes() == (REPORT / "figures" / "summary-total.svg").read_bytes()


def test_all_tables_of_the_report_sort_and_keep_their_rows(driver):
    show(driver, PAGE)
    tables = driver.find_elements("css selector", "main table")
    assert len(tables) >= 6
    for table in tables:
        rows = "return [...arguments[0].tBodies[0].rows].map(row => row.textContent)"
        before = driver.execute_script(rows, table)
        buttons = table.find_elements("css selector", "thead button")
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

    show(driver, PAGE)
    driver.switch_to.active_element.send_keys(Keys.TAB)
    skip = driver.switch_to.active_element
    assert skip.text == "Skip to the text"
    skip.send_keys(Keys.ENTER)
    assert driver.switch_to.active_element.get_attribute("id") == "content"


def test_the_contents_are_open_where_there_is_room(driver):
    script = "return document.querySelector('.contents details').open"
    for width, is_open in ((1500, True), (1280, False)):
        show(driver, PAGE)
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        wait_until("the contents to follow", lambda is_open=is_open: driver.execute_script(script) == is_open, 5)


def test_the_page_is_complete_without_its_script(driver):
    text = """
        const page = document.querySelector('main').cloneNode(true);
        page.querySelectorAll('.sliders').forEach(box => box.remove()); // what the script alone can do
        return page.textContent.replace(/Save as (CSV|SVG)|Link(?=Save)/g, '').length"""
    count = "return document.querySelectorAll('main button').length"
    show(driver, PAGE)
    assert driver.execute_script(count) > 20
    full = driver.execute_script(text)
    driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        driver.get(PAGE.as_uri())
    finally:
        driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    assert driver.execute_script(count) == 0
    assert driver.execute_script(text) == pytest.approx(full, abs=200)


def test_prints_without_its_buttons(driver):
    show(driver, PAGE)
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    shown = """return ['.tools', 'nav', '.skip'].map(css =>
        [...document.querySelectorAll(css)].some(item => item.checkVisibility()))"""
    assert driver.execute_script(shown) == [False, False, False]
    assert driver.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
