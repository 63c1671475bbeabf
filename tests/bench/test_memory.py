"""Peak memory: of known work, in a process of its own, and the reason why it could not be measured."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

from fwdlib.bench import memory


def allocate(num_bytes: int, before: int) -> Callable[[], object]:
    held = torch.ones(before // 4)
    print("words that are not the result")
    return lambda: held.sum() + torch.ones(num_bytes // 4).sum()


def fail(message: str) -> None:
    raise ValueError(message)


def end_with(code: int) -> None:
    os._exit(code)


def test_only_what_the_work_itself_takes_is_counted():
    found = memory.peak_bytes("tests.bench.test_memory:allocate", {"num_bytes": 2**26, "before": 2**27})
    assert 2**26 <= found < 1.5 * 2**26


def test_memory_without_the_peak_of_linux(monkeypatch):
    pytest.importorskip("resource")
    monkeypatch.setattr(memory, "_forget_peak", lambda: False)
    before, peak = memory._resident_memory()
    held = torch.ones(1 << 24) if before else None
    assert peak() >= before > 1e7
    del held


def test_memory_that_cannot_be_measured_says_why():
    with pytest.raises(RuntimeError, match="ValueError: no luck"):
        memory.peak_bytes("tests.bench.test_memory:fail", {"message": "no luck"})
    with pytest.raises(RuntimeError, match="ended with code 3"):
        memory.peak_bytes("tests.bench.test_memory:end_with", {"code": 3})


def several(sizes: list[int]) -> list[Callable[[], object]]:
    return [lambda size=size: torch.ones(size // 4).sum() for size in sizes]


def test_several_pieces_of_work_in_one_process_are_counted_one_by_one():
    sizes = [2**26, 2**25, 2**26]
    found = memory.peaks_bytes("tests.bench.test_memory:several", {"sizes": sizes})
    # a few pages that the piece before has left may serve again
    assert all(0.99 * size <= peak < 1.5 * size for size, peak in zip(sizes, found, strict=True))
