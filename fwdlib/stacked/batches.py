"""A batch of any kind: its tensors, and what is left of it without them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from fwdlib.stacked.graph import Refused
from fwdlib.stacked.places import SIMPLE


def flatten_batch(batch: tuple) -> tuple[Sequence[Tensor], Hashable]:
    """Return the tensors of a batch, and a value that describes the rest of it.

    Args:
        batch: a tuple of nests of lists, tuples and dicts.

    Raises:
        Refused: if it holds other things than dense tensors and simple Python values.
    """
    if all(_is_dense(x) for x in batch):
        return batch, len(batch)
    leaves, structure = tree_flatten(batch)
    for leaf in leaves:
        if not _is_dense(leaf) and not isinstance(leaf, SIMPLE):
            kind = f"a {leaf.layout} tensor" if type(leaf) is Tensor else f"a {type(leaf).__name__}"
            raise Refused(f"the batch holds {kind}")
    values = tuple((type(leaf), leaf) for leaf in leaves if not isinstance(leaf, Tensor))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)], (str(structure), values)


def with_leaves(batch: tuple, tensors: Sequence[Tensor]) -> tuple:
    """Return the batch with other tensors in place of its own."""
    leaves, structure = tree_flatten(batch)
    rest = iter(tensors)
    return tree_unflatten([next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure)


def describe(x: Tensor) -> Hashable:
    """Return all of a tensor that a graph depends on."""
    return x.shape, x.stride(), x.dtype, x.device, x.requires_grad, x.is_conj(), x.is_neg()


def count_examples(batch: Any) -> int | None:
    """Return the length of axis 0 if all tensors of the batch have the same one, else None."""
    lengths = {len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()}
    return lengths.pop() if len(lengths) == 1 else None


def _is_dense(x: Any) -> bool:
    return (type(x) is Tensor or type(x) is nn.Parameter) and x.layout is torch.strided
