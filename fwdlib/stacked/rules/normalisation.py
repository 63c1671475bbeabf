"""Rules of normalisations: by the batch, by layers and groups, and softmax."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fwdlib.stacked.dual import Dual, primal_of
from fwdlib.stacked.forward_pass import Pass
from fwdlib.stacked.rules.rows import axis_along, by_rows, dual_of, is_autocast, is_half, padded_rows, parts_of
from fwdlib.stacked.rules.signatures import rule_of

aten = torch.ops.aten


@rule_of(F.batch_norm)
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
    if run.has_tangents(running_mean) or run.has_tangents(running_var) or x.dim() < 2 or momentum is None:
        return NotImplemented
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
            tangents = by_rows(lambda v: aten.native_batch_norm_backward.default(v, *options)[0], tangents)
            slope = _own_rows(run, weight)
            shift = _own_rows(run, bias)
            if slope is not None:  # of weight * (primal - mean) * inverse + bias, as torch computes it
                slope = slope * inverse
                shift = (0 if shift is None else shift) - slope * mean
                tangents = torch.addcmul(tangents, primal, slope.to(primal.dtype).reshape(len(slope), *channels))
            if shift is not None:
                shift = shift.to(primal.dtype).reshape(len(shift), *channels)
                tangents = tangents + shift if slope is None else tangents.add_(shift)
        return dual_of(y, tangents)
    if running_mean is None or running_var is None:
        return NotImplemented
    mean, var = (_wide(statistic) for statistic in (running_mean, running_var))
    scale = torch.rsqrt(var + eps).reshape(channels)
    normed, tangents = (primal - mean.reshape(channels)) * scale, tangents * scale
    return _affine(run, normed, tangents, weight, bias, channels, primal.dtype)


@rule_of(torch.batch_norm)
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


@rule_of(F.layer_norm, torch.layer_norm)
def layer_norm(
    run: Pass,
    x: Any,
    normalized_shape: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Any:
    """Normalise over the last axes of each example."""
    stack, count = padded_rows(run, x), len(normalized_shape)
    num_others = stack.dim() - 1 - count
    if count == 0 or num_others < 0 or tuple(stack.shape[1 + num_others :]) != tuple(normalized_shape):
        return NotImplemented
    if num_others == 0:
        run.mix_examples()
    normed, tangents = _normalise(stack[0], stack[1:], list(normalized_shape), eps)
    dtype = _dtype_of_norm(stack)
    return _affine(run, normed, tangents, weight, bias, [1] * num_others + list(normalized_shape), dtype)


@rule_of(F.group_norm, torch.group_norm)
def group_norm(
    run: Pass,
    x: Any,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:
    """Normalise each group of channels of each example."""
    stack = padded_rows(run, x)
    if stack.dim() < 3 or not stack.numel() or num_groups <= 0 or stack.shape[2] % num_groups:
        return NotImplemented
    if stack[0].numel() == num_groups:
        return NotImplemented  # torch refuses one value per group
    grouped = stack.reshape(*stack.shape[:2], num_groups, -1)
    normed, tangents = _normalise(grouped[0], grouped[1:], grouped.shape[-1:], eps)
    normed, tangents = normed.reshape(stack[0].shape), tangents.reshape(stack[1:].shape)
    return _affine(run, normed, tangents, weight, bias, [1, -1, *[1] * (stack.dim() - 3)], _dtype_of_norm(stack))


def _dtype_of_norm(x: Tensor) -> torch.dtype:
    # The type of the result of a normalisation: under autocast float32 on GPUs, as torch has it.
    return torch.float32 if x.is_cuda and is_half(x) and is_autocast(x) else x.dtype


def _wide(x: Tensor) -> Tensor:
    # Statistics are computed in float32 at least.
    return x.float() if is_half(x) else x


def _normalise(x: Tensor, tangents: Tensor, shape: Sequence[int], eps: float) -> tuple[Tensor, Tensor]:
    # Over the last axes, which have this shape; in float32 at least.
    x, tangents = _wide(x), _wide(tangents)
    normed, mean, inverse = torch.native_layer_norm(x, shape, None, None, eps)
    # The derivative is symmetric, so torch's kernel of the backward pass works for tangents.
    options = x.detach(), shape, mean.detach(), inverse.detach(), None, None, [True, False, False]
    return normed, by_rows(lambda v: aten.native_layer_norm_backward.default(v, *options)[0], tangents)


def _affine(
    run: Pass, normed: Tensor, tangents: Tensor, weight: Any, bias: Any, shape: Sequence[int], dtype: torch.dtype
) -> Dual:
    # weight * normed + bias, where both may have tangents; `shape` aligns them with the axes of normed.
    y, slope, shift = normed, _own_rows(run, weight), _own_rows(run, bias)
    if weight is not None:
        scale = primal_of(weight).reshape(shape)
        y, tangents = y * scale, tangents * scale
    if bias is not None:
        y = y + primal_of(bias).reshape(shape)
    if slope is not None:
        tangents = torch.addcmul(tangents, slope.reshape(len(slope), *shape).to(normed.dtype), normed)
    if shift is not None:
        tangents = tangents + shift.reshape(len(shift), *shape)
    return dual_of(y.to(dtype), tangents)


def _own_rows(run: Pass, x: Any) -> Tensor | None:
    # The tangents of a weight or a bias; None if it has none.
    if not run.has_tangents(x):
        return None
    return x.tangents if isinstance(x, Dual) else run.perturbation.dense(run.name_of(x))


@rule_of(F.softmax, torch.softmax, Tensor.softmax)
def softmax(run: Pass, x: Any, dim: int, dtype: torch.dtype | None = None, *, _stacklevel: int = 3) -> Any:
    """Return the tangents y (dx - <y, dx>)."""
    return _softmax(run, torch.softmax, x, dim, dtype)


@rule_of(F.log_softmax, torch.log_softmax, Tensor.log_softmax)
def log_softmax(run: Pass, x: Any, dim: int, dtype: torch.dtype | None = None, *, _stacklevel: int = 3) -> Any:
    """Return the tangents dx - <softmax, dx>."""
    return _softmax(run, torch.log_softmax, x, dim, dtype)


def _softmax(run: Pass, function: Callable, x: Any, dim: int, dtype: torch.dtype | None) -> Any:
    primal, tangents = parts_of(run, x)
    if not isinstance(dim, (int, np.integer)) or primal.dim() == 0 or not (dtype is None or dtype.is_floating_point):
        return NotImplemented
    axis = axis_along(run, tangents, dim)
    if dtype is not None:
        primal, tangents = primal.to(dtype), tangents.to(dtype)
    y = function(primal, dim)
    if function is torch.softmax:
        return dual_of(y, y * (tangents - (y * tangents).sum(axis, keepdim=True)), are_new=True)
    return dual_of(y, tangents - (y.exp() * tangents).sum(axis, keepdim=True), are_new=True)
