"""Rules of convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fwdlib.stacked.dual import Dual, pad_rows
from fwdlib.stacked.forward_pass import Pass
from fwdlib.stacked.perturbations import Convolution
from fwdlib.stacked.rules.rows import dual_of, per_axis
from fwdlib.stacked.rules.signatures import rule_of

NARROW = 16
"""Up to this many channels of all rows together, one convolution of all rows is no slower than one for each row."""


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
            if isinstance(weight, Dual) or isinstance(bias, Dual) or not x.numel() or not weight.numel():
                return NotImplemented
            if not x.dim() == weight.dim() == num_axes + 2 or (bias is not None and bias.dim() != 1):
                return NotImplemented
        stride, dilation = per_axis(stride, num_axes), per_axis(dilation, num_axes)
        if isinstance(padding, str):
            extents = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
            odd = any(extent % 2 for extent in extents) or any(s != 1 for s in stride)
            if padding not in ("same", "valid") or (padding == "same" and odd):
                return NotImplemented
            padding = [extent // 2 if padding == "same" else 0 for extent in extents]
        layer = Convolution(function, stride, per_axis(padding, num_axes), dilation, groups)
        if torch.is_grad_enabled() and run.name_of(weight) is run.name_of(bias) is None:
            tangents = layer(x.tangents.flatten(0, 1), weight.detach()).unflatten(0, x.tangents.shape[:2])
            return Dual.of(layer(x.primal, weight, bias), tangents)
        stack = run.stack(x)
        if _is_narrow(run, stack, weight, groups) and not run.perturbation.per_example:
            return _all_rows_at_once(run, layer, stack, weight, bias)
        return _row_by_row(run, layer, stack, weight, bias, is_constant=not run.has_tangents(x))

    return rule


def _is_narrow(run: Pass, stack: Tensor, weight: Tensor, groups: int) -> bool:
    # Not in channels_last: an axis of rows between positions and channels would slow down the functions that follow.
    channels = (1 + run.perturbation.num_tangents) * max(weight.shape[:2])
    return groups == 1 and channels <= NARROW and stack.stride(2) != 1


def _all_rows_at_once(run: Pass, layer: Convolution, stack: Tensor, weight: Tensor, bias: Any) -> Dual:
    # Convolve images of (1 + R) p channels: the dual number x + e dx is the matrix [[x, 0], [dx, x]].
    kernels = run.stack(weight)  # (1, q, p, ...), or with its tangents (1 + K, q, p, ...)
    num_rows = 1 + run.perturbation.num_tangents
    columns = [pad_rows(kernels, num_rows).flatten(0, 1)]
    for row in range(1, len(stack)):
        zeros = [kernels.new_zeros(n * len(weight), *weight.shape[1:]) for n in (row, num_rows - 1 - row)]
        columns.append(torch.cat([zeros[0], weight, zeros[1]]))
    biases = None if bias is None else pad_rows(run.stack(bias), num_rows).flatten()
    outputs = layer(stack.transpose(0, 1).flatten(1, 2), torch.cat(columns, 1), biases)
    return Dual(outputs.unflatten(1, (num_rows, -1)).transpose(0, 1))


def _row_by_row(run: Pass, layer: Convolution, stack: Tensor, weight: Tensor, bias: Any, *, is_constant: bool) -> Dual:
    # Convolve each row as an image of its own.
    weight_name, bias_name = run.name_of(weight), run.name_of(bias)
    rows = layer(stack.flatten(0, 1), weight)
    rows = rows.reshape(*stack.shape[:2], *rows.shape[1:])
    outputs, tangents = rows[0], None if is_constant else rows[1:]
    if bias is not None:
        outputs.add_(bias.reshape(-1, *[1] * (outputs.dim() - 2)))
    if weight_name is not None or bias_name is not None:
        tangents = run.perturbation.convolution(weight_name, bias_name, stack[0], outputs, layer, tangents)
    return dual_of(outputs, tangents) if is_constant else Dual(rows)


rule_of(F.conv1d)(_convolution(F.conv1d, 1))
rule_of(F.conv2d)(_convolution(F.conv2d, 2))
rule_of(F.conv3d)(_convolution(F.conv3d, 3))
