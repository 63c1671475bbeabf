"""Perturbations: where randomness enters the stacked pass, and how a derivative becomes an estimate of the gradient.

A perturbation computes what a linear or convolutional layer adds to the tangents of its output. Once the derivative of
the loss is known, it gives the estimate of each parameter's gradient. All perturbations are unbiased. The table is for
P parameters, B examples and one tangent; K tangents divide the excess over the squared norm of the gradient by K:

=========== =============================== ================================= ==========================================
name        tangent                         second moment E|g|^2              cost for (q, p), beside W x and W dx
=========== =============================== ================================= ==========================================
dense       any sampler: normal, ...        normal: (P + 2) |grad f|^2        one product; draws and keeps P numbers
rank-one    a b^T, signs                    P |grad f|^2                      one vector product; p + q signs
per-example a_n b_n^T, signs of example n   |grad f|^2 + (P - 1) S            one product; (p + q) B signs
activity    u_n, signs of unit and example  of order q instead of p q: below  one product; q B signs; keeps activations
=========== =============================== ================================= ==========================================

S is the sum over the examples of the squared norm of each one's contribution to the gradient: |grad f|^2 / B where all
examples agree, and far more than |grad f|^2 where they cancel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from fwdlib.forward.padding import Padding, without_rows
from fwdlib.stacked.gradients import Gradients, Use, add, add_outer, add_product
from fwdlib.tangents import Params, RankOne, is_traced, is_transformed, rank_one_factors, weighted_sum

DrawSigns = Callable[[Sequence[int], Tensor], Tensor]
"""Draws independent signs of a shape, with the dtype and device of a tensor."""


FEW_PLACES = 8
"""Of an image, for which one product of all images takes less time than a product for each."""


class Convolution(NamedTuple):
    """A convolutional layer without its parameters."""

    function: Callable[..., Tensor]
    """``F.conv1d``, ``F.conv2d`` or ``F.conv3d``."""
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def __call__(self, inputs: Tensor, weight: Tensor, bias: Tensor | None = None, groups: int | None = None) -> Tensor:
        """Convolve. With kernels of one place, that is a product of matrices, for which no entries are rearranged."""
        if groups is None and self._is_product(inputs, weight):
            matrix, rows = weight.flatten(1), inputs.flatten(2)
            if rows.shape[2] < FEW_PLACES:
                product = F.linear(rows.transpose(1, 2), matrix, bias).transpose(1, 2).contiguous()
            else:
                matrix = matrix.expand(len(inputs), -1, -1)
                product = matrix @ rows if bias is None else torch.baddbmm(bias.unsqueeze(1), matrix, rows)
            return product.reshape(len(inputs), -1, *inputs.shape[2:])
        return self.function(
            inputs, weight, bias, self.stride, self.padding, self.dilation, self.groups if groups is None else groups
        )

    def _is_product(self, inputs: Tensor, weight: Tensor) -> bool:
        if inputs.is_cuda or self.groups > 1 or is_transformed() or not inputs.is_contiguous():
            return False
        return set(weight.shape[2:]) == set(self.stride) == {1} and not any(self.padding) and inputs.numel() > 0

    def weight_gradient(self, inputs: Tensor, shape: torch.Size, outputs: Tensor) -> Tensor:
        """Return the sum over all positions of ``outputs`` times the patch of ``inputs`` that each position sees."""
        of_weight = {3: conv1d_weight, 4: conv2d_weight, 5: conv3d_weight}[len(shape)]
        return of_weight(inputs, shape, outputs, self.stride, self.padding, self.dilation, self.groups)


class Perturbation:
    """Rank-one sign tangents, one for each parameter: the tangent of a weight (q, p...) is a b^T.

    Bias: none. E|g|^2 = |grad f|^2 + (P - 1)/K |grad f|^2, with P the number of elements of the parameters in use,
    because the squared length of such a tangent is always P.

    The other perturbations build on this one and use its tangents for every parameter that they do not handle.

    Args:
        params: parameter by name.
        num_tangents: K.
        num_examples: B, the length of axis 0 of a batch; None if it is not known.
        draw_signs: the source of randomness.
    """

    per_example = False
    """Whether it needs the derivative of each example's loss."""
    has_factors = True
    """Whether the tangent of a weight is of rank one."""
    padding: Padding
    """What the pass shows of rows without a gradient: their tangents become zero when it has ended."""

    def __init__(self, params: Params, num_tangents: int, num_examples: int | None, draw_signs: DrawSigns) -> None:
        self.params = params
        self.num_tangents = num_tangents
        self.num_examples = num_examples
        self.draw_signs = draw_signs
        self.uses: list[Use] = []
        self.padding = Padding()
        self._drawn: dict[str, RankOne] = {}
        self._dense: dict[str, Tensor] = {}
        self._used: set[str] = set()

    def factors(self, name: str) -> RankOne:
        """Return the factors of a parameter's tangents. They are drawn at its first use and the same at every use."""
        self.padding.read(name)
        return self._factors(name)

    def dense(self, name: str) -> Tensor:
        """Return the tangents of a parameter in full, shape (K, ...)."""
        if name not in self._dense:
            self._dense[name] = self.factors(name).dense()
        return self._dense[name]

    def linear(
        self, weight: str | None, bias: str | None, inputs: Tensor, outputs: Tensor, tangents: Tensor | None = None
    ) -> Tensor:
        """Return the tangents of a linear layer's outputs: ``tangents`` and what its own parameters add.

        Args:
            weight: the name of its weight (q, p); None if the weight has no tangent.
            bias: the name of its bias (q,); None if there is none or it has no tangent.
            inputs: shape (..., p), primals.
            outputs: shape (..., q), primals.
            tangents: W dx, shape (K, ..., q), to be written over; None for zero.

        Returns:
            Broadcastable to (K, ..., q).
        """
        if weight is not None:
            left, right = self.factors(weight)
            rows = inputs.reshape(-1, inputs.shape[-1])
            along = (rows @ right.t()).t().unsqueeze(-1)  # (K, examples, 1)
            if tangents is None:
                tangents = (along * left.unsqueeze(1)).reshape(-1, *outputs.shape)
            else:
                _add_products_(tangents, along, left.unsqueeze(1))
        return self._with_bias(tangents, bias, outputs, -1)

    def convolution(
        self,
        weight: str | None,
        bias: str | None,
        inputs: Tensor,
        outputs: Tensor,
        layer: Convolution,
        tangents: Tensor | None = None,
    ) -> Tensor:
        """Return the tangents of a convolutional layer's outputs: ``tangents`` and what its own parameters add.

        A rank-one tangent costs one convolution with a single output channel, times the signs of the channels. With
        groups each tangent is convolved in full.

        Args:
            weight: the name of its weight (q, p, ...); None if the weight has no tangent.
            bias: the name of its bias (q,); None if there is none or it has no tangent.
            inputs: shape (B, channels, ...), primals.
            outputs: shape (B, q, ...), primals.
            layer: its other arguments.
            tangents: the convolution of dx, shape (K, B, q, ...), to be written over; None for zero.

        Returns:
            Broadcastable to (K, B, q, ...).
        """
        axis = 1 - outputs.dim()
        if weight is not None and (layer.groups > 1 or not self.has_factors):
            added = torch.stack([layer(inputs, tangent) for tangent in self.dense(weight)])
            tangents = add(tangents, added)
        elif weight is not None:
            left, right = self.factors(weight)
            along = layer(inputs, right).transpose(0, 1).unsqueeze(2)  # (K, B, 1, ...)
            left = _between(left, outputs.dim(), axis)
            if tangents is not None and along.dtype == tangents.dtype and not is_transformed():
                tangents.addcmul_(along, left.to(along.dtype))
            elif outputs.dim() == 4 and outputs.stride(1) == 1:  # channels_last: the product in that order
                added = (along.movedim(2, -1) * left.movedim(2, -1)).movedim(-1, 2)
                tangents = add(tangents, added)
            else:
                tangents = add(tangents, along * left)
        return self._with_bias(tangents, bias, outputs, axis)

    def rows(self, name: str, indices: Tensor, padding_idx: int | None = None) -> Tensor:
        """Return the rows at ``indices`` (...) of the tangents of a table (q, p), shape (K, ..., p).

        The row at ``padding_idx`` is among them; the caller gives it no derivative.
        """
        self.padding.look_up(name, padding_idx)
        left, right = self._factors(name)
        return left[:, indices].unsqueeze(-1) * right.reshape(len(right), *[1] * indices.dim(), -1)

    def mix_examples(self) -> None:
        """Use the derivative of the whole loss as the weight of everything perturbed so far."""
        if self.per_example:
            self.uses = [use._replace(is_per_example=False) for use in self.uses]

    def gradients(self, total: Tensor, of_examples: Tensor | None) -> Gradients:
        """Return the estimate.

        Args:
            total: the derivatives of the loss, shape (K,).
            of_examples: each example's contribution to them, shape (K, B); None if it is not known.
        """
        for name, rows in self.padding.rows().items():
            self._drop_rows(name, rows)
        mean = None if of_examples is None else of_examples / self.num_tangents
        return Gradients(self.params, self.uses, total / self.num_tangents, mean)

    def _factors(self, name: str) -> RankOne:
        if name not in self._drawn:  # in one draw if all are needed, because a draw takes as long as a small layer
            params = {name: self.params[name]} if self.per_example else self.params
            self._drawn |= rank_one_factors(params, self.num_tangents, self.draw_signs)
        if name not in self._used:
            self._used.add(name)
            drawn = self._drawn  # and not self: a cycle is garbage that Python finds late, and by a search
            along = partial(_add_weighted, drawn, name)
            self.uses.append(Use(name, along, factors=partial(drawn.__getitem__, name)))
        return self._drawn[name]

    def _drop_rows(self, name: str, rows: list[int]) -> None:
        left, right = self._drawn[name]
        self._drawn[name] = RankOne(without_rows(left, rows), right)

    def _is_batch(self, rows: Tensor) -> bool:
        return rows.dim() > 1 and len(rows) == self.num_examples

    def _with_bias(self, added: Tensor | None, bias: str | None, outputs: Tensor, axis: int) -> Tensor:
        if bias is None:
            return added
        tangent = _between(self.dense(bias), outputs.dim(), axis)
        return tangent if added is None else added.add_(tangent)


