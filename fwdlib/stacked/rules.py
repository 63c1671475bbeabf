"""The rules of the stacked pass: for each torch function, what becomes of the rows of a dual.

A stack has shape (1 + R, ...): row 0 is the primal, the others are tangents. A linear function is applied to all rows
at once; another one to the primal, and its derivative there to the tangents.

Where autograd's tape is on, for local derivatives (:mod:`fwdlib.methods.feedback`), it is for the primal alone: tangents
are constants to it, and the layers with weights make a product of their own of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fwdlib.stacked.dual import Dual, Pass, pad_rows, primal_of, primals_of, register_rule, same_rows
from fwdlib.stacked.perturbations import Convolution
from fwdlib.tangents import is_traced

NARROW = 16
"""Channels of all rows of a stack up to which one convolution of them all takes no longer than one of each row."""

# --- layers with weights ---------------------------------------------------------------------------------------------


@register_rule(F.linear)
def linear(run: Pass, x: Any, weight: Any, bias: Any = None) -> Dual:
    """One product for all rows; what the weight's own tangent adds is the perturbation's."""
    with torch._C.DisableTorchFunctionSubclass():
        is_matrix = weight.dim() == 2
    if not is_matrix:
        return NotImplemented
    if isinstance(weight, Dual) or isinstance(bias, Dual):  # a weight that is itself computed
        with run:
            product = torch.matmul(x, weight.transpose(-1, -2))
            return product if bias is None else product + bias
    weight_name, bias_name = run.name_of(weight), run.name_of(bias)
    if not run.has_tangents(x):
        outputs = F.linear(x, weight, bias)
        return _dual(outputs, run.perturbation.linear(weight_name, bias_name, x, outputs))
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


def _convolution(function: Callable, num_axes: int) -> Callable:
    def rule(
        run: Pass,
        x: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if isinstance(weight, Dual) or isinstance(bias, Dual) or x.dim() != num_axes + 2:
                return NotImplemented
        stride, dilation = _each(stride, num_axes), _each(dilation, num_axes)
        if isinstance(padding, str):
            extents = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
            if padding == "same" and any(extent % 2 for extent in extents):
                return NotImplemented
            padding = [extent // 2 if padding == "same" else 0 for extent in extents]
        layer = Convolution(function, stride, _each(padding, num_axes), dilation, groups)
        weight_name, bias_name = run.name_of(weight), run.name_of(bias)
        constant = not run.has_tangents(x)
        if torch.is_grad_enabled() and weight_name is bias_name is None:
            tangents = layer(x.tangents.flatten(0, 1), weight.detach()).unflatten(0, x.tangents.shape[:2])
            return Dual.of(layer(x.primal, weight, bias), tangents)
        stack = run.stack(x)
        if _is_narrow(run, stack, weight, groups) and not run.perturbation.per_example:
            return _as_one_convolution(run, layer, stack, weight, bias)
        kernels = None if weight_name is None else run.perturbation.kernels(weight_name, stack[0], layer)
        if kernels is None:
            rows = layer(stack.flatten(0, 1), weight)
            rows = rows.reshape(*stack.shape[:2], *rows.shape[1:])
            outputs, tangents, along = rows[0], rows[1:], None
        else:  # one convolution of the primals with the layer's kernels and with the tangents'
            outputs, along = layer(stack[0], torch.cat([weight, kernels])).split([len(weight), len(kernels)], 1)
            if not constant:
                tangents = layer(stack[1:].flatten(0, 1), weight)
                tangents = tangents.reshape(-1, len(outputs), *tangents.shape[1:])
        if bias is not None:
            outputs = outputs + bias.reshape(-1, *[1] * num_axes)
        if weight_name is not None or bias_name is not None:
            added = run.perturbation.convolution(weight_name, bias_name, stack[0], outputs, layer, along)
            tangents = added if constant else tangents.add_(added)
        return _dual(outputs, tangents)

    return rule


def _is_narrow(run: Pass, stack: Tensor, weight: Tensor, groups: int) -> bool:
    # Whether the channels of all rows together are so few that a convolution takes no longer for having them all. Not
    # in channels_last: there an axis of rows between positions and channels makes slow work of what comes after.
    channels = (1 + run.perturbation.num_tangents) * max(weight.shape[:2])
    return groups == 1 and channels <= NARROW and stack.stride(2) != 1


def _as_one_convolution(run: Pass, layer: Convolution, stack: Tensor, weight: Tensor, bias: Any) -> Dual:
    """Convolve images of (1 + R) p channels: dual numbers x + e dx as the matrices [[x, 0], [dx, x]] that they are."""
    kernels = run.stack(weight)  # (1, q, p, ...), or with its tangents (1 + K, q, p, ...)
    num_rows = 1 + run.perturbation.num_tangents
    columns = [pad_rows(kernels, num_rows).flatten(0, 1)]
    for row in range(1, len(stack)):
        zeros = [kernels.new_zeros(n * len(weight), *weight.shape[1:]) for n in (row, num_rows - 1 - row)]
        columns.append(torch.cat([zeros[0], weight, zeros[1]]))
    biases = None if bias is None else pad_rows(run.stack(bias), num_rows).flatten()
    outputs = layer(stack.transpose(0, 1).flatten(1, 2), torch.cat(columns, 1), biases)
    return Dual(outputs.unflatten(1, (num_rows, -1)).transpose(0, 1))


register_rule(F.conv1d)(_convolution(F.conv1d, 1))
register_rule(F.conv2d)(_convolution(F.conv2d, 2))
register_rule(F.conv3d)(_convolution(F.conv3d, 3))


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
    """Rows of the table, and of its tangent. The row at ``padding_idx`` has none, as it has no gradient in torch."""
    if (name := run.name_of(weight)) is None or max_norm is not None:
        return NotImplemented
    tangents = run.perturbation.rows(name, indices)
    if padding_idx is not None:
        tangents = tangents.masked_fill((indices == padding_idx % len(weight)).unsqueeze(-1), 0)
    return _dual(F.embedding(indices, weight), tangents)


# --- normalisation ---------------------------------------------------------------------------------------------------


@register_rule(F.batch_norm)
def batch_norm(
    run: Pass,
    x: Any,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """Normalise by the batch, which mixes the examples, or by the running statistics, which are constants.

    Raises:
        ValueError: in training mode, if there is but one value per channel.
    """
    x = x if isinstance(x, Dual) else Dual(_all_rows(run, x))
    primal, tangents = x.primal, x.tangents
    channels = [1, -1, *[1] * (primal.dim() - 2)]
    if training:
        if primal.numel() == primal.shape[1]:
            raise ValueError(
                f"BatchNorm in training mode needs more than one value per channel, got {tuple(primal.shape)}"
            )
        run.mix_examples()
        scale, shift = primal_of(weight), primal_of(bias)
        statistics = running_mean, running_var
        y, mean, inverse = torch.native_batch_norm(primal, scale, shift, *statistics, True, momentum, eps)
        with torch.no_grad():
            # What it does to a channel has a symmetric derivative: the kernel for errors is one for tangents.
            options = primal, scale, *statistics, mean, inverse, True, eps, [True, False, False]
            backward = torch.ops.aten.native_batch_norm_backward.default
            rows = [backward(tangents[k], *options)[0] for k in range(len(tangents))]
            tangents = torch.stack(rows) if len(rows) > 1 else rows[0].unsqueeze(0)
            if run.has_tangents(weight) or run.has_tangents(bias):
                normed = (primal - mean.reshape(channels)) * inverse.reshape(channels)
                tangents = _with_own_tangents(run, tangents, normed, weight, bias, channels)
        return _dual(y, tangents)
    if running_mean is None:
        return NotImplemented
    scale = torch.rsqrt(running_var + eps).reshape(channels)
    normed, tangents = (primal - running_mean.reshape(channels)) * scale, tangents * scale
    return _affine(run, normed, tangents, weight, bias, channels)


@register_rule(torch.batch_norm)
def torch_batch_norm(
    run: Pass,
    x: Any,
    weight: Any,
    bias: Any,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Any:
    """The same with its arguments in another order."""
    return batch_norm(run, x, running_mean, running_var, weight, bias, training, momentum, eps)


@register_rule(F.layer_norm, torch.layer_norm)
def layer_norm(
    run: Pass, x: Any, normalized_shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Dual:
    """Normalise each example by itself."""
    stack = _all_rows(run, x)
    num_others = stack.dim() - 1 - len(normalized_shape)
    if num_others == 0:
        run.mix_examples()
    axes = [i - len(normalized_shape) for i in range(len(normalized_shape))]
    normed, tangents = _normalise(stack[0], stack[1:], axes, eps)
    return _affine(run, normed, tangents, weight, bias, [1] * num_others + list(normalized_shape))


@register_rule(F.group_norm, torch.group_norm)
def group_norm(
    run: Pass, x: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Dual:
    """Normalise each group of channels of each example."""
    stack = _all_rows(run, x)
    grouped = stack.reshape(*stack.shape[:2], num_groups, -1)
    normed, tangents = _normalise(grouped[0], grouped[1:], [-1], eps)
    shape = [1, -1, *[1] * (stack.dim() - 3)]
    return _affine(run, normed.reshape(stack[0].shape), tangents.reshape(stack[1:].shape), weight, bias, shape)


def _normalise(x: Tensor, tangents: Tensor, axes: list[int], eps: float) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    inverse = torch.rsqrt(var + eps)
    normed = (x - mean) * inverse
    rows = [axis + 1 if axis >= 0 else axis for axis in axes]
    along = (tangents * normed).mean(rows, keepdim=True)
    return normed, (tangents - tangents.mean(rows, keepdim=True) - normed * along) * inverse


def _affine(run: Pass, normed: Tensor, tangents: Tensor, weight: Any, bias: Any, shape: Sequence[int]) -> Dual:
    # weight * normed + bias, both possibly with tangents; `shape` lays them out along normed, axis by axis.
    y = normed
    if weight is not None:
        scale = primal_of(weight).reshape(shape)
        y, tangents = y * scale, tangents * scale
    if bias is not None:
        y = y + primal_of(bias).reshape(shape)
    return _dual(y, _with_own_tangents(run, tangents, normed, weight, bias, shape))


def _with_own_tangents(
    run: Pass, tangents: Tensor, normed: Tensor, weight: Any, bias: Any, shape: Sequence[int]
) -> Tensor:
    # What the tangents of weight and bias add, where they have any.
    if weight is not None and len(rows := run.stack(weight)) > 1:
        tangents = tangents + rows[1:].reshape(len(rows) - 1, *shape) * normed
    if bias is not None and len(rows := run.stack(bias)) > 1:
        tangents = tangents + rows[1:].reshape(len(rows) - 1, *shape)
    return tangents


# --- activations -----------------------------------------------------------------------------------------------------


@register_rule(F.relu, torch.relu, Tensor.relu)
def relu(run: Pass, x: Any) -> Dual:
    """Let every row pass where the primal is positive; nan passes, so that it shows."""
    if torch.is_grad_enabled() and isinstance(x, Dual):
        return _dual(torch.relu(x.primal), torch.ops.aten.threshold_backward(x.tangents, x.primal.detach(), 0))
    stack = run.stack(x)
    return Dual(torch.ops.aten.threshold_backward(stack, stack[0], 0))


def _elementwise(*functions: Callable, derivative: Callable[..., Tensor]) -> None:
    """Register a function of one tensor, element by element, with ``derivative(x, y, *args, **kwargs)``."""

    def rule(run: Pass, x: Any, *args: Any, **kwargs: Any) -> Dual:
        x = x if isinstance(x, Dual) else Dual(run.stack(x))
        y = functions[0](x.primal, *args, **kwargs)
        return _dual(y, x.tangents * derivative(x.primal.detach(), y.detach(), *args, **kwargs))

    register_rule(*functions)(rule)


def _gelu_derivative(x: Tensor, y: Tensor, approximate: str = "none") -> Tensor:
    if approximate == "none":
        return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * torch.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)
    tanh = torch.tanh(inner)
    return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh**2) * slope


def _leaky_relu_derivative(x: Tensor, y: Tensor, negative_slope: float = 0.01) -> Tensor:
    return torch.where(x > 0, 1, torch.full_like(x, negative_slope))


def _elu_derivative(x: Tensor, y: Tensor, alpha: float = 1.0) -> Tensor:
    return torch.where(x > 0, 1, y + alpha)


def _silu_derivative(x: Tensor, y: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s + y * (1 - s)


def _softplus_derivative(x: Tensor, y: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    return torch.where(x * beta > threshold, 1, torch.sigmoid(beta * x))


def _hardtanh_derivative(x: Tensor, y: Tensor, min_val: float = -1.0, max_val: float = 1.0) -> Tensor:
    return ((x > min_val) & (x < max_val)).to(x.dtype)


_elementwise(torch.tanh, F.tanh, Tensor.tanh, derivative=lambda x, y: 1 - y * y)
_elementwise(torch.sigmoid, F.sigmoid, Tensor.sigmoid, torch.special.expit, derivative=lambda x, y: y * (1 - y))
_elementwise(F.gelu, derivative=_gelu_derivative)
_elementwise(F.silu, derivative=_silu_derivative)
_elementwise(F.leaky_relu, derivative=_leaky_relu_derivative)
_elementwise(F.elu, derivative=_elu_derivative)
_elementwise(F.softplus, derivative=_softplus_derivative)
_elementwise(F.relu6, derivative=lambda x, y: ((x > 0) & (x < 6)).to(x.dtype))
_elementwise(F.hardtanh, derivative=_hardtanh_derivative)
_elementwise(torch.exp, Tensor.exp, derivative=lambda x, y: y)
_elementwise(torch.log, Tensor.log, derivative=lambda x, y: 1 / x)
_elementwise(torch.sqrt, Tensor.sqrt, derivative=lambda x, y: 0.5 / y)
_elementwise(torch.rsqrt, Tensor.rsqrt, derivative=lambda x, y: -0.5 * y / x)
_elementwise(torch.square, Tensor.square, derivative=lambda x, y: 2 * x)
_elementwise(torch.sin, Tensor.sin, derivative=lambda x, y: torch.cos(x))
_elementwise(torch.cos, Tensor.cos, derivative=lambda x, y: -torch.sin(x))


@register_rule(torch.abs, Tensor.abs, Tensor.__abs__)
def absolute(run: Pass, x: Any) -> Any:
    """The sign; of a complex number it is no derivative."""
    stack = run.stack(x)
    return NotImplemented if stack.is_complex() else _dual(stack[0].abs(), stack[1:] * stack[0].sgn())


@register_rule(torch.pow, Tensor.pow, Tensor.__pow__)
def power(run: Pass, x: Any, exponent: Any) -> Any:
    """A constant exponent."""
    if isinstance(exponent, Tensor) or not isinstance(x, Tensor):
        return NotImplemented
    stack = run.stack(x)
    slope = exponent * stack[0] ** (exponent - 1) if exponent else torch.zeros_like(stack[0])  # 0 ** -1 is infinite
    return _dual(stack[0] ** exponent, stack[1:] * slope)


@register_rule(F.softmax, torch.softmax, Tensor.softmax)
def softmax(run: Pass, x: Any, dim: int, *_: Any, dtype: torch.dtype | None = None, **__: Any) -> Any:
    """Give the tangents y (dx - <y, dx>)."""
    if dtype is not None or dim is None:
        return NotImplemented
    stack, axis = _along(run, x, dim)
    y = torch.softmax(stack[0], dim)
    return _dual(y, y * (stack[1:] - (y * stack[1:]).sum(axis, keepdim=True)))


@register_rule(F.log_softmax, torch.log_softmax, Tensor.log_softmax)
def log_softmax(run: Pass, x: Any, dim: int, *_: Any, dtype: torch.dtype | None = None, **__: Any) -> Any:
    """Give the tangents dx - <softmax, dx>."""
    if dtype is not None or dim is None:
        return NotImplemented
    stack, axis = _along(run, x, dim)
    y = torch.log_softmax(stack[0], dim)
    return _dual(y, stack[1:] - (y.exp() * stack[1:]).sum(axis, keepdim=True))


@register_rule(F.dropout, torch.dropout)
def dropout(run: Pass, x: Any, p: float = 0.5, training: bool = True) -> Dual:
    """One mask for all rows, drawn as torch draws it."""
    stack = run.stack(x)
    if not training or p == 0:
        return Dual(stack)
    return Dual(stack * F.dropout(torch.ones_like(stack[0]), p))


# --- arithmetic ------------------------------------------------------------------------------------------------------


@register_rule(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
def add(run: Pass, x: Any, other: Any, *, alpha: float = 1) -> Dual:
    """Add the rows; a constant is added to the primal alone."""
    x, other = _operands(run, x, other)
    return _add_rows(x, other if alpha == 1 else other * alpha)


@register_rule(torch.sub, torch.subtract, Tensor.sub, Tensor.__sub__)
def sub(run: Pass, x: Any, other: Any, *, alpha: float = 1) -> Dual:
    """Subtract the rows."""
    x, other = _operands(run, x, other)
    return _add_rows(x, -other if alpha == 1 else other * -alpha)


@register_rule(Tensor.__rsub__, torch.rsub)
def rsub(run: Pass, x: Any, other: Any, *, alpha: float = 1) -> Dual:
    """Subtract the other way round."""
    return sub(run, other, x, alpha=alpha)


@register_rule(torch.neg, torch.negative, Tensor.neg, Tensor.__neg__)
def neg(run: Pass, x: Any) -> Dual:
    """Turn all rows round."""
    return Dual(-run.stack(x))


@register_rule(torch.mul, torch.multiply, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
def mul(run: Pass, x: Any, other: Any) -> Dual:
    """The product rule; a constant scales all rows."""
    x, other = _operands(run, x, other)
    if len(x) == 1 or len(other) == 1:
        return Dual(x * other)
    x, other = same_rows([x, other])
    return _dual(x[0] * other[0], x[1:] * other[0] + x[0] * other[1:])


@register_rule(torch.div, torch.divide, torch.true_divide, Tensor.div, Tensor.__truediv__)
def div(run: Pass, x: Any, other: Any, *, rounding_mode: str | None = None) -> Any:
    """The quotient rule."""
    if rounding_mode is not None:
        return NotImplemented
    x, other = _operands(run, x, other)
    if len(other) == 1:
        return Dual(x / other)
    x, other = same_rows([x, other])
    y = x[0] / other[0]
    return _dual(y, (x[1:] - y * other[1:]) / other[0])


@register_rule(Tensor.__rtruediv__, Tensor.__rdiv__)
def rdiv(run: Pass, x: Any, other: Any) -> Any:
    """Divide the other way round."""
    return div(run, other, x)


@register_rule(torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__)
def matmul(run: Pass, x: Any, other: Any) -> Any:
    """The product rule for matrices and stacks of them."""
    a, b = run.stack(x), run.stack(other)
    if a.dim() < 3 or b.dim() < 3:  # vectors
        return NotImplemented
    moves = isinstance(x, Dual) and a.dim() < b.dim()
    if moves or (isinstance(other, Dual) and (b.dim() == 3 or b.dim() < a.dim())):
        run.mix_examples()  # examples that are contracted, or whose axis moves
    num_axes = max(a.dim(), b.dim()) - 1
    a, b = _with_axes(a, num_axes), _with_axes(b, num_axes)
    if len(a) == 1 or len(b) == 1:
        return Dual(torch.matmul(a, b))
    a, b = same_rows([a, b])
    return _dual(torch.matmul(a[0], b[0]), torch.matmul(a[1:], b[0]) + torch.matmul(a[0], b[1:]))


@register_rule(Tensor.__rmatmul__)
def rmatmul(run: Pass, x: Any, other: Any) -> Any:
    """Multiply the other way round."""
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
    """Written out, since torch's fused kernels have no forward derivative."""
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


