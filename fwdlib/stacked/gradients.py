"""The estimate of the stacked pass, kept as the factors of the products that it is a sum of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fwdlib.stacked.aliases import memory_of
from fwdlib.tangents import Params, RankOne, is_traced, is_transformed, own_precision

FEW = 5
"""Parameters, for which one call each takes less time than a call for all."""


class Use(NamedTuple):
    """A place where the pass perturbed something on behalf of a parameter."""

    name: str
    add_to: Callable[[Tensor | None, Tensor], Tensor]
    """``add_to(target, weights)`` adds the weighted sum of the tangents to ``target``, which has the parameter's shape,
    and returns it; a new tensor if ``target`` is None. The weights have shape (K,), one for each tangent, or (K, B),
    one for each example in each tangent."""
    is_per_example: bool = False
    """Whether an example's loss depends on its own tangents alone, so that its own derivative suffices as weight."""
    factors: Callable[[], RankOne] | None = None
    """Returns the tangents, if they are of rank one."""
    reads: Tensor | None = None
    """The activation that ``add_to`` reads, if it reads one."""


class Gradients(Mapping[str, Tensor]):
    """An estimate of the gradient, kept as factors.

    It reads like a dict of tensors. Each tensor is computed when it is first read, and kept from then on, so that you
    can change it in place. As long as none was read, :meth:`add_to_` computes none of them in full.

    Args:
        params: parameter by name.
        uses: where the pass perturbed them.
        total: the weights of the tangents, shape (K,).
        of_examples: the weights of each example, shape (K, B); None if they are not known.
    """

    def __init__(self, params: Params, uses: Sequence[Use], total: Tensor, of_examples: Tensor | None) -> None:
        self._params = params
        self._uses = uses
        self._uses_of: dict[str, list[Use]] = {}
        for use in uses:
            self._uses_of.setdefault(use.name, []).append(use)
        self._total = total
        self._of_examples = of_examples
        self._written: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        """Return the gradient of one parameter, a tensor of its shape: the same one at each call."""
        if name not in self._written:
            self._written[name] = self._written_out(name)
        return self._written[name]

    def _written_out(self, name: str) -> Tensor:
        p, gradient = self._params[name], None
        with own_precision(p):
            for use in self._uses_of.get(name, ()):
                gradient = use.add_to(gradient, self._weights(use))
        if gradient is None:
            return self._total.new_zeros(p.shape, dtype=p.dtype)  # made from the derivatives, which have vmap's axis
        return gradient.to(p.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._params)

    def __len__(self) -> int:
        return len(self._params)

    def add_to_(self, params: Params, factor: float) -> None:
        """Add ``factor`` times the gradient to ``params``, in place. Minus the learning rate makes it a step of SGD.

        Cost: for rank-one tangents one pass over the parameters, and no memory.
        """
        if self._read_memory_of(params.values()):
            dict(self)  # written out before the first parameter changes
        if self._written:
            for name in self:
                params[name].add_(self[name] * factor)
            return
        uses = self._uses
        if self._total.shape[0] == 1 and self._total.device.type == "cpu" and not (is_traced() or is_transformed()):
            products = [(params[use.name], *use.factors()) for use in uses if use.factors]
            _add_products(products, float(self._total * factor))
            if len(products) == len(uses):
                return
            uses = [use for use in uses if not use.factors]
        with own_precision(self._total):
            for use in uses:
                use.add_to(params[use.name], self._weights(use) * factor)

    def write_to_(self, tensors: Params) -> None:
        """Write the gradient over ``tensors``, which have the names and shapes of the parameters.

        Cost: for one rank-one tangent one pass over each tensor that a single layer uses.
        """
        if self._written:
            for name in self:
                tensors[name].copy_(self[name])
            return
        one_product, written = len(self._total) == 1, set()
        for use in self._uses:
            target = tensors[use.name]
            if use.name in written:
                use.add_to(target, self._weights(use))
            elif one_product and use.factors:
                _write_product(target, *use.factors(), self._total)
            else:
                use.add_to(target.zero_(), self._weights(use))
            written.add(use.name)
        for name in tensors.keys() - written:
            tensors[name].zero_()

    def _read_memory_of(self, tensors: Iterable[Tensor]) -> bool:
        read = {memory_of(use.reads) for use in self._uses if use.reads is not None}
        return bool(read) and not read.isdisjoint(map(memory_of, tensors))

    def _weights(self, use: Use) -> Tensor:
        return self._total if self._of_examples is None or not use.is_per_example else self._of_examples


def _add_products(products: Sequence[tuple[Tensor, Tensor, Tensor | None]], weight: float) -> None:
    # Add weight left right^T to each target, for one tangent: in two calls of torch for many parameters.
    matrices = [
        (target, _column(left, target.dim()), right[0]) for target, left, right in products if right is not None
    ]
    vectors = [(target, left.reshape(target.shape)) for target, left, right in products if right is None]
    if len(products) < FEW:
        for target, column, row in matrices:
            target.addcmul_(column, row, value=weight)
        for target, left in vectors:
            target.add_(left, alpha=weight)
        return
    if matrices:
        torch._foreach_addcmul_(*map(list, zip(*matrices, strict=True)), value=weight)
    if vectors:
        torch._foreach_add_(*map(list, zip(*vectors, strict=True)), alpha=weight)


def _write_product(target: Tensor, left: Tensor, right: Tensor | None, weight: Tensor) -> None:
    # Write weight left right^T over the target, for one tangent.
    if right is None:
        torch.mul(left.reshape(target.shape), weight[0], out=target)
    else:
        torch.mul(_column(left * weight, target.dim()), right[0], out=target)


def _column(left: Tensor, num_axes: int) -> Tensor:
    # (1, q) -> (q, 1, ...)
    return left.reshape(-1, *[1] * (num_axes - 1))


def add_outer(target: Tensor | None, left: Tensor, right: Tensor | None, weights: Tensor) -> Tensor:
    """Add sum_r weights_r left_r right_r^T to ``target`` (q, p...); without ``right``, add sum_r weights_r left_r.

    Returns:
        The target, written over; a new tensor if it is None.
    """
    if right is None:
        return add(target, (weights.reshape(-1, *[1] * (left.dim() - 1)) * left).sum(0))
    if len(weights) == 1 and not is_transformed():  # without a temporary of the size of the target
        column = _column(left[0] * weights, right.dim())
        return column * right[0] if target is None else target.addcmul_(column, right[0])
    scaled = (left * weights.unsqueeze(1)).t()
    if right.dim() == 2:
        return add_product(target, scaled, right)
    product = add_product(None, scaled, right.flatten(1))
    return add(target, product.reshape(-1, *right.shape[1:]))


def add_product(target: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """Add the matrix product ``left @ right`` to ``target``; return it alone if the target is None.

    It is computed with the precision of ``right``, which is that of the layer.
    """
    left = left.to(right.dtype)
    if target is None or target.dtype != right.dtype or is_transformed():  # vmap would run addmm_ seed by seed
        return add(target, left @ right)
    return target.addmm_(left, right)


def add(target: Tensor | None, added: Tensor) -> Tensor:
    """Write the sum of both over ``target``; None stands for zero."""
    return added if target is None else target.add_(added)
