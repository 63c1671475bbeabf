r"""Backprop from scratch, in one file: layers, losses and SGD on torch tensors, without autograd.

Read it from top to bottom. A network is a chain of functions, :math:`a_l = f_l(a_{l-1};\, \theta_l)`, with a loss L at
the end. Each function is a :class:`Module` with two passes:

=================== ======================= ===========================================================================
pass                takes                   returns
=================== ======================= ===========================================================================
``forward``         :math:`a_{l-1}`         :math:`a_l`, and keeps what the backward pass needs
``backward``        :math:`\partial L /     :math:`\partial L / \partial a_{l-1}`, and adds :math:`\partial L /
                    \partial a_l`           \partial \theta_l` to its ``grads``
=================== ======================= ===========================================================================

No module needs to know the others, and the chain rule is one loop, :meth:`Sequential.backward`. Three rules make the
results agree with PyTorch's to the last digits:

- **Gradients add up** until ``zero_grad``, as in PyTorch: two backward passes give the gradient of the sum.
- **Only the loss reduces.** A layer sums over the batch in any case; only the loss knows whether it is a mean.
- **Parameters change in place**, so a :class:`Sequential` and an :class:`SGD` that hold them see the same tensors.

The names are PyTorch's, so the same lines run with both:

>>> draw = torch.Generator().manual_seed(0)
>>> model = Sequential(Linear(2, 25, generator=draw), ReLU(), Linear(25, 2, generator=draw))
>>> criterion, optimizer = MSELoss(), SGD(model, lr=0.1)
>>> inputs, targets = torch.ones(4, 2), torch.zeros(4, 2)
>>> losses = []
>>> for _ in range(20):
...     losses.append(criterion(model(inputs), targets).item())
...     model.zero_grad()
...     _ = model.backward(criterion.backward())  # PyTorch: loss.backward()
...     optimizer.step()
>>> losses[-1] < losses[0] / 10
True
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fwdlib.checks import check_choice, check_count, check_fraction, check_positive

REDUCTIONS = ("mean", "sum")


class Module:
    """A function with two passes, and with parameters if it has any: layers, activations, losses.

    ``params`` has its parameters by name, ``grads`` under the same names the sums that ``backward`` has made, and
    ``kept`` what the last forward pass kept for the backward pass.
    """

    def __init__(self) -> None:
        self.params: dict[str, Tensor] = {}
        self.grads: dict[str, Tensor] = {}
        self.kept: Any = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Return ``forward(*inputs)``."""
        return self.forward(*inputs)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the output, and keep what ``backward`` needs."""
        raise NotImplementedError

    def backward(self, grad: Tensor) -> Tensor:
        """Turn ``grad``, the gradient at the outputs, into that at the inputs; add that of the parameters."""
        raise NotImplementedError

    def zero_grad(self) -> None:
        """Set all gradients to zero."""
        for grad in self.grads.values():
            grad.zero_()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy values into the parameters, for example ``torch_model.state_dict()``: the names are the same.

        Raises:
            ValueError: if the names or shapes differ.
        """
        given, own = ({name: tuple(p.shape) for name, p in found.items()} for found in (state, self.params))
        if given != own:
            raise ValueError(f"the state must have the names and shapes {own}, got {given}")
        for name, p in self.params.items():
            p.copy_(state[name].detach())

    def _recall(self) -> Any:
        if self.kept is None:
            raise RuntimeError(f"{type(self).__name__}.backward() needs a forward pass before it")
        return self.kept


