"""The stacked pass: forward gradients at the price of two forward passes, or less.

The primal and its tangents go through the model as one batch, so each linear layer is one matrix product. Structured
tangents (:mod:`fwdlib.stacked.perturbations`) make the term from a weight's own tangent almost free. It works for any
model: a call without a rule goes through :func:`torch.func.jvp`, and :func:`fwdlib.stacked.explain.explain` lists those
calls.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import is_dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fwdlib.checks import check_choice
from fwdlib.estimators import GradientEstimate
from fwdlib.forward.derivatives import Derivatives, check_followable
from fwdlib.forward.passes import Refusal
from fwdlib.objectives import (
    ModelLoss,
    Objective,
    check_depends,
    check_objective,
    check_scalar,
    holds_more,
    modules_of,
    requiring_grad,
    swapped,
)
from fwdlib.stacked.dual import OTHER_ENGINE, Dual, pad_rows
from fwdlib.stacked.forward_pass import Call, Pass
from fwdlib.stacked.perturbations import PERTURBATIONS, DensePerturbation, Perturbation
from fwdlib.tangents import (
    NAMED,
    AnyGenerator,
    Params,
    Sampler,
    count_tangents,
    divisor_of,
    is_traced,
    is_transformed,
    random_signs,
    sample_tangents,
)


@torch.no_grad()
def stacked_gradient(
    objective: Objective,
    params: Params,
    num_tangents: int = 1,
    tangents: str | Sampler = "rank-one",
    generator: AnyGenerator = None,
) -> GradientEstimate:
    r"""Estimate the gradient as :func:`~fwdlib.estimators.forward_gradient` does, in one stacked pass.

    The tangents are structured, so neither they nor the gradients are computed in full before they are read:

    - ``"rank-one"``: a tangent a b^T for each weight, with signs over its outputs and inputs. They have the least
      second moment of all tangents of unit variance, and take two thirds of the products of backprop.
    - ``"per-example"``: the same, drawn for each example: up to B times less variance, for one more product.
    - ``"activity"``: signs for each unit and example, on the outputs of the layers (Ren et al. 2022, *Scaling Forward
      Gradient With Local Losses*): the variance shrinks by the number of the layer's inputs, for one more product and
      the memory of the activations.
    - any sampler of :mod:`fwdlib.tangents`, for example ``"normal"``: computed in full.

    Bias: none. Second moments: see the table and the classes in :mod:`fwdlib.stacked.perturbations`.

    Cost: one pass with (1 + K) B rows. It builds no graph, and except with activity tangents no activation outlives the
    next layer, so the memory does not grow with depth.

    Where BatchNorm in training mode, or a function without a rule, mixes the examples of a batch, the perturbations of
    examples in the layers before it are weighted with the derivative of the whole loss: more variance, no bias. If the
    loss is neither a mean nor a sum over examples, this applies to all layers.

    Args:
        objective: the loss of a model on a batch, or any function of the parameters.
        params: the point, by the model's names. With the model's own tensors, as :func:`params_of` returns them, the
            model runs as it is; with others it runs with these in their place.
        num_tangents: K.
        tangents: one of the above.
        generator: the source of the tangents; None for torch's global generator. Dropout always draws from the latter.

    Returns:
        The estimate. Its ``grads`` is a mapping that computes a gradient when it is read;
        ``grads.add_to_(params, -learning_rate)`` takes a step of SGD without computing one in full.

    Raises:
        TypeError: if a parameter is not a real floating tensor.
        ValueError: if the batch is empty, ``num_tangents`` is below 1, ``tangents`` is unknown or needs a number of
            examples that the objective does not give, there are no parameters, or the loss is not a scalar.
        NotImplementedError: if a function of the model has neither a rule nor a forward derivative in torch.

    Example:
        >>> from fwdlib.objectives import check_scalar, BatchLoss, params_of
        >>> model = torch.nn.Linear(3, 2)
        >>> objective = BatchLoss(model, torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1]))
        >>> estimate = stacked_gradient(objective, params_of(model), num_tangents=4)
        >>> estimate.jvps.shape, estimate.grads["weight"].shape
        (torch.Size([4]), torch.Size([2, 3]))
    """
    check_objective(objective, params)
    num_tangents = count_tangents(params, num_tangents, tangents)
    num_examples = _num_examples(objective)
    if isinstance(tangents, str):
        check_choice("tangents", tangents, dict.fromkeys([*PERTURBATIONS, *NAMED]))
    if tangents in PERTURBATIONS:
        if num_examples is None and PERTURBATIONS[tangents].per_example:
            raise ValueError(
                f"{tangents!r} tangents need the layers of a model and the number of its examples: "
                f"BatchLoss(model, inputs, targets), or ClosureLoss(model, closure, num_examples=B)"
            )
        draw_signs = partial(random_signs, generator=generator)
        perturbation = PERTURBATIONS[tangents](params, num_tangents, num_examples, draw_signs)
    else:
        sampled = sample_tangents(params, num_tangents, tangents, generator)
        perturbation = DensePerturbation(params, num_examples, sampled)
    loss, jvps, of_examples = evaluate(objective, params, perturbation)
    divisor = divisor_of(num_tangents, tangents)  # a perturbation divides by K
    grads = perturbation.gradients(jvps if divisor == num_tangents else jvps * (num_tangents / divisor), of_examples)
    return GradientEstimate(loss, dict(grads) if is_transformed() else grads, jvps)


def stacked_jvp(objective: Objective, params: Params, tangents: Params) -> tuple[Tensor, Tensor]:
    """Differentiate along given tangents, as :func:`torch.func.jvp` does, but along all of them in one stacked pass.

    Args:
        objective: the loss of a model on a batch, or any function of the parameters.
        params: the point.
        tangents: for each parameter of shape (...) a tensor of shape (K, ...).

    Returns:
        The loss, and the K directional derivatives.

    Raises:
        TypeError: as :func:`stacked_gradient`.
        ValueError: as :func:`stacked_gradient`, or if a tangent is missing or has the wrong shape.
    """
    return stacked_derivatives(objective, params, tangents)[:2]


@torch.no_grad()
def stacked_derivatives(objective: Objective, params: Params, tangents: Params) -> Derivatives:
    """Differentiate as :func:`stacked_jvp` does, and tell which rows of embedding tables have no gradient.

    Raises:
        ValueError: as :func:`stacked_jvp`.
    """
    check_objective(objective, params)
    tangents = {name: tangents.get(name) for name in params}
    num_tangents = next((len(v) for v in tangents.values() if v is not None and v.dim()), 1)
    for name, p in params.items():
        expected, given = (num_tangents, *p.shape), None if tangents[name] is None else tuple(tangents[name].shape)
        if given != expected:
            raise ValueError(f"tangents[{name!r}] must have shape {expected}, got {given}")
    perturbation = DensePerturbation(params, _num_examples(objective), tangents)
    loss, jvps, _ = evaluate(objective, params, perturbation)
    return Derivatives(loss, jvps, perturbation.padding)


def evaluate(
    objective: Objective, params: Params, perturbation: Perturbation, own: Params | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run the pass.

    Args:
        objective: the loss of a model on a batch, or any function of the parameters.
        params: the point.
        perturbation: the tangents of the parameters.
        own: the model's own tensors, which require a gradient, if ``params`` are known to be the same memory; None to
            find that out.

    Returns:
        The loss, its derivatives (K,), and each example's contribution to them (K, B), None if it is not known.
    """
    if not isinstance(objective, ModelLoss):
        leaves = _leaves(params)
        loss = run(nn.Module(), partial(objective, leaves), perturbation, leaves)
    elif own is not None:
        loss = run(objective.model, objective.run, perturbation, own)
    elif not is_transformed() and (own := objective.own(params)) is not None:
        with requiring_grad(own.values()):
            loss = run(objective.model, objective.run, perturbation, own)
    else:
        objective.check_names(params)
        leaves = _leaves(params)
        with swapped(objective.model, leaves, {}):
            loss = run(objective.model, objective.run, perturbation, leaves)
    if isinstance(loss, Dual):
        found = split(loss, perturbation)
        check_scalar(found[0])
        return found
    check_scalar(loss)
    check_depends(not is_transformed(), objective, params)
    return loss.detach(), loss.new_zeros(perturbation.num_tangents), None


