"""Forward derivatives of functions that have a formula for the backward pass alone.

A backward pass maps the gradient r of the outputs to J^T r. That is linear in r, so the gradient by r of v . (J^T r) is
J v: a backward pass through the backward pass. Both engines use it where torch has no forward derivative: for a
``torch.autograd.Function`` without a ``jvp``, a custom operator, and some of torch's own functions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.autograd import Function
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from fwdlib.forward.passes import Refusal
from fwdlib.forward.rewind import Rewind
from fwdlib.objectives import requiring_grad

Rows = Tensor | None
SCALE = -1e6  # a backward pass is tried at the gradient r and at SCALE r, where clipping and rectifying show
AGREES = 1e-3  # relative; far above the rounding of float32, far below what clipping changes


class Found(NamedTuple):
    """What a function has returned, and the derivatives."""

    leaves: list[Any]
    """The results, as :func:`torch.utils._pytree.tree_flatten` lists them; tensors without a tape."""
    structure: Any
    """Of the results."""
    tangents: list[Rows]
    """For each leaf its derivatives (K, ...); None for constants."""
    written: list[int | None]
    """For each leaf the place of the argument that it is, written into; else None."""


def is_differentiable(x: Any) -> bool:
    """Return whether ``x`` is a tensor that can have a derivative."""
    is_number = isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())
    return is_number and x.layout is torch.strided and not x.is_nested


def tangent_of(x: Any) -> Tensor | None:
    """Return the tangent of ``x`` in the current dual level, None if it has none.

    As ``forward_ad.unpack_dual(x).tangent``, which takes ten times as long.
    """
    level = forward_ad._current_level
    if level < 0 or not is_differentiable(x):
        return None
    return torch._C._VariableFunctions._unpack_dual(x, level=level)[1]


def leaves_on_tape(x: Tensor) -> Iterator[Tensor]:
    """Yield the tensors that require a gradient and that ``x`` was computed from, by autograd's tape."""
    seen, queue = set(), [x.grad_fn]
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            yield leaf
        queue += [following for following, _ in node.next_functions]


def jvp_by_backward(
    call: Callable, arguments: Sequence[Any], tangents: Sequence[Rows], name: str, own: Collection[int] = ()
) -> Found:
    """Call a function once, and differentiate it forward by means of its backward pass.

    Cost: the function, its backward pass, and a backward pass through that for each tangent.

    Args:
        call: the function.
        arguments: its arguments. Tensors among them are copied before the call, as it may write into them.
        tangents: for each argument its tangents (K, ...), None for none.
        name: of the function, for messages.
        own: identities of the model's parameters. They are not copied, as the function may know them by the model.

    Returns:
        The results and their derivatives: what ``loss.backward()`` would give along the tangents.

    Raises:
        Refusal: if the backward pass cannot be differentiated, or is not linear in the gradient.
    """
    with _plain(name), requiring_grad(x for x in arguments if id(x) in own):
        leaves, given, seen = {}, list(arguments), set()
        for i, (x, v) in enumerate(zip(arguments, tangents, strict=True)):
            if id(x) not in own:
                if v is not None:
                    leaves[i] = x.detach().requires_grad_()
                if is_differentiable(x):
                    given[i] = leaves.get(i, x.detach()).clone()
            elif v is not None and id(x) not in seen:  # one that is passed twice gets one gradient
                leaves[i] = x
                seen.add(id(x))
        versions = {id(x): (i, x._version) for i, x in enumerate(given) if is_differentiable(x)}
        results, structure = tree_flatten(call(*given))
        found = [y for y in results if isinstance(y, Tensor) and y.requires_grad]
        rewind = Rewind(nn.Module(), only_torch=True)
        if not all(map(is_differentiable, found)):
            raise Refusal(f"{name} returns a sparse or nested tensor and has no forward derivative. {OTHERS}")
        rows = _rows(found, leaves, tangents, name) if found else iter(())
        derivatives = [next(rows) if isinstance(y, Tensor) and y.requires_grad else None for y in results]
        rewind()  # a backward pass that draws does so after the forward pass
        places = {key: i for key, (i, version) in versions.items() if given[i]._version != version}
    written = [places.get(id(y)) for y in results]
    if len({*places.values()} - {*written}):
        raise Refusal(f"{name} writes into an argument that it does not return. {OTHERS}")
    plain = [y.detach() if isinstance(y, Tensor) else y for y in results]
    return Found(plain, structure, derivatives, written)


