"""Directional derivatives of an objective: by torch's forward mode, or by the stacked engine where that is faster.

Both engines give the same numbers from the same tangents. Where the stacked one refuses a model, torch's takes its
place, then and from then on (:func:`either_engine`).
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.func import jvp, vmap

from fwdlib.forward.by_backward import OTHERS, leaves_on_tape
from fwdlib.forward.mode import ForwardMode, quiet_vmap, tangents_on, without_tape
from fwdlib.forward.padding import Padding, without_rows
from fwdlib.forward.passes import Refusal
from fwdlib.forward.rewind import ONE_PASS, Rewind
from fwdlib.objectives import (
    ModelLoss,
    Objective,
    check_depends,
    check_scalar,
    keep_buffers,
    loss_and_buffers,
    modules_of,
    requiring_grad,
)
from fwdlib.tangents import AnyGenerator, Params, is_transformed

T = TypeVar("T")

_REFUSED: weakref.WeakSet = weakref.WeakSet()  # models and functions that the stacked engine has refused
_TAKEN: weakref.WeakSet = weakref.WeakSet()  # those that it has taken, and that draw by torch alone


class Derivatives(NamedTuple):
    """The loss and its derivatives along K tangents."""

    loss: Tensor
    """Scalar, without a graph."""
    jvps: Tensor
    """Shape (K,)."""
    padding: Padding
    """Which rows of embedding tables the loss does not depend on."""
    is_constant: bool = False
    """Whether the loss is known to depend on no parameter."""

    def trained(self, tangents: Params) -> Params:
        """Return the tangents with zeros in the rows that the loss does not depend on."""
        rows = self.padding.rows()
        return {name: without_rows(v, rows[name]) if name in rows else v for name, v in tangents.items()}


def check_followable(modules: Iterable[nn.Module]) -> None:
    """Refuse modules that act in the backward pass, which there is none of here.

    Raises:
        NotImplementedError: if one has backward hooks, or exchanges gradients with other processes.
    """
    if torch.nn.modules.module._global_backward_hooks or torch.nn.modules.module._global_backward_pre_hooks:
        raise NotImplementedError(
            "a backward hook is registered for all modules, and a forward gradient has no backward pass that would "
            "call it. Remove it (handle.remove())."
        )
    for module in modules:
        if module._backward_hooks or module._backward_pre_hooks:
            raise NotImplementedError(
                f"the module {type(module).__name__} has backward hooks, and a forward gradient has no backward pass "
                f"that would call them. Remove them (handle.remove()). To change gradients, register hooks of "
                f"parameters (Tensor.register_hook), or change .grad afterwards."
            )
        if _exchanges(type(module)):
            raise NotImplementedError(
                f"{type(module).__name__} averages gradients in a backward pass, which a forward gradient does not "
                f"have: the processes would differ. Pass the module inside, model.module, and average .grad yourself, "
                f"or use `python -m fwdlib train --processes N`, where the processes exchange directional derivatives."
            )


@functools.cache
def _exchanges(kind: type) -> bool:
    # By names, because importing torch's classes takes long.
    names = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}
    return not names.isdisjoint(base.__name__ for base in kind.__mro__)


def suits_stacked(
    objective: Objective, num_tangents: int, blocks: str = "joint", chunk_size: int | None = None
) -> bool:
    """Return whether the stacked engine takes such an estimate: of a model, or along several tangents, in one piece."""
    if blocks != "joint" or chunk_size is not None:
        return False
    return isinstance(objective, ModelLoss) or (num_tangents > 1 and not is_transformed())


def either_engine(
    objective: Objective, stacked: Callable[[], T], torch_engine: Callable[[], T], generator: AnyGenerator = None
) -> T:
    """Return ``stacked()``, or ``torch_engine()`` where the stacked engine fails, or has failed, on the objective.

    Args:
        objective: the loss of a model, or a plain function.
        stacked: computes the result in a stacked pass.
        torch_engine: computes it by torch's forward mode.
        generator: where ``stacked`` draws from. After a refusal it, torch's global generator and the model's buffers
            are as before.
    """
    model, key = (objective.model,) * 2 if isinstance(objective, ModelLoss) else (nn.Module(), objective)
    try:
        is_refused = key in _REFUSED
    except TypeError:  # an object without weak references, or without a hash
        is_refused, key = False, model
    if is_refused:
        return torch_engine()
    rewind = Rewind(model, generator, only_torch=key in _TAKEN)
    try:
        found = stacked()
    except (NotImplementedError, RuntimeError, TypeError, LookupError, AttributeError, AssertionError):
        rewind()  # an error of the model's own comes again in torch's engine; any other is the stacked engine's fault
    else:
        if key not in _TAKEN and not rewind.others_have_drawn():
            _TAKEN.add(key)
        return found
    found = torch_engine()
    _REFUSED.add(key)
    return found


def derivatives_along(
    objective: Objective, params: Params, tangents: Params, *, engine: str = "auto", chunk_size: int | None = None
) -> Derivatives:
    """Differentiate along given tangents.

    Several tangents are one stacked pass where that is possible. Torch's engine makes one pass for each tangent of a
    model, and one vmapped pass for those of a plain function.

    Args:
        objective: params -> scalar.
        params: the point.
        tangents: for each parameter of shape (...) a tensor of shape (K, ...).
        engine: ``"torch"``, or ``"auto"`` for either.
        chunk_size: how many tangents go through torch's engine at once; None for all.

    Raises:
        ValueError: if the objective is not a scalar.
        NotImplementedError: if a function of the objective has no forward derivative.
    """

    def by_torch() -> Derivatives:
        if isinstance(objective, ModelLoss):
            check_followable(modules_of(objective.model))
        if is_transformed() or not isinstance(objective, ModelLoss):
            return _in_one_pass(objective, params, tangents, chunk_size)
        return _pass_by_pass(objective, params, tangents, chunk_size)

    def by_stack() -> Derivatives:
        from fwdlib.stacked.estimator import stacked_derivatives

        return stacked_derivatives(objective, params, tangents)

    num_tangents = len(next(iter(tangents.values())))
    is_suited = suits_stacked(objective, num_tangents, chunk_size=chunk_size)
    if engine == "torch" or num_tangents == 1 or is_transformed() or not is_suited:
        return by_torch()
    return either_engine(objective, by_stack, by_torch)


def _pass_by_pass(objective: ModelLoss, params: Params, tangents: Params, chunk_size: int | None) -> Derivatives:
    # One pass for each tangent, on tensors that the model can use in every way it uses its parameters. Where there are
    # several, the first is made again at the end: its numbers show whether all began alike.
    model, num_tangents = objective.model, len(next(iter(tangents.values())))
    with objective.placed(params) as leaves:
        rewind = Rewind(model, written=leaves.values(), only_torch=num_tangents == 1)
        jvps, first = [], None
        for row in [*range(num_tangents), 0] if num_tangents > 1 else [0]:
            if jvps:
                rewind()
            tangent = {name: v[row] for name, v in tangents.items()}
            try:
                one = _along(objective, leaves, tangent, without_tape(model.parameters()))
            except RuntimeError as error:
                if NESTED in str(error):
                    break  # the model calls torch.func.jvp, which nests in another torch.func.jvp alone
                if NO_TAPE_OF not in str(error):
                    raise
                rewind()  # the model calls torch.autograd.grad by its own parameters, which takes a tape
                one = _along(objective, leaves, tangent, requiring_grad(leaves.values()))
            check_depends(one.is_constant, objective, params)
            if first is None:
                first = one
            else:
                _check_same("loss", first.loss, one.loss, first.loss, 1e-7)
            jvps.append(one.jvps)
        else:
            if num_tangents > 1:
                _check_same("derivative along the first tangent", jvps[0], jvps.pop(), max(jvps, key=abs), 1e-5)
            return one._replace(jvps=torch.stack(jvps))
        rewind()
    return _in_one_pass(objective, params, tangents, chunk_size)


NESTED = "Nested forward mode"
NO_TAPE_OF = "does not require grad"
"""Words in torch's messages about a dual level inside another one, and about a gradient by what has no tape."""