class Linear(Module):
    r"""The layer :math:`z = x W^T + b`, for a batch x of shape (B, ``in_features``).

    .. math::
        \frac{\partial L}{\partial W} = \Bigl(\frac{\partial L}{\partial z}\Bigr)^T x, \qquad
        \frac{\partial L}{\partial b} = \sum_n \frac{\partial L}{\partial z_n}, \qquad
        \frac{\partial L}{\partial x} = \frac{\partial L}{\partial z}\, W

    ``params`` and ``grads`` have ``weight``, shape (``out_features``, ``in_features``), and ``bias``. Both start
    uniform in :math:`\pm 1/\sqrt{\texttt{in\_features}}`, PyTorch's default; a generator with the same seed gives
    PyTorch's numbers.

    Args:
        in_features: the features of an example.
        out_features: the features of its output.
        generator: of the initial parameters; None for torch's global generator.
        dtype: of the parameters.
        device: of the parameters, and of the generator.

    Raises:
        ValueError: if a number of features is below 1.

    Example:
        >>> layer = Linear(2, 1)
        >>> layer.load_state_dict({"weight": torch.tensor([[2.0, 3.0]]), "bias": torch.tensor([1.0])})
        >>> layer(torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
        tensor([[6.],
                [4.]])
        >>> layer.backward(torch.ones(2, 1))
        tensor([[2., 3.],
                [2., 3.]])
        >>> layer.grads
        {'weight': tensor([[1., 2.]]), 'bias': tensor([2.])}
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        check_count("in_features", in_features)
        check_count("out_features", out_features)
        bound = 1 / math.sqrt(in_features)
        for name, shape in (("weight", (out_features, in_features)), ("bias", (out_features,))):
            p = torch.empty(shape, dtype=dtype, device=device).uniform_(-bound, bound, generator=generator)
            self.params[name], self.grads[name] = p, torch.zeros_like(p)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return ``inputs`` times the weights plus the bias, shape (B, ``out_features``).

        Raises:
            ValueError: if the shape of the inputs is not (B, ``in_features``), or they require a gradient.
        """
        weight, bias = self.params["weight"], self.params["bias"]
        if inputs.dim() != 2 or inputs.shape[1] != weight.shape[1]:
            raise ValueError(f"inputs must have the shape (batch, {weight.shape[1]}), got {tuple(inputs.shape)}")
        if type(inputs) is Tensor and inputs.requires_grad:  # tensors with tangents, of another type, may pass
            raise ValueError("inputs require a gradient, but tinynet has no autograd: pass inputs.detach()")
        self.kept = inputs
        return torch.addmm(bias, inputs, weight.t())  # bias + inputs @ weight.t(), in one call

    def backward(self, grad: Tensor) -> Tensor:
        """Add the gradients of weight and bias, and return that of the inputs.

        Args:
            grad: of the outputs, shape (B, ``out_features``).

        Raises:
            RuntimeError: if there was no forward pass.
            ValueError: if ``grad`` does not have the shape of the outputs.
        """
        inputs, weight = self._recall(), self.params["weight"]
        check_shape("grad", grad, (len(inputs), len(weight)))
        self.grads["weight"].addmm_(grad.t(), inputs)  # += grad.t() @ inputs, which sums over the batch
        self.grads["bias"] += grad.sum(0)
        return grad @ weight


class _Activation(Module):
    # Elementwise. All three derivatives are functions of the outputs, so the outputs are kept.
    def _outputs(self, grad: Tensor) -> Tensor:
        outputs = self._recall()
        check_shape("grad", grad, outputs.shape)
        return outputs


class ReLU(_Activation):
    r"""The activation :math:`y = \max(x, 0)`, with :math:`y' = \operatorname{sign} y`: 1 where x is above 0, else 0.

    Example:
        >>> relu = ReLU()
        >>> relu(torch.tensor([-1.0, 0.0, 2.0])), relu.backward(torch.tensor([5.0, 5.0, 5.0]))
        (tensor([0., 0., 2.]), tensor([0., 0., 5.]))
    """

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the inputs where they are above 0, else 0."""
        self.kept = inputs.relu()
        return self.kept

    def backward(self, grad: Tensor) -> Tensor:
        """Return ``grad`` where the unit was active, else 0."""
        return grad * self._outputs(grad).sign()


class Tanh(_Activation):
    r"""The activation :math:`y = \tanh x`, with :math:`y' = 1 - y^2`."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the hyperbolic tangent of the inputs."""
        self.kept = inputs.tanh()
        return self.kept

    def backward(self, grad: Tensor) -> Tensor:
        """Return ``grad`` times the derivative."""
        outputs = self._outputs(grad)
        return grad * (1 - outputs * outputs)