class DensePerturbation(Perturbation):
    """Given tangents of any kind. With a normal sampler this is the forward gradient of Baydin et al. 2022.

    Bias and second moment are those of the tangents; for normal ones: no bias, and (P + K + 1)/K |grad f|^2.

    Args:
        params: parameter by name.
        num_examples: B; None if it is not known.
        tangents: for each parameter of shape (...) a tensor of shape (K, ...).
    """

    has_factors = False

    def __init__(self, params: Params, num_examples: int | None, tangents: Params) -> None:
        num_tangents = len(next(iter(tangents.values())))
        super().__init__(params, num_tangents, num_examples, _no_signs)
        self._dense = dict(tangents)

    def dense(self, name: str) -> Tensor:
        """Return the tangents of a parameter, shape (K, ...)."""
        self.padding.read(name)
        return self._used_dense(name)

    def rows(self, name: str, indices: Tensor, padding_idx: int | None = None) -> Tensor:
        """Return the rows at ``indices`` (...) of the tangents of a table (q, p), shape (K, ..., p)."""
        self.padding.look_up(name, padding_idx)
        return self._used_dense(name)[:, indices]

    def _used_dense(self, name: str) -> Tensor:
        if name not in self._used:
            self._used.add(name)
            dense = self._dense  # and not self, see above
            self.uses.append(Use(name, lambda t, weights: add(t, weighted_sum(weights, dense[name]))))
        return self._dense[name]

    def _drop_rows(self, name: str, rows: list[int]) -> None:
        self._dense[name] = without_rows(self._dense[name], rows)

    def linear(
        self, weight: str | None, bias: str | None, inputs: Tensor, outputs: Tensor, tangents: Tensor | None = None
    ) -> Tensor:
        """Multiply by each tangent: the third product, which makes the textbook's method slow."""
        if weight is not None:
            rows = inputs.reshape(-1, inputs.shape[-1])
            added = torch.matmul(rows, self.dense(weight).transpose(1, 2)).reshape(-1, *outputs.shape)
            tangents = add(tangents, added)
        return self._with_bias(tangents, bias, outputs, -1)


