"""Fixtures of the report's tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fwdlib.results import write_json
from tests.report.records import make_results


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Path:
    """Made-up records, for tests that leave them as they are."""
    return make_results(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def results(tmp_path) -> Path:
    """Made-up records, for tests that change them."""
    return make_results(tmp_path / "results")


@pytest.fixture
def load(request, tmp_path) -> Callable[[Any], Any]:
    """Return what saves made-up results and loads them as ``section`` does, a name in the test's module."""
    section = request.module.section
    name = section.__name__.rpartition(".")[2]

    def through_a_file(found: Any) -> Any:
        write_json(tmp_path / f"{name}.json", found)
        return section.load(tmp_path)

    return through_a_file
