"""What holds for all tests of the benchmark: nothing is compiled, and the allocator stays as it is."""

from __future__ import annotations

import pytest

from fwdlib import runtime


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch):
    monkeypatch.setattr(runtime, "has_compiler", lambda: False)


@pytest.fixture(autouse=True)
def same_allocator(monkeypatch):
    """The allocator's settings would hold for the whole process, so for other tests, too."""
    monkeypatch.setattr(runtime, "keep_freed_memory", lambda: False)