class PerExamplePerturbation(Perturbation):
    """Rank-one sign tangents a_n b_n^T, different ones for each example n.

    Each is weighted with the derivative of its own example's loss, so the noise of different examples averages out.

    Bias: none. E|g|^2 = |grad f|^2 + (P - 1)/K S, where S = sum_n |g_n|^2 and g_n is example n's contribution to the
    gradient. This holds for models whose parameters all belong to linear and convolutional layers that are called
    once. A convolution with groups, a layer whose inputs have no axis of examples, and any other parameter has one
    tangent for all examples.
    """

    per_example = True

    def linear(
        self, weight: str | None, bias: str | None, inputs: Tensor, outputs: Tensor, tangents: Tensor | None = None
    ) -> Tensor:
        """Add a_n (b_n . x_n), computed elementwise, and keep both signs for the one product of the estimate."""
        if not self._is_batch(inputs):
            return super().linear(weight, bias, inputs, outputs, tangents)
        added = None
        if weight is not None:
            left, right = self._signs(weight, inputs)
            along = torch.linalg.vecdot(inputs, _spread(right, inputs.dim())).unsqueeze(-1)  # (K, B, ..., 1)
            added = along * _spread(left, outputs.dim())
        if bias is not None:
            tangent = _spread(self._signs(bias, inputs)[0], outputs.dim())
            added = tangent if added is None else added + tangent
        return add(tangents, added)

    def convolution(
        self,
        weight: str | None,
        bias: str | None,
        inputs: Tensor,
        outputs: Tensor,
        layer: Convolution,
        tangents: Tensor | None = None,
    ) -> Tensor:
        """Add one convolution with a single output channel for each example, times its signs."""
        if not self._is_batch(inputs) or layer.groups > 1:
            return super().convolution(weight, bias, inputs, outputs, layer, tangents)
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
        return add(tangents, added)

    def _signs(self, name: str, inputs: Tensor) -> RankOne:
        self.padding.read(name)
        p = self.params[name]
        rows = (self.num_tangents, len(inputs))
        left = self.draw_signs((*rows, len(p)), p)
        right = self.draw_signs((*rows, *p.shape[1:]), p) if p.dim() > 1 else None

        def add_to(target: Tensor | None, weights: Tensor) -> Tensor:
            weights = (weights if weights.dim() == 2 else weights.unsqueeze(1).expand(rows)).reshape(-1)
            return add_outer(target, left.flatten(0, 1), None if right is None else right.flatten(0, 1), weights)

        self.uses.append(Use(name, add_to, is_per_example=True))
        return RankOne(left, right)


