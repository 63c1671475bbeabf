"""Objectives: callables from params to a scalar loss.

The estimators differentiate any such callable. For training there are :class:`BatchLoss`, the loss of a model on a
batch, and :class:`ClosureLoss`, whatever a closure computes with a model.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fwdlib.checks import check_count
from fwdlib.tangents import Params, check_params

Objective = Callable[[Params], Tensor]


def params_of(model: nn.Module) -> Params:
    """Return the trainable parameters of ``model`` by name, detached: a shared one once, a frozen one not at all.

    The tensors share their storage with the model's, so an in-place update of one is an update of the other.
    """
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def modules_of(model: nn.Module) -> list[nn.Module]:
    """Return the model and all modules in it, each once, as ``model.modules()`` does, in less time."""
    found, seen = [model], {id(model)}
    for module in found:  # grows
        for child in module._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                found.append(child)
    return found


CONTAINERS = dict, OrderedDict, set
NUM_CONTAINERS = sum(type(value) in CONTAINERS for value in vars(nn.Module()).values())
OF_MODULES = {*map(type, vars(nn.Module()).values()), type(None), bool, int, float, str}


def holds_more(module: nn.Module) -> bool:
    """Return whether a module has attributes that can hold something, besides those that every module has."""
    kinds = [*map(type, module.__dict__.values())]
    return sum(map(kinds.count, CONTAINERS)) > NUM_CONTAINERS or not OF_MODULES.issuperset(kinds)


def assign_gradients(model: nn.Module, grads: Params) -> None:
    """Set ``.grad`` of the model's parameters, in place of ``loss.backward()``.

    What was there is replaced, and a parameter that ``grads`` does not name has no ``.grad`` afterwards. So
    ``zero_grad()`` is not needed, and to accumulate over batches you sum the estimates yourself. The tensors are not
    copied: clipping ``.grad`` in place clips ``grads`` as well, those of either engine. Functions that
    ``Tensor.register_post_accumulate_grad_hook`` has registered are called, as in a backward pass.

    Args:
        model: the model whose optimizer takes the next step.
        grads: a gradient for each name, each of its parameter's shape.

    Raises:
        KeyError: if a name is not a parameter of the model.
        ValueError: if a shape differs.
    """
    named = dict(model.named_parameters())
    for name, grad in grads.items():
        if name not in named:
            raise KeyError(f"grads has {name!r}, which is no parameter of the model; it has {', '.join(named)}")
        if grad.shape != named[name].shape:
            raise ValueError(f"grads[{name!r}] must have shape {tuple(named[name].shape)}, got {tuple(grad.shape)}")
        named[name].grad = grad
    for name in named.keys() - grads.keys():
        named[name].grad = None
    for name in grads:
        for hook in (named[name]._post_accumulate_grad_hooks or {}).values():
            hook(named[name])


class ModelLoss(ABC):
    """A loss that a model computes, as a function of the model's parameters.

    The estimators evaluate it in one of two ways. Where ``params`` are the model's own tensors, as :func:`params_of`
    returns them, the model runs as it is (:meth:`run`), so its buffers, hooks and counters change as in one forward
    pass of ordinary training. Elsewhere ``params`` and copies of the buffers take the places of the model's tensors
    for the duration of the call (:meth:`with_buffers`), and the estimator writes the buffers back once
    (:meth:`set_buffers`). Dropout draws one mask per estimate, shared by all tangents.

    Calling the objective returns the loss and leaves the model as it was.
    """

    model: nn.Module
    num_examples: int | None
    """B, the number of examples in the batch; None where it is not known."""

    @abstractmethod
    def run(self) -> Tensor:
        """Return the loss of the model as it is, a scalar."""

    def __call__(self, params: Params) -> Tensor:
        """Return the scalar loss at ``params``; parameters that are not in it keep their values."""
        return self.with_buffers(params)[0]

    def with_buffers(self, params: Params) -> tuple[Tensor, Params]:
        """Return the loss at ``params`` and the buffers as this forward pass leaves them.

        Raises:
            ValueError: if a name in ``params`` is not a parameter of the model.
        """
        self.check_names(params)
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        with swapped(self.model, params, buffers):
            loss = self.run()
        return loss, buffers

    def own(self, params: Params) -> Params | None:
        """Return the model's parameters of these names if ``params`` are the same memory, else None."""
        return own_params(dict(self.model.named_parameters()), params)

    @contextmanager
    def placed(self, params: Params) -> Iterator[Params]:
        """Let :meth:`run` use ``params``, and yield the tensors it uses: the model's own, or copies in their place.

        Raises:
            ValueError: if a name in ``params`` is not a parameter of the model.
        """
        own = self.own(params)
        if own is not None:
            yield own
            return
        self.check_names(params)
        copies = {name: p.detach().clone() for name, p in params.items()}
        with swapped(self.model, copies, {}):
            yield copies

    @functools.cached_property
    def _names(self) -> Iterable[str]:
        return dict(self.model.named_parameters(remove_duplicate=False)).keys()

    def check_names(self, params: Params) -> None:
        """Refuse names that the model does not have.

        Raises:
            ValueError: if a name in ``params`` is not a parameter of the model.
        """
        if not params.keys() <= self._names:
            del self._names  # the model may have a new layer
        if unknown := params.keys() - self._names:
            raise ValueError(
                f"params has {min(unknown)!r}, which is not a parameter of the model; it has {', '.join(self._names)}"
            )

    def set_buffers(self, buffers: Params) -> None:
        """Write ``buffers`` into the model, in place where the shape is the same."""
        for name, buffer in self.model.named_buffers():
            value = buffers[name].detach()
            if value.shape == buffer.shape and value.dtype == buffer.dtype:
                buffer.copy_(value)
            else:
                owner, _, leaf = name.rpartition(".")
                self.model.get_submodule(owner)._buffers[leaf] = value.clone()


