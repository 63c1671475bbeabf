"""What the tests in a real browser share: how Chromium is started and seen through."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MARKS = [
    pytest.mark.browser,
    pytest.mark.skipif(os.environ.get("FWDLIB_BROWSER") != "1", reason="run by `make test-browser`"),
]
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1280,1000"
)
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
SCHEMES = ("light", "dark")


def chromedriver() -> str:
    """Return the path of chromedriver. Without one selenium would try to download its own."""
    return shutil.which("chromedriver") or pytest.fail("chromedriver is not on the PATH; tests/browser.sh installs it")


def wait_until(what: str, condition, timeout: float = 120):
    """Return the first true value of ``condition()``."""
    end = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > end:
            pytest.fail(f"waited {timeout:g} s in vain for {what}")
        time.sleep(0.25)
    return value


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
    driver.execute_async_script("""const done = arguments[0];
        (window.MathJax?.startup?.promise ?? Promise.resolve()).then(
            () => requestAnimationFrame(() => setTimeout(done, 100)))""")


def requests(driver) -> list[str]:
    """Return the addresses that were asked for, over any protocol, since the page was opened."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    names = {"Network.requestWillBeSent": "request", "Network.webSocketCreated": None}
    sent = [message for message in messages if message["method"] in names]
    return [(m["params"].get("request") or m["params"])["url"] for m in sent]


def press(driver, element) -> None:
    from selenium.webdriver.common.keys import Keys

    driver.execute_script("arguments[0].focus()", element)
    element.send_keys(Keys.ENTER)
