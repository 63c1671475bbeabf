"""Rules of linear functions with two operands: linear layers, embeddings, matrix products and attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from string import ascii_letters
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fwdlib.forward import replacements
from fwdlib.stacked.dual import Dual, same_rows
from fwdlib.stacked.forward_pass import Pass, register_rule
from fwdlib.stacked.rules.rows import dual_of, is_autocast, padded_rows, with_axes
from fwdlib.stacked.rules.signatures import rule_of


@rule_of(F.linear)
def linear(run: Pass, x: Any, weight: Any, bias: Any = None) -> Any:
    """Compute one product for all rows; the perturbation computes the term from the weight's own tangent."""
    with torch._C.DisableTorchFunctionSubclass():
        fits = bias is None or bias.shape == weight.shape[:1]  # torch broadcasts other biases
        is_layer = weight.dim() == 2 and fits and x.numel() and weight.shape[0]
    if not is_layer:
        return NotImplemented
    if isinstance(weight, Dual) or isinstance(bias, Dual):  # the weight is itself a result
        with run:
            product = torch.matmul(x, weight.transpose(-1, -2))
            return product if bias is None else product + (bias.to(product.dtype) if is_autocast(product) else bias)
    weight_name, bias_name = run.name_of(weight), run.name_of(bias)
    if not run.has_tangents(x):
        outputs = F.linear(x, weight, bias)
        return dual_of(outputs, run.perturbation.linear(weight_name, bias_name, x, outputs), are_new=True)
    if torch.is_grad_enabled() and weight_name is bias_name is None:
        return Dual.of(F.linear(x.primal, weight, bias), F.linear(x.tangents, weight.detach()))
    stack = run.stack(x)
    rows = F.linear(stack, weight)
    outputs, tangents = rows[0], rows[1:]
    if bias is not None:
        outputs.add_(bias)
    if weight_name is not None or bias_name is not None:
        run.perturbation.linear(weight_name, bias_name, stack[0], outputs, tangents)
    return Dual(rows)


@rule_of(F.embedding)
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
    """Take rows of the table and of its tangents.

    As in torch's backward pass, the row at ``padding_idx`` has no derivative, renormalised rows have that of the
    identity, and with ``scale_grad_by_freq`` the derivative of a row is divided by the number of its uses.
    """
    if not run.has_tangents(weight):
        return NotImplemented
    table = weight.primal if isinstance(weight, Dual) else weight
    if table.dim() != 2 or (padding_idx is not None and not -len(table) <= padding_idx < len(table)):
        return NotImplemented
    if max_norm is not None:
        torch.embedding_renorm_(table.detach(), indices.contiguous(), max_norm, norm_type)
    name, padding_idx = run.name_of(weight), None if padding_idx is None else padding_idx % len(table)
    tangents = weight.tangents[:, indices] if name is None else run.perturbation.rows(name, indices, padding_idx)
    if padding_idx is not None:
        tangents = tangents.masked_fill((indices == padding_idx).unsqueeze(-1), 0)
    if scale_grad_by_freq:
        tangents = tangents / indices.flatten().bincount()[indices].unsqueeze(-1)
    return dual_of(F.embedding(indices, table), tangents)