# --- shapes ----------------------------------------------------------------------------------------------------------


@register_rule(torch.flatten, Tensor.flatten)
def flatten(run: Pass, x: Any, start_dim: int = 0, end_dim: int = -1) -> Any:
    """Leave the axis of rows alone."""
    stack = run.stack(x)
    if stack.dim() == 1:
        return Dual(stack.unsqueeze(1))
    return Dual(stack.flatten(_shift(start_dim), _shift(end_dim)))


@register_rule(torch.reshape, Tensor.reshape, Tensor.view)
def reshape(run: Pass, x: Any, *shape: Any, **kwargs: Any) -> Any:
    """Likewise."""
    shape = kwargs.get("shape", shape)
    if len(shape) == 1 and not isinstance(shape[0], int):
        shape = shape[0]
    if isinstance(shape, torch.dtype):
        return NotImplemented
    stack = run.stack(x)
    return Dual(stack.reshape(len(stack), *_known(stack.shape[1:], shape)))


@register_rule(torch.transpose, torch.swapaxes, Tensor.transpose, Tensor.swapaxes)
def transpose(run: Pass, x: Any, dim0: int, dim1: int) -> Dual:
    """Likewise."""
    stack, first = _along(run, x, dim0)
    _, second = _along(run, x, dim1)
    return Dual(stack.transpose(first, second))


