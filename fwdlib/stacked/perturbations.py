"""Perturbations: where randomness enters the stacked pass, and how a derivative becomes an estimate of the gradient.

A perturbation says what a linear or convolutional layer adds to the tangents of its output, and, once the derivative of
the loss is known, what the gradient of each parameter is estimated to be. All of them are unbiased. For P parameters, B
examples and one tangent (with K tangents, what exceeds the squared norm of the gradient is divided by K):

=========== =============================== ================================= ==========================================
name        tangent                         second moment E|g|^2              cost for (q, p), beside W x and W dx
=========== =============================== ================================= ==========================================
dense       any sampler's: normal, ...      normal: (P + 2) |grad f|^2        one product; P numbers to draw and to keep
rank-one    a b^T, signs                    P |grad f|^2                      one vector product; p + q signs
per-example a_n b_n^T, signs of example n   |grad f|^2 + (P - 1) S            one product; (p + q) B signs
activity    u_n, signs of unit and example  of order q instead of p q: below  one product; q B signs; keeps activations
=========== =============================== ================================= ==========================================

S is the sum of the squared norms of what each example adds to the gradient: |grad f|^2 / B where all examples agree,
and far more than |grad f|^2 where they cancel each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from fwdlib.tangents import Params, RankOne, is_transformed, rank_one_factors

DrawSigns = Callable[[Sequence[int], Tensor], Tensor]
"""From a shape and a tensor with the wanted dtype and device to independent signs."""


class Gradients(Mapping[str, Tensor]):
    """An estimate of the gradient, kept as the factors that it is a product of.

    It reads like a dict of tensors, each written out when it is asked for. :meth:`add_to_` needs none of them whole.
    """

    def __init__(self, params: Params, uses: list[Use], total: Tensor, of_examples: Tensor | None) -> None:
        self._params = params
        self._uses = uses
        self._total = total
        self._of_examples = of_examples

    def __getitem__(self, name: str) -> Tensor:
        """Return the gradient of one parameter as a new tensor of its shape."""
        p = self._params[name]
        gradient = self._total.new_zeros(p.shape, dtype=p.dtype)  # of the derivatives: inside vmap they have its axis
        for use in self._uses:
            if use.name == name:
                use.add_to(gradient, self._weights(use))
        return gradient

    def __iter__(self) -> Iterator[str]:
        return iter(self._params)

    def __len__(self) -> int:
        return len(self._params)

    def add_to_(self, params: Params, factor: float) -> None:
        """Add ``factor`` times the gradient to ``params``, in place; with minus the learning rate, a step of SGD.

        Cost: for rank-one tangents one pass over the parameters, and no memory.
        """
        for use in self._uses:
            use.add_to(params[use.name], self._weights(use) * factor)

    def _weights(self, use: Use) -> Tensor:
        return self._total if self._of_examples is None or not use.is_per_example else self._of_examples


class Use(NamedTuple):
    """A place where the pass perturbed something for the sake of a parameter."""

    name: str
    add_to: Callable[[Tensor, Tensor], None]
    """``add_to(target, weights)`` adds the weighted sum of the tangents to ``target``, of the parameter's shape;
    weights are those of the tangents, shape (K,), or of each example in each, (K, B)."""
    is_per_example: bool = False
    """Whether an example's loss depends on its own tangents alone, so that its own derivative is weight enough."""


class Convolution(NamedTuple):
    """What a convolutional layer does, apart from its parameters."""

    function: Callable[..., Tensor]
    """``F.conv1d``, ``F.conv2d`` or ``F.conv3d``."""
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def __call__(self, inputs: Tensor, weight: Tensor, bias: Tensor | None = None, groups: int | None = None) -> Tensor:
        """Convolve."""
        return self.function(
            inputs, weight, bias, self.stride, self.padding, self.dilation, self.groups if groups is None else groups
        )

    def weight_gradient(self, inputs: Tensor, shape: torch.Size, outputs: Tensor) -> Tensor:
        """Return the sum over all positions of ``outputs`` times the patch of ``inputs`` that each is made from."""
        of_weight = {3: conv1d_weight, 4: conv2d_weight, 5: conv3d_weight}[len(shape)]
        return of_weight(inputs, shape, outputs, self.stride, self.padding, self.dilation, self.groups)


