"""Torch functions whose forward derivative is missing or differs from backprop's, written by others that have it.

Both engines call these in place of torch's. Under :data:`CONTEXTS` torch itself chooses kernels that have a derivative.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Compute ``torch._weight_norm``, which has no forward derivative."""
    length = v.norm() if dim == -1 else torch.norm_except_dim(v, 2, dim)  # -1 stands for all axes
    return v * (g / length)


def embedding(
    indices: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Compute ``F.embedding``, whose forward derivative in torch ignores ``padding_idx`` and ``scale_grad_by_freq``.

    As in torch's backward pass, the row at ``padding_idx`` has no derivative, renormalised rows have that of the
    identity, and ``scale_grad_by_freq`` divides the derivative of a row by the number of its uses.
    """
    if max_norm is not None:
        with forward_ad._set_fwd_grad_enabled(False), torch.no_grad():
            torch.embedding_renorm_(weight.detach(), indices.contiguous(), max_norm, norm_type)
    rows = F.embedding(indices, weight, padding_idx)  # checks the index
    if padding_idx is None and not scale_grad_by_freq:
        return rows
    with forward_ad._set_fwd_grad_enabled(False):
        values = F.embedding(indices, weight)  # the same rows, without tangents
    if scale_grad_by_freq:
        counts = F.one_hot(indices.flatten(), len(weight)).sum(0)
        rows = values + (rows - values) / counts[indices].unsqueeze(-1)
    if padding_idx is not None:
        rows = torch.where((indices == padding_idx % len(weight)).unsqueeze(-1), values, rows)
    return rows


def torch_embedding(
    weight: Tensor, indices: Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> Tensor:
    """Compute ``torch.embedding``, where a negative index means that no row is one of padding."""
    return embedding(indices, weight, None if padding_idx < 0 else padding_idx, scale_grad_by_freq=scale_grad_by_freq)


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    *,
    look_up: Callable[..., Tensor] = embedding,
) -> Tensor:
    """Compute ``F.embedding_bag``, which has no forward derivative: look the rows up, and sum them by bag.

    The arguments are those of ``F.embedding_bag``, and ``look_up``, a function like ``F.embedding``.
    """
    if input.dim() == 2:
        num_bags = len(input)
        bags = torch.arange(num_bags, device=input.device).repeat_interleave(input.shape[1])
        input, per_sample_weights = (
            input.flatten(),
            None if per_sample_weights is None else per_sample_weights.flatten(),
        )
    else:
        num_bags = len(offsets) - include_last_offset
        positions = torch.arange(len(input), device=input.device)
        bags = torch.searchsorted(offsets[:num_bags].to(positions.dtype).contiguous(), positions, right=True) - 1
    if padding_idx is not None:  # such entries are in no bag
        kept = input != padding_idx % len(weight)
        input, bags = input[kept], bags[kept]
        per_sample_weights = None if per_sample_weights is None else per_sample_weights[kept]
    rows = look_up(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(-1)
    pooled = weight.new_zeros(num_bags, weight.shape[1])
    if mode == "max":
        return pooled.scatter_reduce(0, bags.unsqueeze(-1).expand_as(rows), rows, "amax", include_self=False)
    pooled = pooled.index_add(0, bags, rows)
    if mode == "mean":
        pooled = pooled / bags.bincount(minlength=num_bags).clamp(min=1).unsqueeze(-1)
    return pooled


def _of_symmetric(func: Callable) -> Callable:
    # A function that reads one triangle of a symmetric matrix. Its backward pass gives both triangles one gradient, and
    # its forward derivative is right for symmetric tangents alone: the tangent is made symmetric, the value is kept.
    @functools.wraps(func)
    def call(*args: Any, **kwargs: Any) -> Any:
        matrix, *rest = args or [kwargs.pop("input")]
        change = (matrix.mH - matrix) / 2
        return func(matrix + (change - change.detach()), *rest, **kwargs)

    return call


def prelu(input: Tensor, weight: Tensor) -> Tensor:
    """Compute ``F.prelu``, whose forward derivative at 0 is not that of the backward pass."""
    value = torch.prelu(input, weight)  # checks the shapes
    weight = weight.reshape((-1, *[1] * (input.dim() - 2)) if weight.numel() > 1 else ())
    return torch.where(input > 0, input, weight * input).to(value.dtype)


def l1_loss(*args: Any, **kwargs: Any) -> Tensor:
    """Compute ``F.l1_loss`` without a weight, which torch does not pass on to function overrides.

    Raises:
        NotImplementedError: if it was called with one.
    """
    frame = sys._getframe()
    while frame is not None and frame.f_code is not F.l1_loss.__code__:
        frame = frame.f_back
    if frame is not None and frame.f_locals.get("weight") is not None:
        raise NotImplementedError(
            "torch.nn.functional.l1_loss loses its weight under function overrides, by which the engines work. Write "
            "(weight * (x - y).abs()).sum() / weight.sum()."
        )
    return F.l1_loss(*args, **kwargs)


def _unless_ignored(func: Callable) -> Callable:
    # A loss whose mean is nan where all targets are ignored: its gradient is zero in backprop, and nan in forward mode.
    signature = inspect.signature(func)

    @functools.wraps(func)
    def call(*args: Any, **kwargs: Any) -> Tensor:
        loss, given = func(*args, **kwargs), signature.bind(*args, **kwargs)
        given.apply_defaults()
        target = given.arguments["target"]
        if given.arguments["reduction"] != "mean" or target.is_floating_point():
            return loss
        return torch.where((target == given.arguments["ignore_index"]).all(), loss.detach(), loss)

    return call


@contextmanager
def _without_mkldnn() -> Iterator[None]:
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


_with_math = functools.partial(sdpa_kernel, SDPBackend.MATH)
CONTEXTS: dict[Callable, Callable[[], AbstractContextManager]] = {
    # function -> a context in which torch computes it by kernels that have a forward derivative
    F.scaled_dot_product_attention: _with_math,
    F.multi_head_attention_forward: _with_math,
    torch.lstm: _without_mkldnn,
}
REPLACEMENTS: dict[Callable, Callable] = {
    torch._weight_norm: weight_norm,
    F.embedding: embedding,
    torch.embedding: torch_embedding,
    F.embedding_bag: embedding_bag,
    **dict.fromkeys([F.prelu, torch.prelu, Tensor.prelu], prelu),
    F.l1_loss: l1_loss,
    **{func: _unless_ignored(func) for func in (F.cross_entropy, F.nll_loss)},
    **{func: _of_symmetric(func) for func in (torch.linalg.cholesky, torch.linalg.cholesky_ex, torch.linalg.eigh)},
    **{func: _of_symmetric(func) for func in (torch.cholesky, Tensor.cholesky)},
}
"""Function -> the same function, with a forward derivative that is the gradient along the tangent."""