@register_rule(Tensor.t, torch.t, Tensor.T.__get__, Tensor.mT.__get__)
def transposed(run: Pass, x: Any) -> Any:
    """Matrices alone."""
    stack = run.stack(x)
    if stack.dim() != 3:
        return NotImplemented
    run.mix_examples()
    return Dual(stack.transpose(1, 2))


@register_rule(torch.permute, Tensor.permute)
def permute(run: Pass, x: Any, *dims: Any, **kwargs: Any) -> Dual:
    """Likewise."""
    dims = kwargs.get("dims", dims)
    dims = dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims
    stack = run.stack(x)
    axes = [dim % (stack.dim() - 1) for dim in dims]
    if axes[:1] != [0]:
        run.mix_examples()
    return Dual(stack.permute(0, *(axis + 1 for axis in axes)))


@register_rule(torch.unsqueeze, Tensor.unsqueeze)
def unsqueeze(run: Pass, x: Any, dim: int) -> Dual:
    """Likewise."""
    stack = run.stack(x)
    if dim in (0, -stack.dim()):
        run.mix_examples()
    return Dual(stack.unsqueeze(_shift(dim)))


@register_rule(torch.squeeze, Tensor.squeeze)
def squeeze(run: Pass, x: Any, dim: Any = None) -> Dual:
    """Likewise."""
    stack = run.stack(x)
    shape = stack.shape[1:]
    dims = range(len(shape)) if dim is None else [dim] if isinstance(dim, int) else dim
    axes = [d % len(shape) for d in dims] if shape else []
    axes = tuple(axis + 1 for axis in axes if shape[axis] == 1)
    return Dual(stack.squeeze(axes) if axes else stack)


