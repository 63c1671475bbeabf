"""Functions that belong to autograd or to a tensor's memory, and are answered before any rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fwdlib.forward.mode import HOOKS, SET_REQUIRES_GRAD
from fwdlib.forward.passes import Refusal
from fwdlib.stacked.dual import OTHER_ENGINE, Dual, function_name, primal_of, primals_of

if TYPE_CHECKING:
    from fwdlib.stacked.forward_pass import Pass


def _refuse(run: Pass, func: Callable, *args: Any, **kwargs: Any) -> Any:
    raise Refusal(
        f"{function_name(func)} was called on a tensor with tangents, and the stacked engine keeps no tape. "
        f"{OTHER_ENGINE}"
    )


def _refuse_numpy(run: Pass, func: Callable, *args: Any, **kwargs: Any) -> Any:
    if kwargs.get("force"):  # which detaches
        return func(*primals_of(args), **kwargs)
    raise RuntimeError(
        f"{function_name(func)} was called on a tensor with tangents, which numpy would lose. Torch refuses it for a "
        f"tensor that requires a gradient, too. Use x.detach().numpy() if x is to count as a constant."
    )


def _on_primals(run: Pass, func: Callable, *args: Any, **kwargs: Any) -> Any:
    return func(*primals_of(args), **primals_of(kwargs))


def _in_no_grad(run: Pass, func: Callable, *args: Any, **kwargs: Any) -> Any:
    return run.on_primals(func, args, kwargs)


def _require_grad(run: Pass, func: Callable, x: Tensor, requires_grad: bool = True) -> Tensor:
    if isinstance(x, Dual):
        if not requires_grad:
            raise RuntimeError("requires_grad of an activation cannot be switched off; use x.detach()")
        return x
    run.require_grad(x, requires_grad)
    return x.requires_grad_(requires_grad)


def _set_data(run: Pass, func: Callable, x: Tensor, value: Tensor) -> None:
    if isinstance(x, Dual):
        x.stack = torch.cat([primal_of(value).detach().unsqueeze(0), x.tangents])
    else:
        x.data = primal_of(value).detach()


def _detach_in_place(run: Pass, func: Callable, x: Tensor) -> Tensor:
    if isinstance(x, Dual):
        run.detach(x)
        return x
    run.forget(x)
    return x.detach_()


SPECIAL: dict[Callable, Callable] = {
    **dict.fromkeys([torch.autograd.grad, torch.autograd.backward, Tensor.backward, *HOOKS], _refuse),
    **dict.fromkeys([Tensor.data_ptr, Tensor.storage, Tensor.untyped_storage, Tensor.storage_offset], _on_primals),
    **dict.fromkeys([Tensor.is_set_to, Tensor.is_shared, Tensor.is_pinned], _on_primals),
    **dict.fromkeys([Tensor.numpy, Tensor.__array__], _refuse_numpy),
    **dict.fromkeys([Tensor.__deepcopy__, nn.Parameter.__deepcopy__, Tensor.__reduce_ex__], _on_primals),
    **dict.fromkeys([Tensor.grad.__set__, Tensor.grad.__delete__], _on_primals),
    **dict.fromkeys(SET_REQUIRES_GRAD, _require_grad),
    **dict.fromkeys([f for name, f in vars(nn.init).items() if name.endswith("_") and callable(f)], _in_no_grad),
    Tensor.data.__set__: _set_data,
    Tensor.detach_: _detach_in_place,
    torch.detach_: _detach_in_place,
}
"""Function -> ``handler(run, func, *args, **kwargs)``."""