class Perturbation:
    """Rank-one sign tangents, one for each parameter: the tangent of a weight (q, p...) is a b^T.

    Bias: none. E|g|^2 = |grad f|^2 + (P - 1)/K |grad f|^2, P being the number of elements of the parameters in use: the
    squared length of such a tangent is P, always.

    The other perturbations build on it: a parameter that they have no way of their own for is perturbed like this.

    Args:
        params: parameter by name.
        num_tangents: K.
        num_examples: B, the length of axis 0 of a batch.
        draw_signs: where the randomness comes from.
    """

    per_example = False
    """Whether it wants the derivatives of each example's loss."""

    def __init__(self, params: Params, num_tangents: int, num_examples: int, draw_signs: DrawSigns) -> None:
        self.params = params
        self.num_tangents = num_tangents
        self.num_examples = num_examples
        self.draw_signs = draw_signs
        self.uses: list[Use] = []
        self._drawn: dict[str, RankOne] = {}
        self._dense: dict[str, Tensor] = {}
        self._used: set[str] = set()

    def factors(self, name: str) -> RankOne:
        """Return the tangents of a parameter by their factors: the same wherever it is used, drawn at the first use."""
        if name not in self._drawn:  # all together where all are needed: a draw takes as long as a small layer
            params = {name: self.params[name]} if self.per_example else self.params
            self._drawn |= rank_one_factors(params, self.num_tangents, self.draw_signs)
        left, right = self._drawn[name]
        if name not in self._used:
            self._used.add(name)
            self.uses.append(Use(name, lambda target, weights: _add_outer(target, left, right, weights)))
        return self._drawn[name]

    def dense(self, name: str) -> Tensor:
        """Return the tangents of a parameter written out, shape (K, ...)."""
        if name not in self._dense:
            self._dense[name] = self.factors(name).dense()
        return self._dense[name]

    def linear(self, weight: str | None, bias: str | None, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Return what a linear layer adds to the tangents of its outputs, beside W dx.

        Args:
            weight: the name of its weight (q, p); None if that has no tangent.
            bias: the name of its bias (q,), likewise.
            inputs: shape (..., p), primals.
            outputs: shape (..., q), primals.

        Returns:
            Broadcastable to (K, ..., q).
        """
        added = None
        if weight is not None:
            left, right = self.factors(weight)
            rows = inputs.reshape(-1, inputs.shape[-1])
            along = (rows @ right.t()).t()  # (K, examples)
            added = (along.unsqueeze(-1) * left.unsqueeze(1)).reshape(-1, *outputs.shape)
        return self._with_bias(added, bias, outputs, -1)

    def kernels(self, name: str, inputs: Tensor, layer: Convolution) -> Tensor | None:
        """Return what the layer is to convolve its inputs with beside its weight, shape (K, p, ...); None for nothing.

        Args:
            name: of its weight (q, p, ...).
            inputs: shape (B, channels, ...), primals.
            layer: the rest of it.
        """
        return self.factors(name).right if layer.groups == 1 else None

    def convolution(
        self,
        weight: str | None,
        bias: str | None,
        inputs: Tensor,
        outputs: Tensor,
        layer: Convolution,
        along: Tensor | None = None,
    ) -> Tensor:
        """Return what a convolutional layer adds to the tangents of its outputs, beside the convolution of dx.

        A rank-one tangent is one convolution with a single output channel, times the signs of the channels. Without
        :meth:`kernels` each tangent is convolved whole.

        Args:
            weight: the name of its kernel (q, p, ...); None if that has no tangent.
            bias: the name of its bias (q,), likewise.
            inputs: shape (B, channels, ...), primals.
            outputs: shape (B, q, ...), primals.
            layer: the rest of it.
            along: what it makes of the inputs with :meth:`kernels`, shape (B, K, ...).

        Returns:
            Broadcastable to (K, B, q, ...).
        """
        added, axis = None, 1 - outputs.dim()
        if weight is not None and along is None:
            added = torch.stack([layer(inputs, tangent) for tangent in self.dense(weight)])
        elif weight is not None:
            left = self.factors(weight).left
            along = along.transpose(0, 1)  # (K, B, ...)
            if outputs.dim() == 4 and outputs.stride(1) == 1:  # channels_last: the product in that order
                added = (along.unsqueeze(-1) * left.reshape(len(left), 1, 1, 1, -1)).movedim(-1, 2)
            else:
                added = along.unsqueeze(2) * _between(left, outputs.dim(), axis)
        return self._with_bias(added, bias, outputs, axis)

    def rows(self, name: str, indices: Tensor) -> Tensor:
        """Return the rows of a table's (q, p) tangents at ``indices`` (...): shape (K, ..., p)."""
        left, right = self.factors(name)
        return left[:, indices].unsqueeze(-1) * right.reshape(len(right), *[1] * indices.dim(), -1)

    def mix_examples(self) -> None:
        """Take the derivative of the whole loss as the weight of everything that was perturbed so far."""
        self.uses = [use._replace(is_per_example=False) for use in self.uses]

    def gradients(self, total: Tensor, of_examples: Tensor | None) -> Gradients:
        """Return the estimate.

        Args:
            total: the derivatives of the loss, shape (K,).
            of_examples: what each example adds to them, shape (K, B); None where that is not known.
        """
        mean = None if of_examples is None else of_examples / self.num_tangents
        return Gradients(self.params, self.uses, total / self.num_tangents, mean)

    def _is_batch(self, rows: Tensor) -> bool:
        return rows.dim() > 1 and len(rows) == self.num_examples

    def _with_bias(self, added: Tensor | None, bias: str | None, outputs: Tensor, axis: int) -> Tensor:
        if bias is None:
            return added
        tangent = _between(self.dense(bias), outputs.dim(), axis)
        return tangent if added is None else added.add_(tangent)


class DensePerturbation(Perturbation):
    """Tangents that are given, of any kind. With a normal sampler this is the forward gradient of the paper.

    Bias and second moment: those of the tangents; normal: none, and (P + K + 1)/K |grad f|^2.

    Args:
        params: parameter by name.
        num_examples: B.
        tangents: for each parameter of shape (...) a tensor of shape (K, ...).
    """

    def __init__(self, params: Params, num_examples: int, tangents: Params) -> None:
        num_tangents = len(next(iter(tangents.values())))
        super().__init__(params, num_tangents, num_examples, _no_signs)
        self._dense = dict(tangents)

    def dense(self, name: str) -> Tensor:
        """Return the tangents of a parameter, shape (K, ...)."""
        tangent = self._dense[name]
        if name not in self._used:
            self._used.add(name)
            self.uses.append(Use(name, lambda t, weights: t.add_(torch.tensordot(weights, tangent, dims=1))))
        return tangent

    def rows(self, name: str, indices: Tensor) -> Tensor:
        """Return the rows of a table's (q, p) tangents at ``indices`` (...): shape (K, ..., p)."""
        return self.dense(name)[:, indices]

    def kernels(self, name: str, inputs: Tensor, layer: Convolution) -> None:
        """Nothing: its tangents have as many output channels as the weight."""

    def linear(self, weight: str | None, bias: str | None, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Add the product with each tangent: the third product that makes the textbook's method slow."""
        added = None
        if weight is not None:
            rows = inputs.reshape(-1, inputs.shape[-1])
            added = torch.matmul(rows, self.dense(weight).transpose(1, 2)).reshape(-1, *outputs.shape)
        return self._with_bias(added, bias, outputs, -1)


class PerExamplePerturbation(Perturbation):
    """Rank-one sign tangents that each example has for itself: a_n b_n^T.

    Each is weighted with the derivative of its own example's loss, so the noise of different examples averages out.

    Bias: none. E|g|^2 = |grad f|^2 + (P - 1)/K S, where S = sum_n |g_n|^2 and g_n is what example n adds to the
    gradient, for models whose parameters all belong to linear and convolutional layers that are called once. In a
    convolution with groups, in a layer whose inputs have no axis of examples, and for any other parameter, the tangent
    is one for all examples.
    """

    per_example = True

    def kernels(self, name: str, inputs: Tensor, layer: Convolution) -> Tensor | None:
        """Nothing, where each example has its own."""
        return None if self._is_batch(inputs) else super().kernels(name, inputs, layer)

    def linear(self, weight: str | None, bias: str | None, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Add a_n (b_n . x_n), elementwise work, and keep both signs for the one product of the estimate."""
        if not self._is_batch(inputs):
            return super().linear(weight, bias, inputs, outputs)
        added = None
        if weight is not None:
            left, right = self._signs(weight, inputs)
            along = torch.linalg.vecdot(inputs, _spread(right, inputs.dim())).unsqueeze(-1)  # (K, B, ..., 1)
            added = along * _spread(left, outputs.dim())
        if bias is not None:
            tangent = _spread(self._signs(bias, inputs)[0], outputs.dim())
            added = tangent if added is None else added + tangent
        return added

    def convolution(
        self,
        weight: str | None,
        bias: str | None,
        inputs: Tensor,
        outputs: Tensor,
        layer: Convolution,
        along: Tensor | None = None,
    ) -> Tensor:
        """Add one convolution with a single output channel for each example, times its signs."""
        if not self._is_batch(inputs) or layer.groups > 1:
            return super().convolution(weight, bias, inputs, outputs, layer, along)
        added, ones = None, [1] * (outputs.dim() - 2)
        if weight is not None:
            left, right = self._signs(weight, inputs)
            kernels = right.transpose(0, 1).flatten(0, 1)  # B groups of K kernels
            along = layer(inputs.flatten(0, 1).unsqueeze(0), kernels, groups=len(inputs))
            along = along.reshape(len(inputs), -1, 1, *outputs.shape[2:]).transpose(0, 1)  # (K, B, 1, ...)
            added = along * left.reshape(*left.shape, *ones)
        if bias is not None:
            tangent = self._signs(bias, inputs)[0]
            tangent = tangent.reshape(*tangent.shape, *ones)
            added = tangent.expand(-1, *outputs.shape) if added is None else added + tangent
        return added

    def _signs(self, name: str, inputs: Tensor) -> RankOne:
        p = self.params[name]
        rows = (self.num_tangents, len(inputs))
        left = self.draw_signs((*rows, len(p)), p)
        right = self.draw_signs((*rows, *p.shape[1:]), p) if p.dim() > 1 else None

        def add_to(target: Tensor, weights: Tensor) -> None:
            weights = (weights if weights.dim() == 2 else weights.unsqueeze(1).expand(rows)).reshape(-1)
            _add_outer(target, left.flatten(0, 1), None if right is None else right.flatten(0, 1), weights)

        self.uses.append(Use(name, add_to, is_per_example=True))
        return RankOne(left, right)


class ActivityPerturbation(Perturbation):
    """Signs of each unit and example, added to the tangents of a layer's outputs (Ren et al. 2022, there normal).

    The gradient of a weight is estimated as d_n u_n x_n^T, summed over the examples, with d_n the derivative of the
    loss of example n. It needs the activations x_n kept, as backprop does, but no backward pass.

    Bias: none. For a linear layer (q, p) that is called once, E|g|^2 = |grad|^2 + sum_n (q |D_n|^2 - |D_ln|^2)/K
    |x_n|^2, where D_n are the derivatives of the loss by all perturbed units of example n, and D_ln by those of this
    layer: of order q, not p q. For a convolution x_n^T becomes the linear map M_n from the layer's outputs to its
    kernel, and the term of example n |M_n|_F^2 |D_n|^2 + |M_n D_ln|^2 - 2 sum_i |M_n e_i|^2 D_lni^2, over K; so it does
    for a linear layer at several positions of an example, and for biases. Parameters of other functions have rank-one
    tangents.
    """

    per_example = True

    def kernels(self, name: str, inputs: Tensor, layer: Convolution) -> None:
        """Nothing: it perturbs what comes out."""

    def linear(self, weight: str | None, bias: str | None, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Add signs: no product at all, before the estimate."""

        def outer(target: Tensor, rows: Tensor) -> None:
            _add_product(target, rows.reshape(-1, rows.shape[-1]).t(), inputs.reshape(-1, inputs.shape[-1]))

        return self._perturb(weight, bias, inputs, outputs, outer, -1)

    def convolution(
        self,
        weight: str | None,
        bias: str | None,
        inputs: Tensor,
        outputs: Tensor,
        layer: Convolution,
        along: Tensor | None = None,
    ) -> Tensor:
        """Add signs; the estimate is the weight gradient of a convolution."""

        def correlate(target: Tensor, rows: Tensor) -> None:
            target.add_(layer.weight_gradient(inputs, target.shape, rows))

        return self._perturb(weight, bias, inputs, outputs, correlate, 1)

    def _perturb(
        self,
        weight: str | None,
        bias: str | None,
        inputs: Tensor,
        outputs: Tensor,
        add_product: Callable[[Tensor, Tensor], None],
        axis: int,
    ) -> Tensor:
        signs = self.draw_signs((self.num_tangents, *outputs.shape), outputs)
        is_batch = self._is_batch(outputs)
        others = [i for i in range(outputs.dim()) if i != axis % outputs.dim()]

        def weigh(weights: Tensor) -> Tensor:
            # The sum over the tangents of weight times signs, of the shape of the outputs.
            return (weights.reshape(*weights.shape, *[1] * (signs.dim() - weights.dim())) * signs).sum(0)

        if weight is not None:
            self.uses.append(Use(weight, lambda target, weights: add_product(target, weigh(weights)), is_batch))
        if bias is not None:
            self.uses.append(Use(bias, lambda target, weights: target.add_(weigh(weights).sum(others)), is_batch))
        return signs


PERTURBATIONS: dict[str, type[Perturbation]] = {
    "rank-one": Perturbation,
    "per-example": PerExamplePerturbation,
    "activity": ActivityPerturbation,
}


def _add_outer(target: Tensor, left: Tensor, right: Tensor | None, weights: Tensor) -> None:
    # target (q, p...) += sum_r weights_r left_r right_r^T; without right, target (q,) += sum_r weights_r left_r
    if right is None:
        target.add_((weights.reshape(-1, *[1] * target.dim()) * left).sum(0))
    elif len(weights) == 1 and not is_transformed():  # without a temporary of the size of the target
        target.addcmul_((left[0] * weights).reshape(-1, *[1] * (target.dim() - 1)), right[0])
    elif target.dim() == 2:
        _add_product(target, (left * weights.unsqueeze(1)).t(), right)
    else:
        target.add_(((left * weights.unsqueeze(1)).t() @ right.flatten(1)).reshape(target.shape))


def _add_product(target: Tensor, left: Tensor, right: Tensor) -> None:
    if is_transformed():  # vmap goes through addmm_ seed by seed
        target.add_(left @ right)
    else:
        target.addmm_(left, right)


def _between(rows: Tensor, num_axes: int, axis: int) -> Tensor:
    # (K, q) -> (K, 1, ..., q, ..., 1), q at the negative `axis` of tensors with num_axes axes
    return rows.reshape(len(rows), *[1] * (num_axes + axis), -1, *[1] * (-axis - 1))


def _spread(rows: Tensor, num_axes: int) -> Tensor:
    # (K, B, q) -> (K, B, 1, ..., q) for tensors with num_axes axes
    return rows.reshape(*rows.shape[:2], *[1] * (num_axes - 2), -1)


def _no_signs(shape: Sequence[int], like: Tensor) -> Tensor:
    raise AssertionError("given tangents need no random numbers")