@register_rule(Tensor.expand)
def expand(run: Pass, x: Any, *sizes: Any) -> Dual:
    """Likewise."""
    sizes = sizes[0] if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
    stack = run.stack(x)
    if len(sizes) > stack.dim() - 1:
        run.mix_examples()
    return Dual(_with_axes(stack, len(sizes)).expand(len(stack), *sizes))


@register_rule(Tensor.__getitem__)
def getitem(run: Pass, x: Any, index: Any) -> Any:
    """Index behind the axis of rows."""
    index = index if isinstance(index, tuple) else (index,)
    lists = [isinstance(i, (Tensor, list)) for i in index]
    if any(isinstance(i, Dual) for i in index) or (any(lists) and sum(lists) + sum(type(i) is int for i in index) > 1):
        return NotImplemented  # several index arrays: where their axis goes depends on what is between them
    stack = run.stack(x)
    whole = not index or (isinstance(index[0], slice) and index[0] == slice(None))
    if not whole and (index[0] is not Ellipsis or len(index) > stack.dim() - 1):
        run.mix_examples()
    return Dual(stack[(slice(None), *index)])


@register_rule(Tensor.__setitem__)
def setitem(run: Pass, x: Any, index: Any, value: Any) -> Any:
    """Set the entries of every row; those of a constant are zero."""
    index = index if isinstance(index, tuple) else (index,)
    if not isinstance(x, Dual):
        raise NotImplementedError(
            "an entry of a tensor without tangents is set to a value with them. Make it with torch.cat or torch.stack."
        )
    values = run.stack(value) if isinstance(value, Tensor) else [value]
    if isinstance(value, Dual):
        run.mix_examples()  # what goes where is not looked into
    for i, row in enumerate(x.stack):
        row[index] = values[i] if i < len(values) else 0
    return None


