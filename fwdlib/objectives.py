"""Objectives: callables from params to a scalar loss.

Any such callable can be differentiated by the estimators. :class:`BatchLoss` is the one for training: the loss of a
model on a batch, as a function of the model's parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fwdlib.tangents import Params

Objective = Callable[[Params], Tensor]


def params_of(model: nn.Module) -> Params:
    """Return the trainable parameters of ``model`` by name, detached: a shared one once, a frozen one not at all.

    The tensors share their storage with the model's, so an in-place update of one is an update of the other.
    """
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def assign_gradients(model: nn.Module, grads: Params) -> None:
    """Set ``.grad`` of the model's parameters, in place of ``loss.backward()``.

    What was there is replaced, so ``zero_grad()`` is not needed, and to accumulate over batches you sum the estimates
    yourself. The tensors are not copied: clipping ``.grad`` in place clips ``grads`` as well.

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


class BatchLoss:
    """The loss of ``model`` on one batch as a function of its parameters.

    Calling it leaves the model as it is: BatchNorm's running statistics are read and changed in a copy. The estimators
    write that copy back once per estimate (:meth:`with_buffers`, :meth:`set_buffers`), as one forward pass of ordinary
    training would, however many tangents they use. Dropout draws one mask per estimate, shared by all its tangents, so
    that all are derivatives of the same function. Both follow ``model.train()`` and ``model.eval()``.

    Args:
        model: any module that maps ``inputs`` to logits.
        inputs: a batch, shape (B, ...).
        targets: what ``loss`` takes, for the default shape (B,) of class indices.
        loss: ``(logits, targets) -> scalar``; the mean cross entropy by default.

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
        self.model = model
        self.inputs = inputs
        self.targets = targets
        self.loss = loss

    def __call__(self, params: Params) -> Tensor:
        """Return the scalar loss at ``params``; parameters of the model that are not in it keep their values."""
        return self.with_buffers(params)[0]

    def with_buffers(self, params: Params) -> tuple[Tensor, Params]:
        """Return the loss at ``params`` and the model's buffers as this forward pass leaves them.

        Raises:
            ValueError: if a name in ``params`` is no parameter of the model.
        """
        self.check_names(params)
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        logits = functional_call(self.model, (params, buffers), (self.inputs,))
        return self.loss(logits, self.targets), buffers

    @functools.cached_property
    def _names(self) -> Iterable[str]:
        return dict(self.model.named_parameters(remove_duplicate=False)).keys()

    def check_names(self, params: Params) -> None:
        """Refuse parameters that the model has not.

        Raises:
            ValueError: if a name in ``params`` is no parameter of the model.
        """
        if unknown := params.keys() - self._names:
            raise ValueError(f"params has {min(unknown)!r}, which the model has not; it has {', '.join(self._names)}")

    def set_buffers(self, buffers: Params) -> None:
        """Write ``buffers`` into the model."""
        for name, buffer in self.model.named_buffers():
            buffer.copy_(buffers[name])