@rule_of(torch.embedding)
def torch_embedding(
    run: Pass,
    weight: Any,
    indices: Any,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """Reorder the arguments for :func:`embedding`; a negative index means that no row is one of padding."""
    padding_idx = None if padding_idx < 0 else padding_idx
    return embedding(run, indices, weight, padding_idx, scale_grad_by_freq=scale_grad_by_freq)


@rule_of(F.embedding_bag)
def embedding_bag(run: Pass, indices: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
    """Look the rows up by :func:`embedding`, and sum them by bag."""
    with run:
        return replacements.embedding_bag(indices, weight, *args, **kwargs, look_up=F.embedding)


@rule_of(torch._weight_norm)
def weight_norm(run: Pass, v: Any, g: Any, dim: int = 0) -> Any:
    """Differentiate v g / |v|, where the norm is over all axes except ``dim``, or over all if it is -1."""
    v, scale = padded_rows(run, v), padded_rows(run, g)
    g = with_axes(scale, v.dim() - 1)
    if v.dim() < 3 or scale.dim() not in (1, v.dim()) or not -1 <= dim < v.dim() - 1:
        return NotImplemented
    axes = [axis for axis in range(1, v.dim()) if axis != dim + 1 or dim == -1]
    norm = torch.norm_except_dim(v[0], 2, dim)
    unit = v[0] / norm
    along = (unit * v[1:]).sum(axes, keepdim=True)
    return dual_of(torch._weight_norm(v[0], scale[0], dim), unit * g[1:] + (v[1:] - unit * along) * (g[0] / norm))


@rule_of(torch.matmul, Tensor.matmul, Tensor.__matmul__)
def matmul(run: Pass, x: Any, other: Any) -> Any:
    """Apply the product rule, for matrices and batches of them."""
    if not (isinstance(x, Tensor) and isinstance(other, Tensor)):
        return NotImplemented
    if x.layout is not torch.strided or other.layout is not torch.strided:
        return NotImplemented
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


def _product(num_axes: int, *functions: Callable) -> None:
    """Register a product of operands with so many axes each."""

    @rule_of(*functions)
    def rule(run: Pass, x: Any, mat2: Any) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            fits = isinstance(mat2, Tensor) and x.dim() == mat2.dim() == num_axes
        return matmul(run, x, mat2) if fits else NotImplemented


_product(2, torch.mm, Tensor.mm)
_product(3, torch.bmm, Tensor.bmm)


@rule_of(torch.einsum)
def einsum(run: Pass, equation: Any, *operands: Any) -> Any:
    """Apply the product rule, with one more letter for the axis of rows."""
    if len(operands) == 1 and isinstance(operands[0], Sequence):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or "->" not in equation or len(operands) < 2:
        return NotImplemented  # with one operand the result may be a view
    inputs, output = equation.replace(" ", "").split("->")
    inputs, row = inputs.split(","), next(letter for letter in ascii_letters if letter not in equation)
    if len(inputs) != len(operands):
        return NotImplemented
    duals = [subscripts for subscripts, x in zip(inputs, operands, strict=True) if isinstance(x, Dual)]
    if "." in equation or any(subscripts[:1] != output[:1] for subscripts in duals):
        run.mix_examples()  # the product may sum over the examples, or move their axis
    rows = [run.stack(x) for x in operands]
    primals, tangents = [x[0] for x in rows], []
    for i, x in enumerate(rows):
        if len(x) > 1:
            with_rows = [row + subscripts if i == j else subscripts for j, subscripts in enumerate(inputs)]
            product = f"{','.join(with_rows)}->{row}{output}"
            tangents.append(torch.einsum(product, *primals[:i], x[1:], *primals[i + 1 :]))
    return dual_of(torch.einsum(equation, *primals), reduce(torch.add, same_rows(tangents)))


@rule_of(Tensor.__rmatmul__)
def rmatmul(run: Pass, x: Any, other: Any) -> Any:
    """Multiply with the operands exchanged."""
    return matmul(run, other, x)


@rule_of(F.scaled_dot_product_attention)
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
    if is_causal and attn_mask is not None:
        return NotImplemented
    if attn_mask is not None and attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        return NotImplemented
    if not enable_gqa and attn_mask is None and not dropout_p and _are_alike(run, query, key, value):
        return _attention(*(run.stack(x).flatten(1, -3) for x in (query, key, value)), query.shape, is_causal, scale)
    with run:
        if enable_gqa:
            key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
        query = query * (query.shape[-1] ** -0.5 if scale is None else scale)
        scores = torch.matmul(query, key.transpose(-1, -2))
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=scores.dtype).masked_fill(~attn_mask, -math.inf)
        if attn_mask is not None:
            scores = scores + attn_mask.to(scores.dtype)
        weights = torch.softmax(scores, -1)
        if attn_mask is not None and not is_causal:  # torch gives 0 where all is masked
            weights = torch.where((scores == -math.inf).all(-1, keepdim=True), 0, weights)
        return torch.matmul(F.dropout(weights, dropout_p), value)


def _are_alike(run: Pass, query: Any, key: Any, value: Any) -> bool:
    # Whether the rows of all are batches of matrices that need no broadcasting.
    if torch.is_grad_enabled() or not all(isinstance(x, Dual) and x.dim() > 2 for x in (query, key, value)):
        return False
    stacks = [run.stack(x) for x in (query, key, value)]
    return len({(x.dtype, len(x), *x.shape[1:-2]) for x in stacks}) == 1 and not is_autocast(stacks[0])


def _attention(q: Tensor, k: Tensor, v: Tensor, shape: Sequence[int], is_causal: bool, scale: float | None) -> Dual:
    # softmax(q k^T) v for rows (1 + R, batch, length, width), in as few passes over the scores as there are kernels for
    q, k = q * (q.shape[-1] ** -0.5 if scale is None else scale), k.transpose(-1, -2)
    scores = torch.bmm(q[0], k[0])
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    weights = torch.softmax(scores, -1)
    rows = [torch.bmm(weights, v[0])]
    for dq, dk, dv in zip(q[1:], k[1:], v[1:], strict=True):
        slope = torch.baddbmm(torch.bmm(dq, k[0]), q[0], dk)
        slope = torch.ops.aten._softmax_backward_data.default(slope, weights, -1, weights.dtype)
        rows.append(torch.baddbmm(torch.bmm(slope, v[0]), weights, dv))
    return Dual(torch.stack(rows).reshape(len(rows), *shape[:-1], v.shape[-1]))


def _body(function: FunctionType) -> Callable:
    # A function that torch has written in Python, without its look for overrides: its own calls come to the pass.
    variables = function.__globals__ | {"has_torch_function": lambda _: False}
    body = FunctionType(function.__code__, variables, function.__name__, function.__defaults__)
    body.__kwdefaults__ = function.__kwdefaults__
    return body


_attend = _body(F.multi_head_attention_forward)


@register_rule(F.multi_head_attention_forward)
def multi_head_attention_forward(run: Pass, *args: Any, **kwargs: Any) -> Any:
    """Follow torch's own code."""
    with run:
        return _attend(*args, **kwargs)
