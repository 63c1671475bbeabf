"""A real JupyterLab in a real browser: open a notebook, Run All Cells, and see what a student sees.

Not part of `make test`; `make test-browser` runs it, through tests/browser.sh, which says what it needs.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser.chromium import MARKS, ROOT, wait_until

pytestmark = MARKS

NOTEBOOKS = ROOT / "notebooks"
NAME = "1b_logistic_forward.ipynb"
EXERCISE = "my_forward_gradient"  # solved here with the notebook's own solution; the other one stays a stub
# What the page shows of the cells that are near the view: JupyterLab renders the others when they are scrolled to.
READ_CELLS = """
return [...document.querySelectorAll('.jp-Notebook .jp-Cell[data-windowed-list-index]')].map(cell => ({
    index: Number(cell.dataset.windowedListIndex),
    code: cell.classList.contains('jp-CodeCell'),
    prompt: cell.querySelector('.jp-InputPrompt')?.textContent.trim() ?? '',
    source: cell.querySelector('.jp-InputArea .cm-content')?.textContent ?? '',
    output: cell.querySelector('.jp-OutputArea')?.textContent ?? '',
    errors: cell.querySelectorAll('[data-mime-type$="jupyter.error"], [data-mime-type$="jupyter.stderr"]').length,
    images: [...cell.querySelectorAll('.jp-OutputArea img')].map(img => [img.naturalWidth, img.clientWidth]),
}));
"""
SCROLLER = "const panel = document.querySelector('.jp-Notebook .jp-WindowedPanel-outer');"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def prepare(folder: Path) -> int:
    """Copy the notebooks, solve one exercise of NAME, strip its outputs; return its number of cells with code."""
    shutil.copytree(NOTEBOOKS, folder, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    path = folder / NAME
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = [cell | {"source": "".join(cell["source"])} for cell in notebook["cells"]]
    for cell, following in itertools.pairwise(cells):
        if cell["cell_type"] == "code" and f"def {EXERCISE}" in cell["source"]:
            solution = re.search(r"```python\n(.*?)```", following["source"], re.DOTALL)[1]
            stub = re.compile(rf"def {EXERCISE}\(.*?\):\n    raise NotImplementedError\n")
            cell["source"], count = stub.subn(lambda _, text=solution: text, cell["source"])
            assert count == 1, f"{NAME} has no stub of {EXERCISE}"
    for cell in cells:  # nothing that was committed can pass for what this run has made
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
    path.write_text(json.dumps(notebook | {"cells": cells}), encoding="utf-8")
    return sum(cell["cell_type"] == "code" and bool(cell["source"].strip()) for cell in cells)


@pytest.fixture
def folder() -> Iterator[Path]:
    # Not tmp_path: its long name breaks the limit of 107 characters on Chromium's socket.
    with tempfile.TemporaryDirectory(prefix="fwdlib-", ignore_cleanup_errors=True) as path:
        yield Path(path)


@pytest.fixture
def lab(folder) -> Iterator[str]:
    """A JupyterLab of its own on a copy of the notebooks, that knows nothing of the user's; gives its address."""
    env = os.environ | {f"JUPYTER_{kind}_DIR": str(folder / "jupyter" / kind) for kind in ("CONFIG", "DATA", "RUNTIME")}
    env |= {"IPYTHONDIR": str(folder / "ipython"), "FWDLIB_RESULTS": str(folder / "results"), "FWDLIB_QUICK": "1"}
    env.pop("MPLBACKEND", None)  # the tests' own; the kernel knows its own
    if data := env.get("FWDLIB_DATA"):
        env["FWDLIB_DATA"] = str(Path(data).expanduser().resolve())  # the kernel's working folder is another
    port = free_port()
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1"]
    command += [f"--ServerApp.port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token="]
    command += [f"--ServerApp.root_dir={folder / 'notebooks'}"]
    # Else JupyterLab asks whether it may fetch news, in front of the notebook.
    settings = folder / "jupyter/CONFIG/lab/user-settings/@jupyterlab/apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
    address, log = f"http://127.0.0.1:{port}", folder / "jupyterlab.log"

    def is_up() -> bool:
        assert server.poll() is None, f"JupyterLab ended:\n{log.read_text()[-3000:]}"
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{address}/api/status", timeout=2):
                return True
        except OSError:
            return False

    with log.open("w") as stream:
        server = subprocess.Popen(command, env=env, stdout=stream, stderr=subprocess.STDOUT)
    try:
        wait_until("JupyterLab to start", is_up)
        yield address
    finally:
        server.terminate()  # it ends its kernels
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def click(browser, css: str, text: str) -> None:
    """Click the element that shows exactly ``text``, once it is there."""

    def find():
        shown = [item for item in browser.find_elements("css selector", css) if item.is_displayed()]
        return next((item for item in shown if item.text.strip() == text), None)

    wait_until(f"{text!r} in {css}", find).click()