def _check_same(what: str, one: Tensor, other: Tensor, size: Tensor, tolerance: float) -> None:
    # Sums may be added up in another order.
    allowed = max(tolerance, 10 * torch.finfo(one.dtype).eps) * abs(size.item())
    if not torch.allclose(one, other, rtol=0, atol=allowed if math.isfinite(allowed) else 0.0, equal_nan=True):
        raise NotImplementedError(
            f"the {what} was {one.item():.9g} and then {other.item():.9g}: the model or the closure has a state that "
            f"torch's engine, which runs it once for each tangent, cannot restore. {ONE_PASS}"
        )


def _along(objective: ModelLoss, leaves: Params, tangent: Params, tape: AbstractContextManager) -> Derivatives:
    with named_refusal(), tangents_on(leaves, tangent), tape, torch.enable_grad():
        return _evaluated(objective.run, leaves)


def _in_one_pass(objective: Objective, params: Params, tangents: Params, chunk_size: int | None) -> Derivatives:
    # All tangents in one vmapped pass, or in as few as chunk_size allows.
    params, num_tangents = {name: p.detach() for name, p in params.items()}, len(next(iter(tangents.values())))
    one = _by_transforms if is_transformed() or isinstance(objective, ModelLoss) else _on_duals
    if num_tangents == 1:
        return one(objective, params, tangents)
    rewind = Rewind(objective.model if isinstance(objective, ModelLoss) else nn.Module())
    try:
        return _by_transforms(objective, params, tangents, chunk_size)
    except RuntimeError:  # vmap lets nothing with a row for each tangent be written into what has one for all, say
        if is_transformed():
            raise
    found = []
    for row in range(num_tangents):
        rewind()
        found.append(one(objective, params, {name: v[row : row + 1] for name, v in tangents.items()}))
    return found[0]._replace(jvps=torch.cat([each.jvps for each in found]))


