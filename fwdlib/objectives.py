"""Objectives: callables from params to a scalar loss.

Any such callable can be differentiated by the estimators. :class:`BatchLoss` is the one for training: the loss of a
model on a batch, as a function of the model's parameters. The test functions of optimization, at the end, are functions
of a point and become objectives by :func:`as_objective`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
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


def as_objective(function: Callable[[Tensor], Tensor]) -> Objective:
    """Return a function of a point as an objective: ``params -> function(params["x"])``.

    Example:
        >>> as_objective(sphere)({"x": torch.tensor([1.0, 2.0])})
        tensor(5.)
    """
    return lambda params: function(params["x"])


def beale(point: Tensor) -> Tensor:
    r"""Evaluate the function of Beale (1958): a long flat valley that bends towards its minimum, between steep walls.

    .. math:: f(x, y) = (1.5 - x + xy)^2 + (2.25 - x + xy^2)^2 + (2.625 - x + xy^3)^2

    Minimum 0 at (3, 0.5); usual domain -4.5 to 4.5 in both. Source: E. M. L. Beale 1958, *On an iterative method for
    finding a local minimum of a function of more than one variable*.

    Args:
        point: shape (2,).

    Returns:
        A scalar.

    Raises:
        ValueError: if the point has another shape.

    Example:
        >>> beale(torch.tensor([3.0, 0.5])), beale(torch.tensor([0.0, 0.0]))
        (tensor(0.), tensor(14.2031))
    """
    _check_point("beale", point, exactly=2)
    x, y = point.unbind()
    return (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2


def rosenbrock(point: Tensor, a: float = 1.0, b: float = 100.0) -> Tensor:
    r"""Evaluate the function of Rosenbrock (1960): a curved valley, whose floor falls gently and whose walls are steep.

    .. math:: f(x) = \sum_{i=1}^{n-1} b\,(x_{i+1} - x_i^2)^2 + (a - x_i)^2

    Minimum 0 at (1, ..., 1) for a = 1, in two dimensions at (a, a^2); from n = 4 on there is a second, local one near
    (-1, 1, ..., 1). Usual domain -5 to 10 in each. Source: H. H. Rosenbrock 1960, *An automatic method for finding the
    greatest or least value of a function*, The Computer Journal 3, for n = 2; chained to more as is common.

    Args:
        point: shape (n,), n at least 2.
        a: where the minimum is.
        b: how steep the walls are.

    Returns:
        A scalar.

    Raises:
        ValueError: if the point has another shape.

    Example:
        >>> rosenbrock(torch.ones(5)), rosenbrock(torch.tensor([-1.0, 0.0]))
        (tensor(0.), tensor(104.))
    """
    _check_point("rosenbrock", point, at_least=2)
    x, following = point[:-1], point[1:]
    # By alpha: as a factor, b would be a tensor without a tangent, and that takes forward mode as long as all the rest.
    return torch.add((a - x) ** 2, (following - x**2) ** 2, alpha=b).sum()


def sphere(point: Tensor) -> Tensor:
    r"""Evaluate the sum of squares, the function of which all is known: its Hessian is 2 I everywhere.

    .. math:: f(x) = \sum_{i=1}^{n} x_i^2

    Minimum 0 at 0; usual domain -5.12 to 5.12 in each. Source: the first of the functions of K. A. De Jong 1975, *An
    analysis of the behavior of a class of genetic adaptive systems*.

    Args:
        point: shape (n,).

    Returns:
        A scalar.

    Raises:
        ValueError: if the point has another shape.

    Example:
        >>> sphere(torch.tensor([3.0, 4.0]))
        tensor(25.)
    """
    _check_point("sphere", point)
    return (point**2).sum()


def styblinski_tang(point: Tensor) -> Tensor:
    r"""Evaluate the function of Styblinski and Tang (1990): two valleys in each direction, one deeper than the other.

    .. math:: f(x) = \frac12 \sum_{i=1}^{n} x_i^4 - 16 x_i^2 + 5 x_i

    Minimum -39.16617 n at (-2.903534, ...); a component that went to the other side ends at 2.746803. Usual domain -5
    to 5 in each. Source: M. A. Styblinski & T.-S. Tang 1990, *Experiments in nonconvex optimization: stochastic
    approximation with function smoothing and simulated annealing*, Neural Networks 3.

    Args:
        point: shape (n,).

    Returns:
        A scalar.

    Raises:
        ValueError: if the point has another shape.

    Example:
        >>> styblinski_tang(torch.full((3,), -2.903534)) / 3
        tensor(-39.1662)
    """
    _check_point("styblinski_tang", point)
    quartic = torch.add(point**4, point**2, alpha=-16)  # alpha, as above
    return torch.add(quartic, point, alpha=5).sum() / 2


def _check_point(name: str, point: Tensor, at_least: int = 1, exactly: int | None = None) -> None:
    if point.dim() != 1 or point.shape[0] < at_least or point.shape[0] != (exactly or point.shape[0]):
        wanted = f"({exactly},)" if exactly else f"(n,) with n at least {at_least}"
        raise ValueError(f"{name} takes a point of shape {wanted}, got {tuple(point.shape)}")
