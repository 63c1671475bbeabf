"""The course site in a real browser: its search, its menus, its folded solutions, by keyboard and from ``file://``.

Not part of `make test`; `make test-browser` runs it. It reads what `make site` has built.
"""

from __future__ import annotations

import pytest

from tests.browser.chromium import MARKS, ROOT, press, requests, show, wait_until

pytestmark = MARKS

SITE = ROOT / "build" / "site"
NOTEBOOK = SITE / "notebooks" / "1b_logistic_forward.html"


def test_the_first_tab_skips_to_the_text(driver):
    from selenium.webdriver.common.keys import Keys

    show(driver, NOTEBOOK)
    driver.switch_to.active_element.send_keys(Keys.TAB)
    skip = driver.switch_to.active_element
    assert skip.get_attribute("textContent") == "Skip to main content"
    wait_until("the link to be seen", skip.is_displayed, 10)
    skip.send_keys(Keys.ENTER)
    driver.switch_to.active_element.send_keys(Keys.TAB)  # the next stop is in the text
    inside = "return document.getElementById('main-content').contains(document.activeElement)"
    assert driver.execute_script(inside)


def test_a_folded_solution_opens_by_keyboard(driver):
    show(driver, NOTEBOOK)
    details = driver.find_element("css selector", "main details")
    code = details.find_element("tag name", "pre")
    assert not code.is_displayed()
    press(driver, details.find_element("tag name", "summary"))
    assert code.is_displayed()


def test_search_finds_pages_without_a_server(driver):
    show(driver, SITE / "search.html")
    driver.get(f"{(SITE / 'search.html').as_uri()}?q=orthonormal")
    found = "return [...document.querySelectorAll('#search-results li a')].map(link => link.getAttribute('href'))"
    links = wait_until("search results", lambda: driver.execute_script(found), 20)
    assert any(link.startswith("api/core.html") for link in links)
    assert [url for url in requests(driver) if url.startswith("http")] == []


@pytest.mark.parametrize(("scheme", "other"), [("light", "dark"), ("dark", "light")])
def test_the_reader_can_choose_the_other_scheme(driver, scheme, other):
    def background() -> str:
        return driver.execute_script("return getComputedStyle(document.body).backgroundColor")

    show(driver, NOTEBOOK, scheme=other)
    expected = background()
    show(driver, NOTEBOOK, scheme=scheme)
    assert background() != expected
    press(driver, driver.find_element("css selector", ".theme-switch-button"))
    entry = driver.find_element("css selector", f".theme-change-button[data-mode={other}]")
    wait_until("the choice of schemes", entry.is_displayed, 10)
    press(driver, entry)
    wait_until("the other scheme", lambda: background() == expected, 10)
    driver.execute_script("localStorage.clear()")


def test_the_menu_of_a_phone_opens_by_keyboard(driver):
    show(driver, NOTEBOOK, "phone")
    entry = driver.find_element("css selector", ".bd-sidebar-primary a.current, #pst-primary-sidebar a.current")
    assert not entry.is_displayed()
    buttons = driver.find_elements("css selector", "button.primary-toggle, .primary-toggle")
    press(driver, next(button for button in buttons if button.is_displayed()))
    wait_until(
        "the menu", lambda: driver.execute_script("return !!document.querySelector('dialog[open] a.current')"), 10
    )


def test_formulas_are_set(driver):
    show(driver, SITE / "api" / "core.html")
    ready = "return document.querySelectorAll('mjx-container').length"
    assert wait_until("MathJax", lambda: driver.execute_script(ready), 60) > 10
    assert driver.execute_script("return document.querySelectorAll('mjx-merror').length") == 0


def test_prints_its_folded_parts_on_white(driver):
    show(driver, NOTEBOOK, scheme="dark")
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    heights = (
        "return [...document.querySelectorAll('main details pre')].map(item => item.getBoundingClientRect().height)"
    )
    assert min(driver.execute_script(heights)) > 10
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