class Sigmoid(_Activation):
    r"""The activation :math:`y = 1/(1 + e^{-x})`, with :math:`y' = y\,(1 - y)`."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logistic function of the inputs."""
        self.kept = inputs.sigmoid()
        return self.kept

    def backward(self, grad: Tensor) -> Tensor:
        """Return ``grad`` times the derivative."""
        outputs = self._outputs(grad)
        return grad * outputs * (1 - outputs)


class Sequential(Module):
    """A chain of modules. Its backward pass is backprop.

    ``params`` and ``grads`` have those of the layers, the same tensors, under PyTorch's names: ``"0.weight"``.

    Args:
        layers: in the order of the forward pass, each once. A layer, even an activation, remembers one pass only, so a
            second use would overwrite the first.

    Raises:
        ValueError: if a layer is used twice.

    Example:
        >>> list(Sequential(Linear(2, 3), Tanh(), Linear(3, 1)).params)
        ['0.weight', '0.bias', '2.weight', '2.bias']
    """

    def __init__(self, *layers: Module) -> None:
        super().__init__()
        self.layers = list(layers)
        leaves = list(_leaves(self))
        if len({id(leaf) for leaf in leaves}) < len(leaves):
            raise ValueError("a layer is used twice, but it remembers one pass only: make a second layer")
        for i, layer in enumerate(layers):
            self.params |= {f"{i}.{name}": p for name, p in layer.params.items()}
            self.grads |= {f"{i}.{name}": grad for name, grad in layer.grads.items()}

    def forward(self, inputs: Tensor) -> Tensor:
        """Pass the inputs through all layers and return the last output."""
        for layer in self.layers:
            inputs = layer.forward(inputs)
        return inputs

    def backward(self, grad: Tensor) -> Tensor:
        """Carry ``grad`` from the outputs back to the inputs; each layer adds to its own gradients."""
        for layer in reversed(self.layers):
            grad = layer.backward(grad)
        return grad


def _leaves(module: Module) -> Iterator[Module]:
    if not isinstance(module, Sequential):
        yield module
        return
    for layer in module.layers:
        yield from _leaves(layer)


class _Loss(Module):
    # A scalar function of outputs and targets. The backward pass starts here, so its backward takes no gradient.
    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = check_choice("reduction", reduction, REDUCTIONS)

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        raise NotImplementedError

    def backward(self) -> Tensor:
        raise NotImplementedError


