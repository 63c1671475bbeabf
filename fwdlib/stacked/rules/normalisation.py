"""Rules of normalisations: by the batch, by layers and groups, and softmax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fwdlib.stacked.dual import Dual, primal_of
from fwdlib.stacked.forward_pass import Pass, register_rule
from fwdlib.stacked.rules.rows import dual_of, padded_rows, rows_along


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
    """Normalise by the batch's statistics, which mixes the examples, or by the running statistics, which are constants.

    Raises:
        ValueError: in training mode, if there is only one value per channel.
    """
    x = x if isinstance(x, Dual) else Dual(padded_rows(run, x))
    primal, tangents = x.primal, x.tangents
    channels = [1, -1, *[1] * (primal.dim() - 2)]
    if training:
        if primal.numel() == primal.shape[1]:
            raise ValueError(
                f"BatchNorm in training mode needs more than one value per channel, got inputs of shape "
                f"{tuple(primal.shape)}: pass a larger batch, or call model.eval()"
            )
        run.mix_examples()
        scale, shift = primal_of(weight), primal_of(bias)
        statistics = running_mean, running_var
        y, mean, inverse = torch.native_batch_norm(primal, scale, shift, *statistics, True, momentum, eps)
        with torch.no_grad():
            # The derivative of a channel is symmetric, so torch's kernel of the backward pass works for tangents.
            options = primal, scale, *statistics, mean, inverse, True, eps, [True, False, False]
            backward = torch.ops.aten.native_batch_norm_backward.default
            rows = [backward(tangents[k], *options)[0] for k in range(len(tangents))]
            tangents = torch.stack(rows) if len(rows) > 1 else rows[0].unsqueeze(0)
            if run.has_tangents(weight) or run.has_tangents(bias):
                normed = (primal - mean.reshape(channels)) * inverse.reshape(channels)
                tangents = _with_own_tangents(run, tangents, normed, weight, bias, channels)
        return dual_of(y, tangents)
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
    """Reorder the arguments for :func:`batch_norm`."""
    return batch_norm(run, x, running_mean, running_var, weight, bias, training, momentum, eps)


@register_rule(F.layer_norm, torch.layer_norm)
def layer_norm(
    run: Pass, x: Any, normalized_shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Dual:
    """Normalise over the last axes of each example."""
    stack = padded_rows(run, x)
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
    stack = padded_rows(run, x)
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
    # weight * normed + bias, where both may have tangents; `shape` aligns them with the axes of normed.
    y = normed
    if weight is not None:
        scale = primal_of(weight).reshape(shape)
        y, tangents = y * scale, tangents * scale
    if bias is not None:
        y = y + primal_of(bias).reshape(shape)
    return dual_of(y, _with_own_tangents(run, tangents, normed, weight, bias, shape))


def _with_own_tangents(
    run: Pass, tangents: Tensor, normed: Tensor, weight: Any, bias: Any, shape: Sequence[int]
) -> Tensor:
    # Add the terms from the tangents of weight and bias, if they have tangents.
    if weight is not None and len(rows := run.stack(weight)) > 1:
        tangents = tangents + rows[1:].reshape(len(rows) - 1, *shape) * normed
    if bias is not None and len(rows := run.stack(bias)) > 1:
        tangents = tangents + rows[1:].reshape(len(rows) - 1, *shape)
    return tangents


@register_rule(F.softmax, torch.softmax, Tensor.softmax)
def softmax(run: Pass, x: Any, dim: int, *_: Any, dtype: torch.dtype | None = None, **__: Any) -> Any:
    """Return the tangents y (dx - <y, dx>)."""
    if dtype is not None or dim is None:
        return NotImplemented
    stack, axis = rows_along(run, x, dim)
    y = torch.softmax(stack[0], dim)
    return dual_of(y, y * (stack[1:] - (y * stack[1:]).sum(axis, keepdim=True)))


@register_rule(F.log_softmax, torch.log_softmax, Tensor.log_softmax)
def log_softmax(run: Pass, x: Any, dim: int, *_: Any, dtype: torch.dtype | None = None, **__: Any) -> Any:
    """Return the tangents dx - <softmax, dx>."""
    if dtype is not None or dim is None:
        return NotImplemented
    stack, axis = rows_along(run, x, dim)
    y = torch.log_softmax(stack[0], dim)
    return dual_of(y, stack[1:] - (y.exp() * stack[1:]).sum(axis, keepdim=True))
