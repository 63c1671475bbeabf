"""What all sections of the report with a study of their own have in common."""

from __future__ import annotations

import pytest

from report.page.context import PARTS
from tests.report.records import text_of


@pytest.mark.parametrize("name", PARTS)
def test_a_section_whose_study_was_not_made_is_left_out(name, saved, tmp_path):
    section = PARTS[name]
    found = section.load(tmp_path)
    assert section.context(found) is None
    assert section.figures(found) == {}
    assert f"{{#{name.replace('_', '-')}" not in text_of(saved)