class MSELoss(_Loss):
    r"""The squared error, :math:`\sum_{n,k} (y_{nk} - t_{nk})^2`, divided by the number of elements for the mean.

    Its gradient at the outputs is :math:`2\,(y - t)`, divided by the same number.

    Args:
        reduction: ``"mean"`` over all elements, not over the examples alone, as in PyTorch; or ``"sum"``.

    Raises:
        ValueError: if the reduction is neither.

    Example:
        >>> criterion = MSELoss("sum")
        >>> criterion(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])), criterion.backward()
        (tensor(5.), tensor([[ 2., -4.]]))
    """

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss, a scalar.

        Args:
            outputs: of the network, any shape.
            targets: the same shape.

        Raises:
            ValueError: if the shapes differ.
        """
        check_shape("targets", targets, outputs.shape)
        self.kept = outputs - targets
        total = self.kept.square().sum()
        return total if self.reduction == "sum" else total / outputs.numel()

    def backward(self) -> Tensor:
        """Return the gradient at the outputs, of their shape.

        Raises:
            RuntimeError: if there was no forward pass.
        """
        difference = self._recall()
        return difference * (2 if self.reduction == "sum" else 2 / difference.numel())


class CrossEntropyLoss(_Loss):
    r"""The negative log-likelihood of the right classes under a softmax, :math:`-\sum_n \log p_{n,t_n}`.

    Its gradient at the logits is the error of the softmax, :math:`p_{nk} - [k = t_n]`. For the mean, both are divided
    by the number of examples.

    Args:
        reduction: ``"mean"``, over the examples, or ``"sum"``.

    Raises:
        ValueError: if the reduction is neither.

    Example:
        >>> criterion = CrossEntropyLoss()
        >>> criterion(torch.zeros(1, 4), torch.tensor([2])), criterion.backward()
        (tensor(1.3863), tensor([[ 0.2500,  0.2500, -0.7500,  0.2500]]))
    """

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss, a scalar.

        Args:
            outputs: logits, shape (B, classes).
            targets: indices of the right classes, shape (B,).

        Raises:
            ValueError: if the shapes do not fit.
        """
        if outputs.dim() != 2:
            raise ValueError(f"outputs must have the shape (batch, classes), got {tuple(outputs.shape)}")
        check_shape("targets", targets, outputs.shape[:1])
        log_probabilities = outputs.log_softmax(1)
        self.kept = log_probabilities, targets
        total = -log_probabilities.gather(1, targets.unsqueeze(1)).sum()
        return total if self.reduction == "sum" else total / len(outputs)

    def backward(self) -> Tensor:
        """Return the gradient at the logits, shape (B, classes).

        Raises:
            RuntimeError: if there was no forward pass.
        """
        log_probabilities, targets = self._recall()
        grad = log_probabilities.exp() - F.one_hot(targets, log_probabilities.shape[1])
        return grad if self.reduction == "sum" else grad / len(targets)


class SGD:
    r"""Stochastic gradient descent, with or without momentum, as in ``torch.optim.SGD``.

    .. math:: v \gets \mu\, v + g, \qquad \theta \gets \theta - \eta\, v

    Args:
        model: its parameters are changed in place by their ``grads``.
        lr: the learning rate.
        momentum: the fraction of the velocity v that is kept in each step, between 0 and 1; 0 for plain descent.

    Raises:
        ValueError: if ``lr`` is not above 0 or ``momentum`` is not between 0 and 1.

    Example:
        >>> layer = Linear(1, 1)
        >>> layer.load_state_dict({"weight": torch.tensor([[1.0]]), "bias": torch.tensor([0.0])})
        >>> layer.grads["weight"].fill_(2.0)
        tensor([[2.]])
        >>> SGD(layer, lr=0.1).step()
        >>> layer.params["weight"]
        tensor([[0.8000]])
    """

    def __init__(self, model: Module, lr: float, momentum: float = 0.0) -> None:
        self.model = model
        self.lr, self.momentum = check_positive("lr", lr), check_fraction("momentum", momentum)
        self.velocities = {name: torch.zeros_like(p) for name, p in model.params.items()} if momentum else {}

    def step(self) -> None:
        """Change each parameter by one step."""
        for name, p in self.model.params.items():
            direction = self.model.grads[name]
            if self.momentum:
                direction = self.velocities[name].mul_(self.momentum).add_(direction)
            p.sub_(direction, alpha=self.lr)


def xavier_normal_(model: Module, gain: float = 1.0, generator: torch.Generator | None = None) -> None:
    r"""Draw new weights, normal and scaled by the layer's size, and set the biases to zero.

    The variance is :math:`2\, \text{gain}^2 / (\text{in\_features} + \text{out\_features})`.

    The variance is that of Glorot & Bengio 2010, *Understanding the difficulty of training deep feedforward neural
    networks*, equation 12. Their distribution is uniform, and their gain 1.

    Args:
        model: to change, in place.
        gain: 1; or the square root of 2 with ReLUs, which pass half of their inputs.
        generator: of the weights; None for torch's global generator.
    """
    for p in model.params.values():
        if p.dim() > 1:
            nn.init.xavier_normal_(p, gain, generator)
        else:
            p.zero_()


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    """Check the shape of a tensor.

    Raises:
        ValueError: if it is not the expected one.
    """
    if tensor.shape != expected:
        raise ValueError(f"{name} must have the shape {tuple(expected)}, got {tuple(tensor.shape)}")