def _by_transforms(
    objective: Objective, params: Params, tangents: Params, chunk_size: int | None = None
) -> Derivatives:
    padding = Padding()

    def evaluate(params: Params) -> tuple[Tensor, Params]:
        with ForwardMode(params, padding):
            return loss_and_buffers(objective, params)

    def along(tangent: Params) -> tuple[Tensor, Tensor, Params]:
        return jvp(evaluate, (params,), (tangent,), has_aux=True)

    with named_refusal(), torch.enable_grad(), quiet_vmap():
        if len(next(iter(tangents.values()))) > 1:  # randomness="same": one Dropout mask for all tangents and chunks
            losses, jvps, buffers = vmap(along, randomness="same", chunk_size=chunk_size)(tangents)
            loss, buffers = losses[0], {name: buffer[0] for name, buffer in buffers.items()}
        else:
            loss, jvps, buffers = along({name: v[0] for name, v in tangents.items()})
            jvps = jvps.reshape(1)
    keep_buffers(objective, buffers)
    return Derivatives(loss, jvps, padding)


def _on_duals(objective: Objective, params: Params, tangents: Params, *, with_tape: bool = False) -> Derivatives:
    # torch.func.jvp without the overhead of its wrappers: half the time of a step on small objectives
    try:
        with named_refusal(), torch.enable_grad(), forward_ad.dual_level():
            point = {name: p.requires_grad_() for name, p in params.items()} if with_tape else params
            duals = {name: forward_ad.make_dual(p, tangents[name][0]) for name, p in point.items()}
            one = _evaluated(lambda: objective(duals), duals)
        return one._replace(jvps=one.jvps.reshape(1))
    except RuntimeError as error:
        if NESTED in str(error):
            return _by_transforms(objective, params, tangents)
        if NO_TAPE_OF not in str(error) or with_tape:
            raise
    return _on_duals(objective, {name: p.detach() for name, p in params.items()}, tangents, with_tape=True)


Multiple = Callable[[Params], tuple[list[Tensor], list[Tensor]]]
"""A function from a point to results with a derivative, and results without one."""