def split(loss: Dual, perturbation: Perturbation) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the loss, its derivatives (K,), and each example's contribution to them (K, B), None if not known."""
    k = perturbation.num_tangents
    stack = loss.stack
    return stack[0], stack[1 : 1 + k], stack[1 + k :].reshape(k, -1) if stack.shape[0] > 1 + k else None


def _leaves(params: Params) -> Params:
    # Copies that require a gradient of their own, see Pass; torch.func.vmap allows none.
    return params if is_transformed() else {name: p.detach().requires_grad_() for name, p in params.items()}


@torch.no_grad()
def stacked_pushforward(
    function: Callable[[Params], tuple[list[Tensor], list[Tensor]]], point: Params, tangents: Params
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Differentiate a function with any number of results, as :func:`fwdlib.forward.derivatives.pushforward` does."""
    perturbation, leaves = DensePerturbation(point, None, tangents), _leaves(point)
    found, others = run(nn.Module(), partial(function, leaves), perturbation, leaves)
    k = perturbation.num_tangents
    stacks = [y.stack if isinstance(y, Dual) else y.detach().unsqueeze(0) for y in found]
    return [y[0] for y in stacks], [pad_rows(y, 1 + k)[1:] for y in stacks], others


def run(
    model: nn.Module,
    call: Callable[[], Any],
    perturbation: Perturbation,
    params: Params,
    calls: list[Call] | None = None,
) -> Any:
    """Call a function in a pass, and leave no dual behind in the model: what it has kept becomes a plain tensor.

    Args:
        model: the module that ``call`` runs.
        call: takes nothing.
        perturbation: the tangents of the parameters.
        params: parameter by name; the tensors themselves, as the model uses them.
        calls: a list to record the calls in.

    Returns:
        What the function returns, with duals in place of the tensors that have tangents.

    Raises:
        Refusal: if the pass cannot follow what the model does.
        Exception: if the model itself raises it.
    """
    modules = modules_of(model)
    check_followable(modules)
    if any(map(_is_script, map(type, modules))):
        _refuse_script(modules, params)
    try:
        with _eager(), Pass(perturbation, params, calls) as stacked_pass:
            found = call()
            return stacked_pass.result(found) if isinstance(found, Tensor) else tree_map(stacked_pass.result, found)
    except Exception as error:
        if isinstance(error, NotImplementedError) or not any(words in str(error) for words in BELOW):
            raise
        raise Refusal(f"a tensor with tangents reached TorchScript or C++ code. {OTHER_ENGINE}") from error
    finally:
        for module in modules:
            if module._buffers or holds_more(module):
                _keep_primals(module.__dict__)


BELOW = (
    *("reached a tensor with tangents", "TorchScript interpreter", "Tensor that doesn't have storage"),
    *("instance of type Dual", "Got Dual", "to FakeTensors first"),
)
"""Words in the errors of code below torch's function overrides that meets a dual."""


PLAIN = {type(None), bool, int, float, str}
"""Kinds of attributes that hold nothing."""


def _eager() -> AbstractContextManager:
    # Modules that torch.compile has compiled run as they were written.
    return _ForcedEager() if "torch._dynamo" in sys.modules and not is_traced() else nullcontext()


class _ForcedEager:
    # Torch has one stance for all threads: the first pass sets it, the last one that is left puts it back.
    _lock, _running, _stance = threading.Lock(), 0, None

    def __enter__(self) -> None:
        kind = type(self)
        with self._lock:
            if kind._running == 0:
                kind._stance = torch.compiler.set_stance("force_eager")
                kind._stance.__enter__()
            kind._running += 1

    def __exit__(self, *error: object) -> None:
        kind = type(self)
        with self._lock:
            kind._running -= 1
            if kind._running == 0:
                kind._stance.__exit__(*error)


@functools.cache
def _is_script(kind: type[nn.Module]) -> bool:
    return issubclass(kind, torch.jit.ScriptModule)


def _refuse_script(modules: Sequence[nn.Module], params: Params) -> None:
    ids = {id(p) for p in params.values()}
    for module in modules:
        if isinstance(module, torch.jit.ScriptModule) and any(id(p) in ids for p in module.parameters()):
            raise Refusal(
                f"the model has a part in TorchScript with parameters of its own, {type(module).__name__}, into which "
                f"the stacked engine cannot see. Use the module that was scripted or traced. {OTHER_ENGINE}"
            )


def _keep_primals(kept: dict | list | deque, depth: int = 5) -> None:
    for key, value in [*kept.items()] if isinstance(kept, dict) else enumerate(kept):
        kind = type(value)
        if kind is Dual:
            kept[key] = value.primal.detach()
        elif kind not in PLAIN and depth and key != "_parameters" and key != "_modules":
            if isinstance(value, tuple):
                held = [*value]
                _keep_primals(held, depth - 1)
                if [*map(id, held)] != [*map(id, value)]:
                    kept[key] = kind._make(held) if hasattr(kind, "_make") else kind(held)
            elif isinstance(value, (dict, list, deque)):
                _keep_primals(value, depth - 1)
            elif is_dataclass(value) or isinstance(value, SimpleNamespace):
                _keep_primals(getattr(value, "__dict__", {}), depth - 1)


def _num_examples(objective: Objective) -> int | None:
    return objective.num_examples if isinstance(objective, ModelLoss) else None
