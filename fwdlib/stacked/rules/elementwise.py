"""Rules of functions of one tensor, element by element: activations, powers, dropout."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fwdlib.stacked.dual import Dual
from fwdlib.stacked.forward_pass import Pass
from fwdlib.stacked.rules.rows import dual_of
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

    def rule(run: Pass, x: Any, *args: Any, **kwargs: Any) -> Any:
        if (args or kwargs) and any(map(run.has_tangents, (*args, *kwargs.values()))):
            return NotImplemented
        x = x if isinstance(x, Dual) else Dual(run.stack(x))
        y = functions[0](x.primal, *args, **kwargs)
        return dual_of(y, x.tangents * derivative(x.primal.detach(), y.detach(), *args, **kwargs))

    first = list(inspect.signature(rule).parameters.values())[:2]
    options = list(inspect.signature(derivative).parameters.values())[2:]
    rule.__signature__ = inspect.Signature([*first, *options])
    rule_of(*functions)(rule)


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
    return dual_of(stack[0] ** exponent, stack[1:] * slope)


@rule_of(F.dropout, torch.dropout, train="training")
def dropout(run: Pass, x: Any, p: float = 0.5, training: bool = True) -> Any:
    """Apply one mask to all rows, drawn as torch draws it."""
    if isinstance(p, Tensor) or not 0 <= p <= 1:
        return NotImplemented
    stack = run.stack(x)
    if not training or p == 0:
        return Dual(stack)
    return Dual(stack * F.dropout(torch.ones_like(stack[0]), p))