def pushforward(function: Multiple, point: Params, tangents: Params) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Differentiate a function with any number of results along K tangents, by torch's forward mode.

    Args:
        function: the function.
        point: tensor by name.
        tangents: for each tensor of shape (...) one of shape (K, ...).

    Returns:
        The results, their derivatives with a leading axis of length K, and the other results.

    Raises:
        NotImplementedError: if a function has no forward derivative.
    """
    along = partial(_push_one, function, point)
    with named_refusal(), torch.enable_grad(), quiet_vmap():
        return vmap(along, out_dims=(None, 0, None), randomness="same")(tangents)


def repeated_pushforward(
    function: Multiple, point: Params, tangents: Params
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Differentiate as :func:`pushforward` does, with the value computed anew for each tangent, for a compiler to fuse.

    Values and tangents then have the same shape, so an element-wise function is one loop that keeps nothing in memory.

    Args:
        function: pure, and without random numbers.
        point: tensor by name.
        tangents: for each tensor of shape (...) one of shape (K, ...).
    """
    repeated = {name: x.expand(len(tangents[name]), *x.shape) for name, x in point.items()}
    with named_refusal(), torch.enable_grad(), quiet_vmap():
        values, slopes, others = vmap(partial(_push_one, function))(repeated, tangents)
    return [x[0] for x in values], slopes, [x[0] for x in others]


def unrolled_pushforward(
    function: Multiple, point: Params, tangents: Params, active: Sequence[Collection[str]]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Differentiate as :func:`pushforward` does, one tangent at a time, for a compiler to fuse.

    Where all is element-wise, the value and its K derivatives then are one loop, that keeps them in registers.

    Args:
        function: pure, and without random numbers: it runs K times.
        point: tensor by name.
        tangents: for each tensor of shape (...) one of shape (K, ...).
        active: for each tangent the names of the tensors along which it is not zero.
    """
    with named_refusal(), torch.enable_grad():
        found = [
            _push_one(function, point, {name: tangents[name][k] for name in names}) for k, names in enumerate(active)
        ]
    values, _, others = found[0]
    return values, [torch.stack(of) for of in zip(*(slopes for _, slopes, _ in found), strict=True)], others


def _push_one(function: Multiple, point: Params, tangent: Params) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    def evaluate(some: Params) -> tuple[list[Tensor], list[Tensor]]:
        values = {name: some.get(name, x) for name, x in point.items()}
        with ForwardMode(values):
            return function(values)

    return jvp(evaluate, ({name: point[name] for name in tangent},), (tangent,), has_aux=True)


def _evaluated(evaluate: Callable[[], Any], duals: Params) -> Derivatives:
    # Along the one tangent that the parameters have in the current dual level; the derivative is a scalar.
    with ForwardMode(duals) as mode:
        loss = check_scalar(evaluate())
    if loss.requires_grad:
        _check_tape(loss, duals)
    loss, derivative = forward_ad.unpack_dual(loss)
    is_constant = derivative is None
    derivative = torch.zeros_like(loss) if is_constant else derivative.detach()
    return Derivatives(loss.detach(), derivative, mode.padding, is_constant)


def _check_tape(loss: Tensor, params: Params) -> None:
    # What was computed from the parameters before the pass has a tape, and no tangent.
    if any(p.requires_grad for p in params.values()):
        return  # the pass itself keeps a tape
    names = {id(p): name for name, p in params.items()}
    for leaf in leaves_on_tape(loss):
        if id(leaf) in names:
            raise NotImplementedError(
                f"the loss depends on a tensor that was computed from the parameter {names[id(leaf)]!r} before the "
                f"pass. Compute it in the forward pass, or use x.detach() if it is to count as a constant."
            )


@contextmanager
def named_refusal() -> Iterator[None]:
    """Give torch's message about a missing forward derivative, which advises a feature request, a way out.

    Raises:
        NotImplementedError: in its place.
        Exception: any other, unchanged.
    """
    try:
        yield
    except Exception as error:
        first = str(error).partition("\n")[0]
        if isinstance(error, Refusal) or OTHERS in first:
            raise
        if isinstance(error, NotImplementedError) or (isinstance(error, RuntimeError) and "jvp" in first):
            bound = "custom autograd.Function" in first
            raise NotImplementedError(
                f"torch has no forward derivative for a function of this objective: {first} {OTHERS}{bound * BOUND}"
            ) from error
        is_torchs = type(error).__module__.startswith("torch._dynamo")
        if is_torchs or any(words in first for words in (NESTED, "Multiple dispatch failed")):
            raise NotImplementedError(f"torch's forward mode cannot follow this objective: {first} {OTHERS}") from error
        raise


BOUND = " If the function was bound before the pass (f = F.apply), call F.apply(...) in its place."
