"""The estimate of the stacked pass, kept as the factors of the products that it is a sum of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from fwdlib.tangents import Params, is_transformed


class Use(NamedTuple):
    """A place where the pass perturbed something on behalf of a parameter."""

    name: str
    add_to: Callable[[Tensor, Tensor], None]
    """``add_to(target, weights)`` adds the weighted sum of the tangents to ``target``, which has the parameter's shape.
    The weights have shape (K,), one for each tangent, or (K, B), one for each example in each tangent."""
    is_per_example: bool = False
    """Whether an example's loss depends on its own tangents alone, so that its own derivative suffices as weight."""


class Gradients(Mapping[str, Tensor]):
    """An estimate of the gradient, kept as factors.

    It reads like a dict of tensors and computes each tensor when it is read. :meth:`add_to_` computes none of them in
    full.

    Args:
        params: parameter by name.
        uses: where the pass perturbed them.
        total: the weights of the tangents, shape (K,).
        of_examples: the weights of each example, shape (K, B); None if they are not known.
    """

    def __init__(self, params: Params, uses: Sequence[Use], total: Tensor, of_examples: Tensor | None) -> None:
        self._params = params
        self._uses = uses
        self._total = total
        self._of_examples = of_examples

    def __getitem__(self, name: str) -> Tensor:
        """Return the gradient of one parameter as a new tensor of its shape."""
        p = self._params[name]
        gradient = self._total.new_zeros(p.shape, dtype=p.dtype)  # made from the derivatives, which have vmap's axis
        for use in self._uses:
            if use.name == name:
                use.add_to(gradient, self._weights(use))
        return gradient

    def __iter__(self) -> Iterator[str]:
        return iter(self._params)

    def __len__(self) -> int:
        return len(self._params)

    def add_to_(self, params: Params, factor: float) -> None:
        """Add ``factor`` times the gradient to ``params``, in place. Minus the learning rate makes it a step of SGD.

        Cost: for rank-one tangents one pass over the parameters, and no memory.
        """
        for use in self._uses:
            use.add_to(params[use.name], self._weights(use) * factor)

    def _weights(self, use: Use) -> Tensor:
        return self._total if self._of_examples is None or not use.is_per_example else self._of_examples


def add_outer_(target: Tensor, left: Tensor, right: Tensor | None, weights: Tensor) -> None:
    """Add sum_r weights_r left_r right_r^T to ``target`` (q, p...); without ``right``, add sum_r weights_r left_r."""
    if right is None:
        target.add_((weights.reshape(-1, *[1] * target.dim()) * left).sum(0))
    elif len(weights) == 1 and not is_transformed():  # without a temporary of the size of the target
        target.addcmul_((left[0] * weights).reshape(-1, *[1] * (target.dim() - 1)), right[0])
    elif target.dim() == 2:
        add_product_(target, (left * weights.unsqueeze(1)).t(), right)
    else:
        target.add_(((left * weights.unsqueeze(1)).t() @ right.flatten(1)).reshape(target.shape))


def add_product_(target: Tensor, left: Tensor, right: Tensor) -> None:
    """Add the matrix product ``left @ right`` to ``target``."""
    if is_transformed():  # vmap would run addmm_ seed by seed
        target.add_(left @ right)
    else:
        target.addmm_(left, right)