class BatchLoss(ModelLoss):
    """The loss of ``model`` on one batch.

    Args:
        model: any module that maps ``inputs`` to logits.
        inputs: a batch, shape (B, ...).
        targets: the second argument of ``loss``; class indices of shape (B,) for the default.
        loss: ``(logits, targets) -> scalar``; the mean cross entropy by default.

    Raises:
        TypeError: if the model is no module, or the inputs are no tensor.

    Example:
        >>> import torch
        >>> model = nn.Linear(4, 3)
        >>> objective = BatchLoss(model, torch.zeros(5, 4), torch.zeros(5, dtype=torch.long))
        >>> objective({"weight": torch.zeros(3, 4), "bias": torch.zeros(3)})
        tensor(1.0986)
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Tensor,
        targets: Tensor,
        loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    ) -> None:
        self.model = _check_model(model)
        if not isinstance(inputs, Tensor):
            raise TypeError(
                f"inputs must be a tensor, got {type(inputs).__name__}; for a model that takes anything else use "
                f"ClosureLoss(model, lambda: loss(model(...), targets)), or step(batch) of an SGDStep"
            )
        self.inputs = inputs
        self.targets = targets
        self.loss = loss

    @property
    def num_examples(self) -> int | None:
        """B, the number of examples in the batch; None if the inputs have no axis of examples."""
        return self.inputs.shape[0] if self.inputs.dim() else None

    def run(self) -> Tensor:
        """Return the loss of the model as it is, a scalar."""
        return self.loss(self.model(self.inputs), self.targets)


class ClosureLoss(ModelLoss):
    """The loss that a closure computes with ``model``, whatever the model takes and returns.

    Args:
        model: the module whose parameters are trained.
        closure: takes nothing, calls the model and returns the loss, a scalar.
        num_examples: B. Only ``"per-example"`` and ``"activity"`` tangents need it.

    Raises:
        TypeError: if the model is no module, or the closure no function.
        ValueError: if ``num_examples`` is no whole number.

    Example:
        >>> import torch
        >>> model = nn.Bilinear(2, 2, 1)
        >>> one, two = torch.ones(5, 2), torch.ones(5, 2)
        >>> objective = ClosureLoss(model, lambda: model(one, two).square().mean())
        >>> objective({"weight": torch.ones(1, 2, 2), "bias": torch.zeros(1)})
        tensor(16.)
    """

    def __init__(self, model: nn.Module, closure: Callable[[], Tensor], num_examples: int | None = None) -> None:
        self.model = _check_model(model)
        if not callable(closure):
            kind = type(closure).__name__
            raise TypeError(f"closure must be a function that computes the loss, such as lambda: loss(...), got {kind}")
        self.closure = closure
        self.num_examples = num_examples if num_examples is None else check_count("num_examples", num_examples, 0)

    def run(self) -> Tensor:
        """Return the loss of the model as it is, a scalar."""
        return self.closure()


def _check_model(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be an nn.Module, got {type(model).__name__}; put several models into an nn.ModuleList"
        )
    return model


@contextmanager
def swapped(model: nn.Module, params: Params, buffers: Params) -> Iterator[None]:
    """Put tensors in the places of a model's parameters and buffers, and restore the model's own at the end.

    Each place is swapped once, also where a module or a tensor is shared, so the model holds the same objects after.

    Args:
        model: the module.
        params: parameter by name. A name stands for all places that share its tensor.
        buffers: buffer by name, likewise. At the end it holds what the forward pass has put there.
    """
    given = [(dict(model.named_parameters(remove_duplicate=False)), params)]
    given.append((dict(model.named_buffers(remove_duplicate=False)), buffers))
    replacements = {id(own[name]): tensor for own, tensors in given for name, tensor in tensors.items()}
    names = {id(given[1][0][name]): name for name in buffers}
    slots = [
        (tensors, leaf, own)
        for module in model.modules()
        for tensors in (module._parameters, module._buffers)
        for leaf, own in tensors.items()
        if id(own) in replacements
    ]
    try:
        for tensors, leaf, own in slots:
            tensors[leaf] = replacements[id(own)]
        yield
    finally:
        for tensors, leaf, own in slots:
            if id(own) in names:
                buffers[names[id(own)]] = tensors[leaf]
            tensors[leaf] = own


def loss_and_buffers(objective: Objective, params: Params) -> tuple[Tensor, Params]:
    """Return the loss, a scalar, and the buffers as the forward pass leaves them, if the objective has a model."""
    loss, buffers = objective.with_buffers(params) if isinstance(objective, ModelLoss) else (objective(params), {})
    return check_scalar(loss), buffers


def keep_buffers(objective: Objective, buffers: Params) -> None:
    """Write the buffers that a pass has left into the objective's model, if it has one."""
    if buffers and isinstance(objective, ModelLoss):
        objective.set_buffers(buffers)