class ActivityPerturbation(Perturbation):
    """Signs for each unit and example, added to the tangents of a layer's outputs (Ren et al. 2022 use normal ones).

    The estimate of a weight's gradient is the sum over the examples of d_n u_n x_n^T, with d_n the derivative of the
    loss of example n. It keeps the activations x_n, as backprop does, but needs no backward pass.

    Bias: none. For a linear layer (q, p) that is called once, E|g|^2 = |grad|^2 + sum_n (q |D_n|^2 - |D_ln|^2)/K
    |x_n|^2, where D_n are the derivatives of the loss by all perturbed units of example n, and D_ln by those of this
    layer: of order q, not p q. For a convolution, x_n^T becomes the linear map M_n from the layer's outputs to its
    kernel, and the term of example n becomes |M_n|_F^2 |D_n|^2 + |M_n D_ln|^2 - 2 sum_i |M_n e_i|^2 D_lni^2, over K.
    The same holds for a linear layer at several positions of an example, and for biases. Parameters of other functions
    have rank-one tangents.
    """

    per_example = True

    def linear(
        self, weight: str | None, bias: str | None, inputs: Tensor, outputs: Tensor, tangents: Tensor | None = None
    ) -> Tensor:
        """Add signs; only the estimate needs a product."""

        def outer(target: Tensor | None, rows: Tensor, inputs: Tensor) -> Tensor:
            return add_product(target, rows.reshape(-1, rows.shape[-1]).t(), inputs.reshape(-1, inputs.shape[-1]))

        return add(tangents, self._perturb(weight, bias, inputs, outputs, outer, -1))

    def convolution(
        self,
        weight: str | None,
        bias: str | None,
        inputs: Tensor,
        outputs: Tensor,
        layer: Convolution,
        tangents: Tensor | None = None,
    ) -> Tensor:
        """Add signs; the estimate is the weight gradient of a convolution."""

        def correlate(target: Tensor | None, rows: Tensor, inputs: Tensor) -> Tensor:
            return add(target, layer.weight_gradient(inputs, self.params[weight].shape, rows.to(inputs.dtype)))

        return add(tangents, self._perturb(weight, bias, inputs, outputs, correlate, 1))

    def _perturb(
        self,
        weight: str | None,
        bias: str | None,
        inputs: Tensor,
        outputs: Tensor,
        add_to: Callable[[Tensor | None, Tensor, Tensor], Tensor],
        axis: int,
    ) -> Tensor:
        signs = self.draw_signs((self.num_tangents, *outputs.shape), outputs)
        is_batch = self._is_batch(outputs)
        others = [i for i in range(outputs.dim()) if i != axis % outputs.dim()]

        def weigh(weights: Tensor) -> Tensor:
            # The sum over the tangents of weight times signs; it has the shape of the outputs.
            return (weights.reshape(*weights.shape, *[1] * (signs.dim() - weights.dim())) * signs).sum(0)

        def weigh_channels(weights: Tensor) -> Tensor:
            found = weigh(weights)
            return found.sum(others) if others else found  # torch sums over all axes if it is given none

        if weight is not None:
            self.padding.read(weight)
            kept = _kept(inputs)
            along = lambda target, weights: add_to(target, weigh(weights), kept())  # noqa: E731
            self.uses.append(Use(weight, along, is_batch, reads=inputs))
        if bias is not None:
            self.uses.append(Use(bias, lambda target, weights: add(target, weigh_channels(weights)), is_batch))
        return signs