def scroll_through(browser, folder: Path) -> dict[int, dict]:
    """Scroll the notebook from top to bottom, as a reader does; return what each cell has shown, by its index."""
    cells: dict[int, dict] = {}
    browser.execute_script(SCROLLER + "panel.scrollTop = 0")
    for view in itertools.count():
        time.sleep(0.5)  # to render
        screenshot(browser, folder / f"{view:02d}.png")
        for cell in browser.execute_script(READ_CELLS):
            before = cells.get(cell["index"], cell)
            # A cell that leaves the view may drop what it has shown: keep the fuller one.
            cells[cell["index"]] = max(before, cell, key=lambda seen: len(seen["output"]) + 1000 * len(seen["images"]))
        step = SCROLLER + "const top = panel.scrollTop; panel.scrollTop += 0.6 * panel.clientHeight;"
        if not browser.execute_script(step + "return panel.scrollTop > top"):
            return cells


def screenshot(browser, path: Path) -> None:
    """Save what is in view, for the eye; if FWDLIB_SCREENSHOT is set, it names the file that keeps it.

    The views of scrolling through are numbered: with FWDLIB_SCREENSHOT=/tmp/lab.png, /tmp/lab-00.png is the top.
    """
    browser.save_screenshot(str(path))
    if kept := os.environ.get("FWDLIB_SCREENSHOT"):
        target = Path(kept).expanduser().resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target if path.stem == "end" else target.with_stem(f"{target.stem}-{path.stem}"))


def test_run_all_cells_as_a_student_does(folder, request):
    num_code, path = prepare(folder / "notebooks"), folder / "notebooks" / NAME
    address, browser = request.getfixturevalue("lab"), request.getfixturevalue("driver")
    browser.get(f"{address}/lab/tree/{NAME}")

    def status() -> str:
        script = "return document.querySelector('.jp-Notebook-ExecutionIndicator')?.dataset.status ?? ''"
        return browser.execute_script(script)

    wait_until("an idle kernel", lambda: status() == "idle")
    click(browser, ".lm-MenuBar-itemLabel", "Run")
    click(browser, ".lm-Menu-itemLabel", "Run All Cells")

    def executed() -> list[dict] | None:
        """Save; return the cells with code, also those out of view, if all have been executed and none is running."""
        if status() != "idle":
            return None
        before = path.stat().st_mtime_ns
        click(browser, ".lm-MenuBar-itemLabel", "File")
        click(browser, ".lm-Menu-itemLabel", "Save Notebook")
        wait_until("the notebook to be saved", lambda: path.stat().st_mtime_ns > before)
        try:
            notebook = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError:  # being written
            return None
        code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code" and "".join(cell["source"]).strip()]
        return code if all(cell["execution_count"] for cell in code) else None

    try:
        saved = wait_until("all cells to be executed", executed)
    finally:
        screenshot(browser, folder / "end.png")
    assert [cell["execution_count"] for cell in saved] == list(range(1, num_code + 1))

    cells = scroll_through(browser, folder)
    code = [cell for _, cell in sorted(cells.items()) if cell["code"] and cell["source"].strip()]
    assert [cell["prompt"] for cell in code] == [f"[{count}]:" for count in range(1, num_code + 1)]
    assert [cell["source"] for cell in code if cell["errors"]] == [], "cells that show an error or stderr"
    assert "JavaScript Error" not in str(cells)

    drawn = [shown for shown, cell in zip(code, saved, strict=True) if "image/png" in str(cell["outputs"])]
    assert len(drawn) >= 3
    for cell in drawn:
        sizes = [size for image in cell["images"] for size in image]
        assert sizes, f"no image is on the page for {cell['source']}"
        assert min(sizes) > 0, f"an image is empty, or not visible, after {cell['source']}"

    outputs = "\n".join(cell["output"] for cell in code)
    assert f"{EXERCISE}: right." in outputs
    assert outputs.count(": not solved yet;") == sum("raise NotImplementedError" in cell["source"] for cell in code) > 0