def check_objective(objective: Objective, params: Params) -> None:
    """Refuse parameters that are none, and the loss of an empty batch.

    Raises:
        TypeError: if a parameter is not a real floating tensor.
        ValueError: if there are no parameters, or the batch is empty.
    """
    check_params(params)
    if isinstance(objective, ModelLoss) and objective.num_examples == 0:
        raise ValueError("inputs is an empty batch, whose mean loss is not a number: pass at least one example")


def check_scalar(loss: Any) -> Tensor:
    """Return what an objective returned, if it is a real scalar tensor.

    Raises:
        ValueError: if it is not.
    """
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"the objective must return the loss, a scalar tensor, got {type(loss).__name__}; of a model's output or "
            f"a tuple return the loss alone, such as output.loss"
        )
    if loss.dim() != 0:
        raise ValueError(
            f"the objective must return a scalar tensor, got {tuple(loss.shape)}; reduce it with .mean() or .sum()"
        )
    if loss.is_complex():
        raise ValueError(
            f"the objective must return a real number, got {loss.dtype}, which has no gradient; return its .real or "
            f".abs()"
        )
    return loss


def check_depends(is_constant: bool, objective: Objective, params: Params) -> None:
    """Refuse the loss of a model that is a constant, as ``loss.backward()`` does, if ``params`` are all it could train.

    Raises:
        ValueError: if it is.
    """
    if is_constant and isinstance(objective, ModelLoss) and params_of(objective.model).keys() <= params.keys():
        raise ValueError(
            "the loss does not depend on the model's trainable parameters: it was detached, computed under "
            "torch.no_grad() or torch.inference_mode(), by another model, or from integers such as argmax returns"
        )


def through_hooks(objective: Objective, params: Params, grads: Params) -> Params:
    """Return gradients as the hooks of the model's own parameters (``Tensor.register_hook``) leave them in backprop."""
    if not isinstance(objective, ModelLoss) or not _has_hooks(objective.model):
        return grads
    grads = dict(grads)
    for name, p in (objective.own(params) or {}).items():
        for hook in (p._backward_hooks or {}).values():
            changed = hook(grads[name])
            grads[name] = grads[name] if changed is None else changed
    return grads


def _has_hooks(model: nn.Module) -> bool:
    return any(p is not None and p._backward_hooks for m in modules_of(model) for p in m._parameters.values())


@contextmanager
def requiring_grad(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Let tensors require a gradient, for as long as the context lasts."""
    frozen = [p for p in tensors if not p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_()
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


def own_params(own: Params, params: Params) -> Params | None:
    """Return the ``own`` tensors of these names if ``params`` are the same memory with the same layout, else None."""
    if all(name in own and is_same(p, own[name]) for name, p in params.items()):
        return {name: own[name] for name in params}
    return None


def is_same(p: Tensor, own: Tensor) -> bool:
    """Return whether two tensors are the same memory with the same layout."""
    return p.data_ptr() == own.data_ptr() and p.shape == own.shape and p.stride() == own.stride()