def _rows(found: list[Tensor], leaves: dict[int, Tensor], tangents: Sequence[Rows], name: str) -> Iterator[Tensor]:
    # For each result its derivatives (K, ...).
    seeds = [_probe(y).requires_grad_() for y in found]
    number = max(len(tangents[i]) for i in leaves)
    along = [[tangents[i].expand(number, *x.shape)[k] for i, x in leaves.items()] for k in range(number)]
    ways = [_twice] + [_entry_by_entry] * (sum(y.numel() for y in found) <= MOST)
    why = ""
    try:
        pulled = _checked(found, leaves, seeds, name)
        for way in ways:
            rows, why = way(found, leaves, along, seeds)
            if rows and all(_are_right(pulled, v, seeds, row) for v, row in zip(along, rows, strict=True)):
                return iter([torch.stack([row[j].detach() for row in rows]) for j in range(len(found))])
    except RuntimeError as error:
        if isinstance(error, NotImplementedError) and OTHERS in str(error):
            raise
        why = str(error).partition("\n")[0]
    raise Refusal(
        f"{name} has a derivative for the backward pass and none for forward mode, and its backward pass cannot be "
        f"differentiated. {why} {OTHERS}"
    )


def _twice(found: list[Tensor], leaves: dict[int, Tensor], along: list, seeds: list[Tensor]) -> tuple[list, str]:
    # The derivatives for each tangent, by a backward pass through the backward pass; or why there are none.
    try:
        pulled = _pull(found, leaves, seeds, create_graph=True)
        return [_transposed(pulled, v, seeds) for v in along], ""
    except RuntimeError as error:
        return [], str(error).partition("\n")[0]


@torch.no_grad()
def _entry_by_entry(
    found: list[Tensor], leaves: dict[int, Tensor], along: list, seeds: list[Tensor]
) -> tuple[list, str]:
    # The same, by a backward pass for each entry of the results.
    rows = [tuple(torch.zeros_like(y) for y in found) for _ in along]
    for j, y in enumerate(found):
        for i in range(y.numel()):
            for unit in (1, 1j) if y.is_complex() else (1,):
                units = [torch.zeros_like(r) for r in seeds]
                units[j].view(-1)[i] = unit
                pulled = _pull(found, leaves, units)
                for row, v in zip(rows, along, strict=True):
                    row[j].view(-1)[i] += unit * _inner(pulled, v)
    return rows, ""


def _are_right(pulled: list[Tensor], v: list[Tensor], seeds: list[Tensor], row: tuple[Tensor, ...]) -> bool:
    # v . (J^T r) is r . (J v)
    with torch.no_grad():
        return _agree(_inner(pulled, v), _inner(seeds, row), _size(pulled, v))


OTHERS = "Write the function by others, give its torch.autograd.Function a `jvp`, or use backprop_gradient."
MOST = 256
"""Number of results whose derivatives may be found one by one, with a backward pass for each."""


@torch.no_grad()
def _checked(found: list[Tensor], leaves: dict[int, Tensor], seeds: list[Tensor], name: str) -> list[Tensor]:
    # The backward pass at the seeds, refused if it is another multiple at another multiple of them.
    pulled = _pull(found, leaves, seeds)
    far = _pull(found, leaves, [SCALE * r for r in seeds])
    if not all(_agree(g * SCALE, other) for g, other in zip(pulled, far, strict=True)):
        raise Refusal(
            f"the backward pass of {name} is not linear in the gradient that it gets (it clips or cuts it, say), so "
            f"backprop's gradient has no counterpart in forward mode. {OTHERS}"
        )
    return pulled


def _pull(found: list[Tensor], leaves: dict[int, Tensor], seeds: list[Tensor], *, create_graph: bool = False) -> list:
    # As torch.autograd.grad, which a function mode would catch and so not watch.
    inputs = tuple(leaves.values())
    run = torch.autograd.Variable._execution_engine.run_backward
    grads = run(tuple(found), tuple(seeds), True, create_graph, inputs, allow_unreachable=True, accumulate_grad=False)
    pairs = zip(grads, inputs, strict=True)
    return [
        torch.zeros_like(x) if g is None else g.to_dense() if g.layout is not torch.strided else g for g, x in pairs
    ]


def _transposed(pulled: list[Tensor], along: list[Tensor], seeds: list[Tensor]) -> tuple[Tensor, ...]:
    total = _inner(pulled, along)
    if not total.requires_grad:
        return tuple(torch.zeros_like(r) for r in seeds)
    return torch.autograd.grad(total, seeds, retain_graph=True, materialize_grads=True)