@register_rule(torch.cat, torch.concat, torch.concatenate)
def cat(run: Pass, tensors: Any, dim: int = 0) -> Dual:
    """Join row by row."""
    stacks = same_rows([run.stack(x) for x in tensors])
    if dim in (0, 1 - stacks[0].dim()):
        run.mix_examples()
    return Dual(torch.cat(stacks, _shift(dim)))


@register_rule(torch.stack)
def stack(run: Pass, tensors: Any, dim: int = 0) -> Dual:
    """Join row by row."""
    stacks = same_rows([run.stack(x) for x in tensors])
    if dim in (0, -stacks[0].dim()):
        run.mix_examples()
    return Dual(torch.stack(stacks, _shift(dim)))


@register_rule(torch.chunk, Tensor.chunk)
def chunk(run: Pass, x: Any, chunks: int, dim: int = 0) -> tuple[Dual, ...]:
    """Cut every row alike."""
    stack, axis = _along(run, x, dim)
    return tuple(Dual(piece) for piece in stack.chunk(chunks, axis))


@register_rule(torch.split, Tensor.split)
def split(run: Pass, x: Any, split_size: Any, dim: int = 0) -> tuple[Dual, ...]:
    """Cut every row alike."""
    stack, axis = _along(run, x, dim)
    return tuple(Dual(piece) for piece in stack.split(split_size, axis))


