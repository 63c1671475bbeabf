"""The HTML that notebooks put out, on the pages of the site."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from report.site.outputs import clean
from tests.report.pages import Page

ROOT = Path(__file__).parents[2]
HOSTILE = (
    "<p onmouseover='f()'>said</p><script>f()</script><img src=x onerror=f()><iframe src='http://x'></iframe>"
    "<a href='javascript:f()'>here</a><svg><script>f()</script></svg><form action='http://x'></form><style>*{}</style>"
)


def test_a_hostile_output_does_nothing(tmp_path):
    kinds = ("text/html", "text/markdown", "application/javascript")
    outputs = [new_output("display_data", {kind: HOSTILE, "text/plain": "plain"}) for kind in kinds]
    book = new_notebook(cells=[new_code_cell("1", outputs=outputs, execution_count=1)])
    nbformat.write(book, tmp_path / "index.ipynb")
    settings = ["extensions = ['myst_nb', 'report.site.outputs']", "nb_execution_mode = 'off'", "html_theme = 'basic'"]
    (tmp_path / "conf.py").write_text("\n".join(settings))
    words = [sys.executable, "-m", "sphinx", "--quiet", str(tmp_path), str(tmp_path / "built")]
    subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
    page = Page(tmp_path / "built" / "index.html")
    assert "said" in page.text
    assert "f()" not in page.source
    assert page.all("iframe", "svg") == []
    assert "http://x" not in page.source
    assert "javascript:" not in page.source


@pytest.mark.parametrize("damage", ["no report", "a damaged notebook"])
def test_a_site_that_cannot_be_built_says_so_in_a_sentence(tmp_path, damage):
    page = "{{ notebooks('notebooks/*.ipynb') }}" if damage == "a damaged notebook" else "Title\n====="
    (tmp_path / "index.rst").write_text(page)
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "1a.ipynb").write_text("{")
    code = "from pathlib import Path\nfrom report.site import pages\nroot = Path(__file__).parent\n"
    code += (
        "pages.ROOT, pages.REPORT = root, root / 'report'\nextensions = ['sphinx.ext.autodoc', 'report.site.pages']\n"
    )
    (tmp_path / "conf.py").write_text(code + "exclude_patterns = ['notebooks']")
    words = [sys.executable, "-m", "sphinx", "--quiet", str(tmp_path), str(tmp_path / "built")]
    ended = subprocess.run(words, cwd=ROOT, check=False, capture_output=True, text=True)
    assert ended.returncode
    assert "Traceback" not in ended.stderr
    assert ("report.html" if damage == "no report" else "does not appear to be JSON") in ended.stderr


def test_a_table_and_a_picture_stay():
    table = '<table border="1" class="dataframe"><thead><tr style="text-align: right;"><th>a</th></tr></thead></table>'
    picture = '<img alt="a curve" src="data:image/gif;base64,R0lGODlh">'
    assert clean(f"<style scoped>th {{}}</style>{table}") == table
    assert clean(picture).count("data:image/gif;base64,R0lGODlh") == 1
