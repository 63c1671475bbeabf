"""A batch of any kind: its tensors, and what is left of it without them."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves


def describe(x: Tensor) -> Hashable:
    """Return all of a tensor that a graph depends on."""
    return x.shape, x.stride(), x.dtype, x.device, x.requires_grad, x.is_conj(), x.is_neg()


def count_examples(batch: Any) -> int | None:
    """Return the length of axis 0 if all tensors of the batch have the same one, else None."""
    lengths = {len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()}
    return lengths.pop() if len(lengths) == 1 else None