def _inner(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    return sum((a.conj() * b).sum().real for a, b in zip(left, right, strict=True))


def _size(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    return sum((a * b).abs().sum() for a, b in zip(left, right, strict=True))


def _agree(one: Tensor, other: Tensor, size: Tensor | None = None) -> bool:
    size = one.abs().max() if size is None and one.numel() else size
    return not one.numel() or bool((one - other).abs().max() <= AGREES * size)


def _probe(y: Tensor) -> Tensor:
    # A gradient of size 1 without a pattern; not drawn at random, as the model's random numbers are its own.
    wave = torch.arange(1, y.numel() + 1, device=y.device, dtype=torch.float64).mul(1.2345).sin()
    return (torch.complex(wave, wave.flip(0)) if y.is_complex() else wave).to(y.dtype).reshape(y.shape)


class _Watched(TorchFunctionMode):
    """Hides functions from the engines, and refuses a backward pass that leaves gradients in ``.grad`` itself.

    Reversible layers do so: their gradients do not come back from ``torch.autograd.grad``.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def __torch_function__(self, func: Callable, types: Iterable, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in LEAVES_GRADIENTS:
            raise Refusal(f"the backward pass of {self.name} runs another one, as if by itself. {OTHERS}")
        with torch._C.DisableTorchFunction():
            return func(*args, **(kwargs or {}))


LEAVES_GRADIENTS = {torch.autograd.backward, Tensor.backward, Tensor.grad.__get__, Tensor.grad.__set__}


@contextmanager
def _plain(name: str) -> Iterator[None]:
    # Reverse mode alone, unseen by the engines.
    enabled = torch._C._is_fwd_grad_enabled()
    try:
        torch._C._set_fwd_grad_enabled(False)
        with _Watched(name), torch.enable_grad():
            yield
    finally:
        torch._C._set_fwd_grad_enabled(enabled)


def with_tree(func: Callable, args: tuple, kwargs: dict) -> tuple[Callable, list[Any]]:
    """Return ``func`` as a function of the leaves of its arguments, and the leaves."""
    leaves, structure = tree_flatten((args, kwargs), is_leaf=_has_no_tensor)

    def call(*values: Any) -> Any:
        inner_args, inner_kwargs = tree_unflatten(values, structure)
        return func(*inner_args, **inner_kwargs)

    return call, leaves


def _has_no_tensor(x: Any) -> bool:
    # Such a list or dict is passed on as it is, since the function may write into it.
    return isinstance(x, (list, dict)) and not any(isinstance(leaf, Tensor) for leaf in tree_leaves(x))


def is_custom_operator(func: Callable) -> bool:
    """Return whether ``func`` is an operator that is not torch's own: torch's forward mode may lose its tangents."""
    if not isinstance(func, (OpOverload, OpOverloadPacket)):
        return False
    return str(func).partition(".")[0] not in ("aten", "prims")


def fails_in_silence(func: Callable, args: tuple, kwargs: dict) -> bool:
    """Return whether torch's forward mode computes other derivatives of a call than its backward pass, without a word.

    Args:
        func: the function.
        args: its arguments.
        kwargs: its arguments.
    """
    if func in REDUCTIONS:
        given = (*filter(lambda x: isinstance(x, str), args), kwargs.get("reduce"))
        return "prod" in given or not kwargs.get("include_self", True)  # where ties count what is left out
    if func is CHUNKED:
        return kwargs.get("options") is not None
    return func in WRONG or is_custom_operator(func)


WRONG = {
    *(torch.cholesky_inverse, Tensor.cholesky_inverse, torch.triangular_solve, Tensor.triangular_solve),
    *(torch.as_strided_scatter, Tensor.as_strided_scatter),  # where the entries overlap
    *(F.max_unpool1d, F.max_unpool2d, F.max_unpool3d),  # where two maxima have the same place
    *(torch.quantile, Tensor.quantile, torch.nanquantile, Tensor.nanquantile),  # take others of equal entries
}
"""Functions of torch whose forward derivative is not the gradient along the tangent: torch's own samples show it."""
CHUNKED = getattr(F, "linear_cross_entropy", torch)  # newer than torch 2.11
REDUCTIONS = {torch.scatter_reduce, Tensor.scatter_reduce, Tensor.scatter_reduce_}
LACKS = "Trying to use forward AD with", "aten::_efficientzerotensor"
"""Words in torch's messages about a function without a forward derivative."""


def is_checkpoint(cls: type[Function]) -> bool:
    """Return whether ``cls`` is the function of a reentrant checkpoint, whose first argument is the function to run."""
    return issubclass(cls, checkpoint.CheckpointFunction)


def only_saves(cls: type[Function]) -> bool:
    """Return whether ``cls`` only keeps the inputs of a checkpoint; its result has no use, and its backward raises."""
    return cls is getattr(checkpoint, "_NoopSaveInputs", None)  # torch 2.11; later versions keep them in other ways


def has_jvp(cls: type[Function]) -> bool:
    """Return whether ``cls`` has a forward derivative of its own."""
    return cls.jvp is not Function.jvp
