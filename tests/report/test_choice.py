"""The table "Should I use it?": its rows come from the results, and each row only where its study was made."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

from report import notebooks
from report.page.context import build_context, load_results
from report.sections import choice

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def context():
    return build_context(load_results(ROOT / "report" / "results"))


def has_rivals(context):
    return context["cost"]["depth"]["rivals"] is not None  # those in memory, which the benchmark measures beside depth


def test_every_row_has_a_number_and_a_section_of_the_report(context):
    template = "".join(path.read_text() for path in (ROOT / "report/sections").glob("*.j2"))
    found = choice.rows(context)
    assert len(found) == 8 if has_rivals(context) else 7
    for row in found:
        assert re.search(r"\d", row.measured)
        assert f"{{#{row.section}}}" in template


def test_a_study_that_was_not_made_has_no_row(context):
    kept = {row.section for row in choice.rows(context | {"sensitivity": None, "scaling": None})}
    assert kept == {"protocols", "feedback"} | ({"cost"} if has_rivals(context) else set())


def test_without_any_study_there_is_no_row(saved):
    assert choice.rows(build_context(load_results(saved))) == []


def test_the_advice_on_links_is_about_one_method(context):
    (row,) = [row for row in choice.rows(context) if row.section == "scaling"]
    fewest = context["scaling"]["slowest"]["ratios"]["FG-RANK1, K = 1"]
    assert f"{fewest.estimate:.1f}" in row.measured


def test_the_start_notebook_shows_the_numbers_of_the_committed_results():
    path = ROOT / "notebooks" / "0_start.ipynb"
    notebook = nbformat.read(path, as_version=4)
    before = [cell.source for cell in notebook.cells]
    notebooks.write_reasons(notebook)
    assert [cell.source for cell in notebook.cells] == before, "run: make notebooks ARGS='--write-only'"