PERTURBATIONS: dict[str, type[Perturbation]] = {
    "rank-one": Perturbation,
    "per-example": PerExamplePerturbation,
    "activity": ActivityPerturbation,
}


def _kept(inputs: Tensor) -> Callable[[], Tensor]:
    # Returns an activation when the gradient is computed, if it still has the values of the pass.
    version = None if inputs.is_inference() else inputs._version

    def read() -> Tensor:
        if version is not None and inputs._version != version:
            raise NotImplementedError(
                f"an activation of the shape {tuple(inputs.shape)} was changed in place after a layer had used it, and "
                f"'activity' tangents need it for the gradient, as backprop does. Let the model make a new tensor, as "
                f"by h * 3 in place of h.mul_(3); read estimate.grads before you write over a batch; or use 'rank-one' "
                f"or 'per-example' tangents, which keep no activations."
            )
        return inputs

    return read


def _add_weighted(drawn: dict[str, RankOne], name: str, target: Tensor | None, weights: Tensor) -> Tensor:
    return add_outer(target, *drawn[name], weights)


def _add_products_(target: Tensor, left: Tensor, right: Tensor) -> None:
    # Add left (K, n, 1) times right (K, 1, q) to target (K, ..., q).
    if is_traced() or is_transformed() or not target.dtype == left.dtype == right.dtype:
        target.add_((left * right).reshape(target.shape))
    else:
        target.view(len(target), -1, target.shape[-1]).baddbmm_(left, right)


def _between(rows: Tensor, num_axes: int, axis: int) -> Tensor:
    # (K, q) -> (K, 1, ..., q, ..., 1), with q at the negative `axis` of tensors with num_axes axes
    return rows.reshape(rows.shape[0], *[1] * (num_axes + axis), -1, *[1] * (-axis - 1))


def _spread(rows: Tensor, num_axes: int) -> Tensor:
    # (K, B, q) -> (K, B, 1, ..., q) for tensors with num_axes axes
    return rows.reshape(*rows.shape[:2], *[1] * (num_axes - 2), -1)


def _no_signs(shape: Sequence[int], like: Tensor) -> Tensor:
    raise AssertionError("given tangents need no random numbers")
