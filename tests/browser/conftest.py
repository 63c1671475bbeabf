"""One Chromium for the tests of a file, and the accessibility checker that runs in its pages."""

from __future__ import annotations

import base64
import hashlib
import shutil
import tarfile
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from fwdlib import runtime
from tests.browser.chromium import FLAGS, chromedriver

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
        service = webdriver.ChromeService(executable_path=chromedriver())
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
