"""Comparison of what checkpoints hold."""

from __future__ import annotations

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
