"""A step of a torch optimizer with an estimate of the gradient, from its factors where it is kept as such."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from fwdlib.estimators import forward_gradient
from fwdlib.objectives import ClosureLoss, assign_gradients
from fwdlib.tangents import Params


def forward_step_(
    model: nn.Module,
    closure: Callable[[], Tensor],
    optimizer: Optimizer,
    *,
    num_examples: int | None = None,
    **options: Any,
) -> Tensor:
    """Take a step with a forward gradient, in place of ``zero_grad()``, ``loss.backward()`` and ``optimizer.step()``.

    It does what ``optimizer.zero_grad()``, :func:`fwdlib.forward_grad_` and ``optimizer.step()`` do, and is faster
    where the gradient is kept as factors, as rank-one tangents give it: plain SGD adds these to the parameters and no
    gradient is written out; for any other optimizer the gradient is written over the last one, without new memory. A
    tensor in ``.grad`` that you want to keep must therefore be copied, and after a step of plain SGD ``.grad`` is None.
    So is that of the optimizer's other parameters, which stand still.

    Args:
        model: as for :func:`fwdlib.forward_grad_`.
        closure: takes nothing, calls the model and returns the loss, a scalar.
        optimizer: any of ``torch.optim`` whose ``step()`` needs no closure. It may have only some of the parameters.
        num_examples: B, for ``"per-example"`` and ``"activity"`` tangents.
        options: of :func:`fwdlib.forward_gradient`, for example ``num_tangents=4`` or ``generator=...``.

    Returns:
        The loss before the step, a scalar without a graph.

    Raises:
        ValueError: if the step of the optimizer needs a closure, or as :func:`fwdlib.forward_gradient`.
        TypeError: if the optimizer is none, or as :func:`fwdlib.forward_gradient`.
        NotImplementedError: inside ``torch.inference_mode()``, or as :func:`fwdlib.forward_gradient`.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        >>> inputs, targets = torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
        >>> loss = forward_step_(model, lambda: nn.functional.cross_entropy(model(inputs), targets), optimizer)
        >>> loss.shape
        torch.Size([])
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be one of torch.optim, got {type(optimizer).__name__}")
    if _needs_closure(type(optimizer)):
        raise ValueError(
            f"{type(optimizer).__name__} evaluates the loss several times a step, and a random gradient does not suit "
            f"that: take another optimizer, such as torch.optim.Adam"
        )
    if torch.is_inference_mode_enabled():
        raise NotImplementedError(
            "forward_step_ was called inside torch.inference_mode(), which leaves tensors in the optimizer that no "
            "later step can change: call it outside, or inside torch.no_grad()"
        )
    objective, named = ClosureLoss(model, closure, num_examples), dict(model.named_parameters())
    params = {name: p for name, p in named.items() if p.requires_grad}
    estimate = forward_gradient(objective, {name: p.detach() for name, p in params.items()}, **options)
    trained = {*map(id, params.values())}
    for p in itertools.chain(named.values(), *[group["params"] for group in optimizer.param_groups]):
        if id(p) not in trained:
            p.grad = None  # as by zero_grad(): or a layer that was frozen since the last step would move on
    if any(p._post_accumulate_grad_hooks for p in params.values()):
        assign_gradients(model, estimate.grads)
        optimizer.step()
    else:
        take_step(optimizer, params, estimate.grads)
    return estimate.loss


def take_step(optimizer: Optimizer, params: Params, grads: Params) -> None:
    """Update ``params`` by the optimizer, as ``optimizer.step()`` does after ``.grad`` was set.

    Where gradients offer ``add_to_``, as those of the stacked engine do, plain SGD updates the parameters from their
    factors. For other optimizers these gradients are written over the tensors that ``.grad`` has from the last step.

    Args:
        optimizer: has at least some of the parameters.
        params: parameter by name.
        grads: a gradient for each name.
    """
    add_to_ = getattr(grads, "add_to_", None)  # gradients that are kept as factors offer it
    with torch.no_grad():
        if add_to_ and (learning_rate := _plain_sgd(optimizer, params)) is not None:
            add_to_(params, -learning_rate)
            for p in params.values():
                p.grad = None
            if "step" not in vars(optimizer):  # a scheduler puts its own there, to count the steps
                return
        elif add_to_ and all(map(_can_be_written_over, params.values())):
            grads.write_to_({name: p.grad for name, p in params.items()})
        else:
            for name, p in params.items():
                p.grad = grads[name]
    optimizer.step()


@functools.cache
def _needs_closure(kind: type[Optimizer]) -> bool:
    closure = inspect.signature(kind.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def has_hooks(optimizer: Optimizer) -> bool:
    """Return whether functions are called before or after each step of an optimizer."""
    own = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    return bool(own or _global_optimizer_pre_hooks or _global_optimizer_post_hooks)


def _plain_sgd(optimizer: Optimizer, params: Params) -> float | None:
    # The learning rate, if a step is p -= learning_rate * grad for these parameters and nothing else.
    group, *others = optimizer.param_groups
    if type(optimizer) is not torch.optim.SGD or others or group["momentum"] or group["weight_decay"]:
        return None
    if has_hooks(optimizer):
        return None
    if group["maximize"] or {id(p) for p in params.values()} != {id(p) for p in group["params"]}:
        return None
    return group["lr"]


def _can_be_written_over(p: Tensor) -> bool:
    # In lower precision the factors are summed up in float32 first.
    if p.grad is None or p.dtype not in (torch.float32, torch.float64):
        return False
    return p.grad.layout == torch.strided and not p.grad.requires_grad
