"""Rules of functions without a derivative: their results are constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fwdlib.stacked.dual import primal_of, primals_of
from fwdlib.stacked.forward_pass import Pass, register_rule


def _constant(*functions: Callable) -> None:
    """Register functions whose results are constants: they get the primals alone."""
    for function in functions:

        def rule(run: Pass, *args: Any, _function: Callable = function, **kwargs: Any) -> Any:
            found = _function(*primals_of(args), **primals_of(kwargs))
            if found is NotImplemented:  # as x == None, which Python decides by identity
                return {Tensor.__eq__: False, Tensor.__ne__: True}.get(_function, found)
            return found

        register_rule(function)(rule)


_constant(torch.argmax, Tensor.argmax, torch.argmin, Tensor.argmin, torch.argsort, Tensor.argsort)
_constant(torch.gt, torch.ge, torch.lt, torch.le, torch.eq, torch.ne, torch.isnan, torch.isinf, torch.isfinite)
_constant(Tensor.gt, Tensor.ge, Tensor.lt, Tensor.le, Tensor.eq, Tensor.ne, Tensor.isnan, Tensor.isinf, Tensor.isfinite)
_constant(Tensor.__gt__, Tensor.__ge__, Tensor.__lt__, Tensor.__le__, Tensor.__eq__, Tensor.__ne__)
_constant(Tensor.detach, torch.detach, Tensor.data.__get__, Tensor.item, Tensor.tolist)
_constant(Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__format__, Tensor.__repr__)
_constant(torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like, torch.rand_like, torch.randn_like)
_constant(Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty, Tensor.new_full, Tensor.new_tensor)
_constant(Tensor.stride, Tensor.is_contiguous)
_constant(Tensor.long, Tensor.int, Tensor.short, Tensor.char, Tensor.byte, Tensor.bool)


@register_rule(Tensor.new)
def new(run: Pass, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Make a plain tensor; a ``torch.Size`` stays one, as any other tuple would be its entries."""
    return NotImplemented if any(map(run.has_tangents, args)) else primal_of(x).new(*args, **kwargs)
