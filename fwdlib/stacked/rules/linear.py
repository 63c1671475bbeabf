"""Rules of linear functions with two operands: linear layers, embeddings, matrix products and attention."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fwdlib.stacked.dual import Dual, same_rows
from fwdlib.stacked.forward_pass import Pass, register_rule
from fwdlib.stacked.rules.rows import dual_of, with_axes


@register_rule(F.linear)
def linear(run: Pass, x: Any, weight: Any, bias: Any = None) -> Dual:
    """Compute one product for all rows; the perturbation computes the term from the weight's own tangent."""
    with torch._C.DisableTorchFunctionSubclass():
        is_matrix = weight.dim() == 2
    if not is_matrix:
        return NotImplemented
    if isinstance(weight, Dual) or isinstance(bias, Dual):  # the weight is itself a result
        with run:
            product = torch.matmul(x, weight.transpose(-1, -2))
            return product if bias is None else product + bias
    weight_name, bias_name = run.name_of(weight), run.name_of(bias)
    if not run.has_tangents(x):
        outputs = F.linear(x, weight, bias)
        return dual_of(outputs, run.perturbation.linear(weight_name, bias_name, x, outputs))
    if torch.is_grad_enabled() and weight_name is bias_name is None:
        return Dual.of(F.linear(x.primal, weight, bias), F.linear(x.tangents, weight.detach()))
    stack = run.stack(x)
    rows = F.linear(stack.flatten(0, -2), weight).reshape(*stack.shape[:-1], -1)
    outputs, tangents = rows[0], rows[1:]
    if bias is not None:
        outputs.add_(bias)
    if weight_name is not None or bias_name is not None:
        tangents.add_(run.perturbation.linear(weight_name, bias_name, stack[0], outputs))
    return Dual(rows)


@register_rule(F.embedding)
def embedding(
    run: Pass,
    indices: Any,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """Take rows of the table and of its tangents. The row at ``padding_idx`` has neither a tangent nor a gradient."""
    if (name := run.name_of(weight)) is None or max_norm is not None:
        return NotImplemented
    tangents = run.perturbation.rows(name, indices)
    if padding_idx is not None:
        tangents = tangents.masked_fill((indices == padding_idx % len(weight)).unsqueeze(-1), 0)
    return dual_of(F.embedding(indices, weight), tangents)


@register_rule(torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__)
def matmul(run: Pass, x: Any, other: Any) -> Any:
    """Apply the product rule, for matrices and batches of them."""
    a, b = run.stack(x), run.stack(other)
    if a.dim() < 3 or b.dim() < 3:  # vectors
        return NotImplemented
    moves = isinstance(x, Dual) and a.dim() < b.dim()
    if moves or (isinstance(other, Dual) and (b.dim() == 3 or b.dim() < a.dim())):
        run.mix_examples()  # the product sums over the examples, or moves their axis
    num_axes = max(a.dim(), b.dim()) - 1
    a, b = with_axes(a, num_axes), with_axes(b, num_axes)
    if len(a) == 1 or len(b) == 1:
        return Dual(torch.matmul(a, b))
    a, b = same_rows([a, b])
    return dual_of(torch.matmul(a[0], b[0]), torch.matmul(a[1:], b[0]) + torch.matmul(a[0], b[1:]))


@register_rule(Tensor.__rmatmul__)
def rmatmul(run: Pass, x: Any, other: Any) -> Any:
    """Multiply with the operands exchanged."""
    return matmul(run, other, x)


@register_rule(F.scaled_dot_product_attention)
def scaled_dot_product_attention(
    run: Pass,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Compute attention by its formula, because torch's fused kernels have no forward derivative."""
    if enable_gqa:
        return NotImplemented
    with run:
        scores = torch.matmul(query, key.transpose(-1, -2)) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=scores.dtype).masked_fill(~attn_mask, -math.inf)
        if attn_mask is not None:
            scores = scores + attn_mask
        return torch.matmul(F.dropout(torch.softmax(scores, -1), dropout_p), value)
