"""Functions without a rule: their tangents by :func:`torch.func.jvp`, in one call of the function."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.func import jvp, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from fwdlib.forward.by_backward import LACKS, fails_in_silence, is_custom_operator, jvp_by_backward, with_tree
from fwdlib.forward.mode import quiet_vmap
from fwdlib.forward.replacements import CONTEXTS, REPLACEMENTS
from fwdlib.forward.rewind import Rewind
from fwdlib.stacked.aliases import memory_of
from fwdlib.stacked.dual import OTHER_ENGINE, Dual, function_name, joined, pad_rows
from fwdlib.tangents import is_transformed

PLAIN = (type(None), bool, int, float, complex, str, torch.Size, torch.dtype, torch.device, torch.layout)
"""Types of results that are no tensors and depend on no tangent."""


class Argument(NamedTuple):
    """An argument with tangents."""

    primal: Tensor
    tangents: Tensor
    """Shape (R, ...)."""
    dual: Dual | None
    """The argument, if it is a dual, whose views can be written into; None for a parameter."""


def call_without_rule(
    func: Callable,
    args: tuple,
    kwargs: dict,
    arguments: dict[int, Argument],
    check: Callable[[Tensor], None],
    doubt: Callable[[Dual, Dual, str], None],
) -> Any:
    """Return what ``func`` returns: duals for floating tensors, and everything else as it is.

    The function runs once, or with the same random numbers for each tangent. A result that is a view of an argument's
    memory becomes the same view of all rows.

    Args:
        func: any function of tensors.
        args: its arguments.
        kwargs: its arguments.
        arguments: those with tangents, by their place among the leaves of ``(args, kwargs)``.
        check: called with each value that the function returns for the primals, as the tape sees it.
        doubt: called with a source and a result that share memory in torch, and with the name of the function.

    Raises:
        NotImplementedError: if the function has no forward derivative, or does what cannot be followed.
        RuntimeError: if the function itself raises it.
    """
    leaves, structure = tree_flatten((args, kwargs))
    name, run, is_foreign = function_name(func), REPLACEMENTS.get(func, func), _is_foreign(func)
    shape: Any = None
    others: list[Any] = []
    lost: list[bool] = []  # whether a result has no tangent, although torch could have given it zeros

    def call(*values: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        nonlocal shape
        for i, value in zip(arguments, values, strict=True):
            leaves[i] = value
        inner_args, inner_kwargs = tree_unflatten(leaves, structure)
        outputs, shape = tree_flatten(run(*inner_args, **inner_kwargs))
        others[:] = [None if isinstance(o, Tensor) else o for o in outputs]
        kinds[:] = [_kind(o) for o in outputs]
        real = tuple(o for o, kind in zip(outputs, kinds, strict=True) if kind == "real")
        lost[:] = [forward_ad.unpack_dual(o).tangent is None for o in real]
        whole = tuple(o for o, kind in zip(outputs, kinds, strict=True) if kind == "whole")
        return real or values[:1], whole

    if isinstance(func, HigherOrderOperator):
        raise NotImplementedError(f"{name} takes functions, into which the stacked engine cannot see. {OTHER_ENGINE}")
    kinds: list[str] = []
    if fails_in_silence(func, args, kwargs):
        if not is_transformed():
            return _by_backward(func, args, kwargs, arguments, name)
        if not is_custom_operator(func):
            raise NotImplementedError(
                f"torch's forward derivative of {name} is not that of its backward pass, by which the stacked pass "
                f"differentiates it, but not inside torch.func.vmap. Train one seed at a time (stacked=False)."
            )
    is_scalar = _has_scalar(leaves, arguments)
    # A function in place draws its random numbers before torch refuses it.
    rewind = Rewind(nn.Module(), only_torch=True) if hasattr(func, "__wrapped__") else None
    versions = [argument.primal._version for argument in arguments.values()]
    try:
        with torch.enable_grad(), CONTEXTS.get(func, nullcontext)():
            rows, whole = _rows_by_jvp(call, list(arguments.values()), with_tape=is_foreign, one_by_one=is_scalar)
    except (NotImplementedError, RuntimeError) as error:
        if not isinstance(error, NotImplementedError) and not _is_refusal(str(error)):
            raise
        if is_transformed():
            raise NotImplementedError(
                f"{name} has no rule in the stacked pass and no forward derivative in torch. Register a rule with "
                f"fwdlib.register_rule, or write the model without the function. torch says: {error}"
            ) from error
        if rewind is not None:
            rewind()
        return _by_backward(run, args, kwargs, arguments, name)
    if versions != [argument.primal._version for argument in arguments.values()]:
        raise NotImplementedError(
            f"{name} writes into an argument with tangents, and the stacked engine does not know how. {OTHER_ENGINE}"
        )
    if "unknown" in kinds:
        kind = type(others[kinds.index("unknown")]).__name__
        raise NotImplementedError(
            f"{name} returned a {kind} for tensors with tangents, in which the stacked engine finds no tensors. "
            f"Register a rule with fwdlib.register_rule. {OTHER_ENGINE}"
        )
    if is_foreign and any(is_lost and value.requires_grad for is_lost, (value, _) in zip(lost, rows, strict=False)):
        raise NotImplementedError(
            f"{name} has a derivative for the backward pass and none for forward mode. Register a rule with "
            f"fwdlib.register_rule, or use fwdlib.backprop_gradient."
        )
    duals = []
    for (value, tangents), is_lost in zip(rows, lost or [False], strict=False):
        check(value)
        source = next((a.dual for a in arguments.values() if memory_of(value) == memory_of(a.primal)), None)
        is_view = source is not None and not is_lost and memory_of(value) == memory_of(source.stack)
        view = _view(value, source.stack) if is_view else None  # of expanded tensors the function got a copy
        duals.append(Dual(joined(value, tangents)) if view is None else view)
        if source is not None and view is None:
            doubt(source, duals[-1], name)
    found = {"real": iter(duals), "whole": iter(whole)}
    return tree_unflatten([next(found[k]) if k in found else o for o, k in zip(others, kinds, strict=True)], shape)


def _by_backward(func: Callable, args: tuple, kwargs: dict, arguments: dict[int, Argument], name: str) -> Any:
    call, leaves = with_tree(func, args, kwargs)
    for i, argument in arguments.items():
        leaves[i] = argument.primal
    tangents = [arguments[i].tangents if i in arguments else None for i in range(len(leaves))]
    num_rows = max(len(argument.tangents) for argument in arguments.values())
    tangents = [None if v is None else pad_rows(v, num_rows) for v in tangents]
    found = jvp_by_backward(call, leaves, tangents, name)
    if any(place is not None for place in found.written):
        raise NotImplementedError(
            f"{name} writes into an argument with tangents, and the stacked engine does not know how. {OTHER_ENGINE}"
        )
    duals = [y if v is None else Dual(joined(y, v)) for y, v in zip(found.leaves, found.tangents, strict=True)]
    return tree_unflatten(duals, found.structure)


def _rows_by_jvp(
    call: Callable, arguments: Sequence[Argument], *, with_tape: bool, one_by_one: bool
) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
    # For each real output its value and tangents (R, ...), and the outputs without a derivative.
    primals = tuple(argument.primal for argument in arguments)
    if with_tape and not is_transformed():
        primals = tuple(p if p.requires_grad else p.detach().requires_grad_() for p in primals)
    num_rows = max(1, *(len(argument.tangents) for argument in arguments))
    tangents = tuple(pad_rows(argument.tangents, num_rows) for argument in arguments)
    if num_rows == 1:
        values, derivatives, whole = jvp(call, primals, tuple(v[0] for v in tangents), has_aux=True)
        return [(v, d.detach().unsqueeze(0)) for v, d in zip(values, derivatives, strict=True)], list(whole)
    if one_by_one:
        found, rewind = [], Rewind(nn.Module(), only_torch=True)
        for row in zip(*tangents, strict=True):
            rewind()
            found.append(jvp(call, primals, row, has_aux=True))
        values, _, whole = found[0]
        derivatives = [torch.stack(slopes) for slopes in zip(*(slopes for _, slopes, _ in found), strict=True)]
        return [(v, d.detach()) for v, d in zip(values, derivatives, strict=True)], list(whole)
    along = vmap(lambda *v: jvp(call, primals, v, has_aux=True), randomness="same")
    with quiet_vmap():
        values, derivatives, whole = along(*tangents)
    return [(v[0], d.detach()) for v, d in zip(values, derivatives, strict=True)], [o[0] for o in whole]


def _has_scalar(leaves: Sequence[Any], arguments: Collection[int]) -> bool:
    # Whether an argument with tangents, or an index, has no axis. Torch's vmap is wrong for some functions of such.
    tensors = [(i, x) for i, x in enumerate(leaves) if isinstance(x, Tensor)]
    return any(x.dim() == 0 and (i in arguments or not x.is_floating_point()) for i, x in tensors)


def _is_foreign(func: Callable) -> bool:
    # Torch loses tangents, without a word, in custom functions that have a formula for the backward pass alone.
    if isinstance(func, (OpOverload, OpOverloadPacket)):
        return is_custom_operator(func)
    return (getattr(func, "__module__", None) or "torch").partition(".")[0] != "torch"


def _kind(output: Any) -> str:
    if isinstance(output, Tensor):
        return "real" if output.is_floating_point() or output.is_complex() else "whole"
    return "plain" if isinstance(output, PLAIN) else "unknown"


def _view(value: Tensor, stack: Tensor) -> Dual | None:
    # A view of the first row as the same view of all rows; None if as_strided cannot make it.
    alike = value.dtype == stack.dtype and value.is_conj() == stack.is_conj() and value.is_neg() == stack.is_neg()
    if not alike or is_transformed():
        return None
    strides = (stack.stride(0), *value.stride())
    return Dual(stack.as_strided((len(stack), *value.shape), strides, value.storage_offset()))


def _is_refusal(message: str) -> bool:
    return any(
        words in message
        for words in ("jvp", "forward AD", "mutate a captured", "Sparse CSR", "vmap: we do not yet support", *LACKS)
    )
