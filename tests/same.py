"""Comparison of what checkpoints and trainings hold."""

from __future__ import annotations

from pathlib import Path

import torch


def assert_same(first, second) -> None:
    """Compare nested dicts and lists of tensors and numbers, bit for bit, all but times."""
    if isinstance(first, dict):
        assert list(first) == list(second)
        for key in first:
            if key not in ("step_seconds", "seconds"):
                assert_same(first[key], second[key])
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)
    elif isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype
        assert torch.equal(first, second)
    else:
        assert repr(first) == repr(second)


def assert_same_training(first: Path, second: Path) -> None:
    """Compare the folders of two trainings: the checkpoints and the logs, bit for bit, all but times."""
    assert_same(*(torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (first, second)))
    logs = [[line.split(",") for line in (folder / "log.csv").read_text().splitlines()] for folder in (first, second)]
    rows, others = ([[*row[:4], row[-1]] for row in log] for log in logs)
    assert rows == others
