"""Fixtures of the report's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.report.records import make_results


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Path:
    """Made-up records, for tests that leave them as they are."""
    return make_results(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def results(tmp_path) -> Path:
    """Made-up records, for tests that change them."""
    return make_results(tmp_path / "results")