@register_rule(Tensor.clone, torch.clone)
def clone(run: Pass, x: Any, **_: Any) -> Dual:
    """Copy all rows."""
    return Dual(run.stack(x).clone())


@register_rule(Tensor.contiguous)
def contiguous(run: Pass, x: Any, **_: Any) -> Dual:
    """Do nothing: no rule minds how the rows lie in memory."""
    return Dual(run.stack(x))


def _conversion(*functions: Callable) -> None:
    """Register conversions of the type, which are linear; integers have no tangents."""
    for function in functions:

        def rule(run: Pass, x: Any, *args: Any, _function: Callable = function, **kwargs: Any) -> Any:
            kwargs.pop("memory_format", None)  # how the rows lie in memory is nobody's concern
            stack = run.stack(x)
            if not args and not kwargs and _function in (Tensor.to, Tensor.type):
                return Dual(stack) if _function is Tensor.to else stack.type()
            rows = _function(stack, *primals_of(args), **primals_of(kwargs))
            return Dual(rows) if rows.is_floating_point() or rows.is_complex() else rows[0]

        register_rule(function)(rule)


_conversion(Tensor.to, Tensor.type, Tensor.type_as, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16)


# --- sums and pooling ------------------------------------------------------------------------------------------------


@register_rule(torch.mean, Tensor.mean)
def mean(run: Pass, x: Any, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    """The mean of every row."""
    return _reduce(run, x, dim, keepdim, dtype, is_mean=True)


@register_rule(torch.sum, Tensor.sum)
def sum_(run: Pass, x: Any, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    """The sum of every row."""
    return _reduce(run, x, dim, keepdim, dtype, is_mean=False)


def _reduce(run: Pass, x: Any, dim: Any, keepdim: bool, dtype: torch.dtype | None, *, is_mean: bool) -> Any:
    if dtype is not None:
        return NotImplemented
    stack = run.stack(x)
    dims = [] if dim is None else [dim] if isinstance(dim, int) else list(dim)
    if dims:
        axes = [_shift(d) for d in dims]
        if {axis % stack.dim() for axis in axes} == set(range(1, stack.dim())) and not keepdim:
            dims = []
        else:
            if any(axis % stack.dim() == 1 for axis in axes):
                run.mix_examples()
            return Dual(stack.mean(axes, keepdim) if is_mean else stack.sum(axes, keepdim))
    if keepdim:
        return NotImplemented
    value = stack[0].mean() if is_mean else stack[0].sum()
    if stack.dim() == 1:
        return Dual(stack)
    if not run.is_batch(x):
        tangents = stack[1:].flatten(1).sum(1)
    else:
        tangents = run.split_examples(stack[1:].flatten(2).sum(2) if stack.dim() > 2 else stack[1:])
    return _dual(value, tangents / stack[0].numel() if is_mean else tangents)


def _max_pool(*functions: Callable, pool: Callable, num_axes: int) -> None:
    """Register maximum pooling: the tangents are taken from where the maximum is."""

    def rule(
        run: Pass,
        x: Any,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Any:
        if return_indices:
            return NotImplemented
        stack = run.stack(x)
        kernel, padding, dilation = (_each(value, num_axes) for value in (kernel_size, padding, dilation))
        stride = kernel if stride in (None, (), []) else _each(stride, num_axes)
        if is_traced() and not torch.is_grad_enabled() and not (any(padding) or ceil_mode) and math.prod(kernel) <= 9:
            return _maximum_of_slices(stack, kernel, stride, dilation)
        y, where = pool(stack[0], kernel, stride, padding, dilation, ceil_mode)
        if where.dim() == 4 and where.is_contiguous(memory_format=torch.channels_last):
            tangents = stack[1:].movedim(2, -1).flatten(2, 3)  # (R, B, positions, channels), in the order of the memory
            where = where.movedim(1, -1).flatten(1, 2).expand(len(tangents), -1, -1, -1)
            return _dual(y, tangents.gather(2, where).unflatten(2, y.shape[2:]).movedim(-1, 2))
        tangents = stack[1:].flatten(-num_axes)
        where = where.flatten(-num_axes).expand(*tangents.shape[:-1], -1)
        return _dual(y, tangents.gather(-1, where).reshape(-1, *y.shape))

    register_rule(pool, *functions)(rule)


def _maximum_of_slices(stack: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Dual:
    # With a slice of the stack for each place in the window, element by element, which a compiler makes one loop of.
    counts = [
        (size - d * (k - 1) - 1) // s + 1
        for size, k, s, d in zip(stack.shape[-len(kernel) :], kernel, stride, dilation, strict=True)
    ]
    y: Any = None
    for places in itertools.product(*map(range, kernel)):
        starts = [place * d for place, d in zip(places, dilation, strict=True)]
        slices = [slice(a, a + s * (n - 1) + 1, s) for a, s, n in zip(starts, stride, counts, strict=True)]
        other, others = stack[(0, ..., *slices)], stack[(slice(1, None), ..., *slices)]
        if y is None:
            y, tangents = other, others
        else:
            tangents = torch.where(other > y, others, tangents)
            y = torch.maximum(y, other)  # nan stays, so that it shows
    return _dual(y, tangents)


_max_pool(F.max_pool1d, torch.max_pool1d, pool=F.max_pool1d_with_indices, num_axes=1)
_max_pool(F.max_pool2d, torch.max_pool2d, pool=F.max_pool2d_with_indices, num_axes=2)


def _linear_pool(*functions: Callable) -> None:
    """Register a pooling function that is linear: all rows as one batch."""

    def rule(run: Pass, x: Any, *args: Any, **kwargs: Any) -> Dual:
        stack = run.stack(x)
        pooled = functions[0](stack.flatten(0, 1), *args, **kwargs)
        return Dual(pooled.reshape(*stack.shape[:2], *pooled.shape[1:]))

    register_rule(*functions)(rule)


_linear_pool(F.avg_pool1d)
_linear_pool(F.avg_pool2d)
_linear_pool(F.avg_pool3d)
_linear_pool(F.adaptive_avg_pool1d, torch.adaptive_avg_pool1d)
_linear_pool(F.adaptive_avg_pool2d)
_linear_pool(F.adaptive_avg_pool3d)


# --- losses ----------------------------------------------------------------------------------------------------------


@register_rule(F.cross_entropy)
def cross_entropy(
    run: Pass,
    logits: Any,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """The log softmax and the loss of it, which is linear."""
    if target.is_floating_point() or label_smoothing or size_average is not None or reduce is not None:
        return NotImplemented
    log_probs = log_softmax(run, logits, min(1, logits.dim() - 1))
    return nll_loss(run, log_probs, target, weight, None, ignore_index, None, reduction)


@register_rule(F.nll_loss)
def nll_loss(
    run: Pass,
    log_probs: Any,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
) -> Any:
    """Linear in the log probabilities."""
    stack = run.stack(log_probs)
    if size_average is not None or reduce is not None or reduction not in ("mean", "sum", "none") or stack.dim() < 3:
        return NotImplemented
    options = {"weight": weight, "ignore_index": ignore_index}
    if reduction != "none" and not run.perturbation.per_example:
        return Dual(torch.stack([F.nll_loss(row, target, reduction=reduction, **options) for row in stack.unbind()]))
    value = F.nll_loss(stack[0], target, reduction=reduction, **options)
    rows = stack[1:].flatten(0, 1)
    pieces = F.nll_loss(rows, target.repeat(len(stack) - 1, *[1] * (target.dim() - 1)), reduction="none", **options)
    pieces = pieces.reshape(len(stack) - 1, *target.shape)
    if reduction == "none":
        return _dual(value, pieces)
    if reduction == "mean":
        pieces = pieces / F.nll_loss(stack[0].new_full(stack.shape[1:], -1), target, reduction="sum", **options)
    pieces = pieces.flatten(2).sum(2) if pieces.dim() > 2 else pieces
    return _dual(value, run.split_examples(pieces) if run.is_batch(log_probs) else pieces.sum(1))


@register_rule(F.mse_loss)
def mse_loss(
    run: Pass,
    x: Any,
    target: Any,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
    weight: Any = None,
) -> Any:
    """Written out."""
    if size_average is not None or reduce is not None or weight is not None or x.shape != target.shape:
        return NotImplemented
    with run:
        squares = torch.square(x - target)
        return squares.mean() if reduction == "mean" else squares.sum() if reduction == "sum" else squares


# --- functions without a derivative ----------------------------------------------------------------------------------


def _constant(*functions: Callable) -> None:
    """Register functions whose results are constants: they see the primals alone."""
    for function in functions:

        def rule(run: Pass, *args: Any, _function: Callable = function, **kwargs: Any) -> Any:
            return _function(*primals_of(args), **primals_of(kwargs))

        register_rule(function)(rule)


_constant(torch.argmax, Tensor.argmax, torch.argmin, Tensor.argmin, torch.argsort, Tensor.argsort)
_constant(torch.gt, torch.ge, torch.lt, torch.le, torch.eq, torch.ne, torch.isnan, torch.isinf, torch.isfinite)
_constant(Tensor.gt, Tensor.ge, Tensor.lt, Tensor.le, Tensor.eq, Tensor.ne, Tensor.isnan, Tensor.isinf, Tensor.isfinite)
_constant(Tensor.__gt__, Tensor.__ge__, Tensor.__lt__, Tensor.__le__, Tensor.__eq__, Tensor.__ne__)
_constant(Tensor.detach, torch.detach, Tensor.data.__get__, Tensor.item, Tensor.tolist, Tensor.numpy)
_constant(Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__format__, Tensor.__repr__)
_constant(torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like, torch.rand_like, torch.randn_like)
_constant(Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty, Tensor.new_full, Tensor.new_tensor, Tensor.stride)


# --- helpers ---------------------------------------------------------------------------------------------------------


def _dual(primal: Tensor, tangents: Tensor) -> Dual:
    # tangents: broadcastable to (R, *primal.shape)
    if tangents.shape[1:] != primal.shape:
        tangents = tangents.expand(-1, *primal.shape)
    if torch.is_grad_enabled():
        return Dual.of(primal, tangents.detach() if tangents.requires_grad else tangents)
    if primal.dim() != 4 or not len(primal):
        return Dual(torch.cat([primal.unsqueeze(0), tangents]))
    # joined along the examples, where torch.cat knows channels_last and keeps it
    return Dual(torch.cat([primal, *tangents.unbind()]).unflatten(0, (1 + len(tangents), len(primal))))


def _all_rows(run: Pass, x: Any) -> Tensor:
    # With the zero tangents that the rows of a constant leave out, for rules that add others to them.
    return pad_rows(run.stack(x), 1 + run.perturbation.num_tangents)


def _operands(run: Pass, x: Any, other: Any) -> tuple[Tensor, Tensor]:
    # Both as stacks with as many axes, so that they broadcast against each other.
    like = x if isinstance(x, Tensor) else other
    stacks = []
    for value in (x, other):
        if not isinstance(value, Tensor):
            value = torch.as_tensor(value, dtype=None if isinstance(value, complex) else like.dtype, device=like.device)
        stacks.append(run.stack(value))
    if stacks[0].dtype != stacks[1].dtype:  # a scalar tensor does not widen the type, as its row would
        dtype = torch.result_type(stacks[0][0], stacks[1][0])
        stacks = [stack.to(dtype) for stack in stacks]
    num_axes = max(stack.dim() for stack in stacks) - 1
    for value, stack in zip((x, other), stacks, strict=True):
        if isinstance(value, Dual) and 1 < stack.dim() <= num_axes and run.is_batch(value):
            run.mix_examples()  # broadcasting moves the axis of the examples
    return tuple(_with_axes(stack, num_axes) for stack in stacks)


def _with_axes(stack: Tensor, num_axes: int) -> Tensor:
    missing = num_axes - (stack.dim() - 1)
    return stack.reshape(len(stack), *[1] * missing, *stack.shape[1:]) if missing > 0 else stack


def _add_rows(x: Tensor, other: Tensor) -> Dual:
    if len(x) == len(other):
        return Dual(x + other)
    few, many = sorted((x, other), key=len)
    rows = len(few)
    shape = torch.broadcast_shapes(few.shape[1:], many.shape[1:])
    return Dual(torch.cat([few + many[:rows], many[rows:].expand(-1, *shape)]))


def _shift(dim: int) -> int:
    return dim + 1 if dim >= 0 else dim


def _along(run: Pass, x: Any, dim: int) -> tuple[Tensor, int]:
    # The rows of x, and the axis that `dim` is in them; working along the examples mixes them.
    stack = run.stack(x)
    axis = _shift(dim)
    if axis % stack.dim() == 1:
        run.mix_examples()
    return stack, axis


def _known(shape: Sequence[int], wanted: Sequence[int]) -> list[int]:
    # -1 written out: with the axis of rows in front torch could not infer it for an empty tensor.
    if -1 not in wanted:
        return list(wanted)
    rest = math.prod(size for size in wanted if size != -1)
    return [math.prod(shape) // rest if size == -1 and rest else size for size in wanted]


def _each(value: Any, num_axes: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * num_axes if len(values) == 1 else values
