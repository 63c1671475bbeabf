"""Rules of functions of one tensor, element by element: activations, powers, dropout."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fwdlib.stacked.dual import Dual
from fwdlib.stacked.forward_pass import Pass
from fwdlib.stacked.rules.rows import by_rows, dual_of
from fwdlib.stacked.rules.signatures import rule_of


@rule_of(F.relu, torch.relu, Tensor.relu)
def relu(run: Pass, x: Any) -> Dual:
    """Keep the entries of every row where the primal is positive, or nan, so that nan stays visible."""
    if torch.is_grad_enabled() and isinstance(x, Dual):
        return dual_of(torch.relu(x.primal), torch.ops.aten.threshold_backward(x.tangents, x.primal.detach(), 0))
    stack = run.stack(x)
    return Dual(torch.ops.aten.threshold_backward(stack, stack[0], 0))


def _elementwise(*functions: Callable, derivative: Callable[..., Tensor]) -> None:
    """Register an elementwise function y of one tensor x by its ``derivative(x, y, **options)``."""

    def along(tangents: Tensor, x: Tensor, y: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return tangents * derivative(x, y, *args, **kwargs)

    _register(functions, along, derivative, 2)


def _steep(*functions: Callable, derivative: Callable[..., Tensor]) -> None:
    """Register an elementwise function as :func:`_elementwise` does, whose slope is infinite at some places."""

    def along(tangents: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return _times(tangents, derivative(x, y))

    _register(functions, along, derivative, 2)


def _times(tangents: Tensor, slope: Tensor) -> Tensor:
    # A tangent of 0 stays so where the slope is infinite. As relu and others mask gradients, backprop has it so, too.
    return (tangents * slope).masked_fill(tangents == 0, 0)


def _by_kernel(*functions: Callable, kernel: Callable[..., Tensor]) -> None:
    """Register an elementwise function by the kernel of its backward pass, ``kernel(row, x, y, **options)``."""

    def along(tangents: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return by_rows(kernel, tangents, *args, **kwargs)

    _register(functions, along, kernel, 3)


def _register(functions: Sequence[Callable], along: Callable, described: Callable, num_skipped: int) -> None:
    # The signature is that of `described` after so many parameters.
    def rule(run: Pass, x: Any, *args: Any, **kwargs: Any) -> Any:
        if (args or kwargs) and any(map(run.has_tangents, (*args, *kwargs.values()))):
            return NotImplemented
        x = x if isinstance(x, Dual) else Dual(run.stack(x))
        y = functions[0](x.primal, *args, **kwargs)
        return dual_of(y, along(x.tangents, x.primal.detach(), y.detach(), *args, **kwargs))

    first = list(inspect.signature(rule).parameters.values())[:2]
    options = list(inspect.signature(described).parameters.values())[num_skipped:]
    rule.__signature__ = inspect.Signature([*first, *options])
    rule_of(*functions)(rule)


aten = torch.ops.aten


def _gelu(v: Tensor, x: Tensor, y: Tensor, approximate: str = "none") -> Tensor:
    return aten.gelu_backward.default(v, x, approximate=approximate)


def _leaky_relu(v: Tensor, x: Tensor, y: Tensor, negative_slope: float = 0.01) -> Tensor:
    return aten.leaky_relu_backward.default(v, x, negative_slope, False)


def _elu(v: Tensor, x: Tensor, y: Tensor, alpha: float = 1.0) -> Tensor:
    return aten.elu_backward.default(v, alpha, 1, 1, False, x)


def _softplus(v: Tensor, x: Tensor, y: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    return aten.softplus_backward.default(v, x, beta, threshold)


def _hardtanh(v: Tensor, x: Tensor, y: Tensor, min_val: float = -1.0, max_val: float = 1.0) -> Tensor:
    return aten.hardtanh_backward.default(v, x, min_val, max_val)


# The kernels of a backward pass conjugate the slope of a complex function.
_by_kernel(torch.tanh, F.tanh, Tensor.tanh, kernel=lambda v, x, y: aten.tanh_backward.default(v, y.conj()))
sigmoids = torch.sigmoid, F.sigmoid, Tensor.sigmoid, torch.special.expit
_by_kernel(*sigmoids, kernel=lambda v, x, y: aten.sigmoid_backward.default(v, y.conj()))
_by_kernel(F.gelu, kernel=_gelu)
_by_kernel(F.silu, kernel=lambda v, x, y: aten.silu_backward.default(v, x))
_by_kernel(F.hardswish, kernel=lambda v, x, y: aten.hardswish_backward.default(v, x))
_by_kernel(F.hardsigmoid, kernel=lambda v, x, y: aten.hardsigmoid_backward.default(v, x))
_by_kernel(F.leaky_relu, kernel=_leaky_relu)
_by_kernel(F.elu, kernel=_elu)
_by_kernel(F.softplus, kernel=_softplus)
_by_kernel(F.relu6, kernel=lambda v, x, y: _hardtanh(v, x, y, 0.0, 6.0))
_by_kernel(F.hardtanh, kernel=_hardtanh)
_elementwise(torch.exp, Tensor.exp, derivative=lambda x, y: y)
_steep(torch.log, Tensor.log, derivative=lambda x, y: 1 / x)
_steep(torch.sqrt, Tensor.sqrt, derivative=lambda x, y: 0.5 / y)
_steep(torch.rsqrt, Tensor.rsqrt, derivative=lambda x, y: -0.5 * y / x)
_elementwise(torch.square, Tensor.square, derivative=lambda x, y: 2 * x)
_elementwise(torch.sin, Tensor.sin, derivative=lambda x, y: torch.cos(x))
_elementwise(torch.cos, Tensor.cos, derivative=lambda x, y: -torch.sin(x))


@rule_of(torch.abs, Tensor.abs, Tensor.__abs__)
def absolute(run: Pass, x: Any) -> Any:
    """Multiply the tangents by the sign; for complex numbers that is not the derivative."""
    stack = run.stack(x)
    return NotImplemented if stack.is_complex() else dual_of(stack[0].abs(), stack[1:] * stack[0].sgn())


@rule_of(torch.pow, Tensor.pow, Tensor.__pow__)
def power(run: Pass, x: Any, exponent: Any) -> Any:
    """Raise to a constant exponent."""
    if not isinstance(exponent, (int, float, complex)) or not isinstance(x, Tensor):
        return NotImplemented
    stack = run.stack(x)
    slope = exponent * stack[0] ** (exponent - 1) if exponent else torch.zeros_like(stack[0])  # 0 ** -1 is infinite
    is_steep = isinstance(exponent, complex) or exponent < 1
    return dual_of(stack[0] ** exponent, _times(stack[1:], slope) if is_steep else stack[1:] * slope)


@rule_of(F.dropout, torch.dropout, train="training")
def dropout(run: Pass, x: Any, p: float = 0.5, training: bool = True) -> Any:
    """Apply one mask to all rows, drawn as torch draws it."""
    if isinstance(p, Tensor) or not 0 <= p <= 1:
        return NotImplemented
    stack = run.stack(x)
    if not training or p == 0:
        return Dual(stack)
    return Dual(stack * F.dropout(torch.ones_like(stack[0]), p))


@rule_of(torch.native_dropout)
def native_dropout(run: Pass, x: Any, p: float, train: bool | None) -> Any:
    """Return the mask, too."""
    stack = run.stack(x)
    y, mask = torch.native_dropout(stack[0], p, train)
    return dual_of(y, stack[1:] * mask * (1 / (1 - p) if train and p < 1 else 1)), mask
