"""Sampling tangents: random vectors v in parameter space with E[v v^T] = I.

A sampler takes params, a number of tangents and a generator, and returns one tensor per parameter with a new leading
axis of tangents. Every estimator draws through :func:`sample_tangents`; none calls ``randn`` itself.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fwdlib.checks import check_choice, check_count

Params = dict[str, Tensor]
AnyGenerator = "torch.Generator | Replicate | None"
Sampler = Callable[[Params, int, Any], Params]


def normal(params: Params, num_tangents: int = 1, generator: AnyGenerator = None) -> Params:
    """Sample independent standard normal components, the choice of the paper (Baydin et al. 2022, algorithm 1).

    The forward gradient of one such tangent has E|g|^2 = (P + 2) |grad f|^2.

    Args:
        params: the parameters; only names, shapes, dtype and device are used.
        num_tangents: K, how many.
        generator: where the randomness comes from; None for torch's global generator.

    Returns:
        For each parameter of shape (...) a tensor of shape (K, ...).
    """
    return _draw_rows(params, num_tangents, generator, lambda row, gen: row.normal_(generator=gen))


def rademacher(params: Params, num_tangents: int = 1, generator: AnyGenerator = None) -> Params:
    """Sample independent signs, -1 or +1 with probability one half each.

    Their kurtosis is the least of all unit-variance laws, so E|g|^2 = P |grad f|^2 is too (Shukla & Shin 2023).
    Arguments and return value are those of :func:`normal`.
    """
    return _draw_rows(params, num_tangents, generator, lambda row, gen: row.bernoulli_(generator=gen).mul_(2).sub_(1))


def orthonormal(params: Params, num_tangents: int = 1, generator: AnyGenerator = None) -> Params:
    r"""Sample tangents at right angles to each other, all of length sqrt(P), uniformly over rotations.

    The Q of a QR decomposition of normal tangents, the signs set so that R has a positive diagonal (Mezzadri 2007,
    *How to generate random matrices from the classical compact groups*). E[v v^T] = I, so the mean over K of them is
    unbiased; it is P/K times the projection of the gradient onto their span, with E|g|^2 = P/K |grad f|^2: for K = P it
    is the gradient.

    Cost: O(K^2 P) beyond :func:`normal`. Arguments and return value are those of :func:`normal`. The k-th tangent
    depends on K by rounding alone.

    Raises:
        ValueError: if ``num_tangents`` is above the number P of parameters: there is no more room for right angles.
    """
    size = sum(p.numel() for p in params.values())
    if num_tangents > size:
        raise ValueError(
            f"num_tangents must be at most {size}, the number of parameters, if orthonormal, got {num_tangents}"
        )
    block = _draw_block(params, num_tangents, generator, lambda row, gen: row.normal_(generator=gen))
    q, r = torch.linalg.qr(block.mT)
    signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype)
    return _cut(params, (q * (signs * math.sqrt(size))).mT)


def rank_one(params: Params, num_tangents: int = 1, generator: AnyGenerator = None) -> Params:
    """Sample rank-one Rademacher tangents a b^T, written out as dense tensors.

    Components have zero mean and unit variance and are uncorrelated, so the forward gradient is unbiased, and
    |v|^2 = P exactly, so E|g|^2 = P |grad f|^2: as for independent signs, the least that unit variance allows. But
    the error is spread otherwise: components of one tensor share their signs. The factors cost p + q numbers instead
    of p q, and the stacked engine never writes them out. Arguments and return value are those of :func:`normal`.
    """
    factors = rank_one_factors(params, num_tangents, functools.partial(random_signs, generator=generator))
    return {name: factor.dense() for name, factor in factors.items()}


class RankOne(NamedTuple):
    """K rank-one tangents of one parameter of shape (q, p...), by their factors."""

    left: Tensor
    """Signs, shape (K, q)."""
    right: Tensor | None
    """Signs, shape (K, p...); None for a parameter of less than two axes: its tangents are ``left``, (K, q) or (K,)."""

    def dense(self) -> Tensor:
        """Return the tangents written out, shape (K, q, p...)."""
        if self.right is None:
            return self.left
        return self.left.reshape(*self.left.shape, *[1] * (self.right.dim() - 1)) * self.right.unsqueeze(1)


def rank_one_factors(
    params: Params, num_tangents: int, draw_signs: Callable[[Sequence[int], Tensor], Tensor]
) -> dict[str, RankOne]:
    """Sample the factors of :func:`rank_one`: a over axis 0 of a parameter, b over the rest.

    Args:
        params: the parameters, of any shape.
        num_tangents: K.
        draw_signs: from a shape, and a tensor with the dtype and device wanted, to independent signs.

    Returns:
        For each parameter its factors, K (p + q) numbers, all of them of one draw.
    """
    shapes, sizes = _pieces(tuple([p.shape for p in params.values()]))
    first = next(iter(params.values()))
    signs, dtype = draw_signs((num_tangents, sum(sizes)), first), first.dtype
    pieces = iter(signs.split_with_sizes(sizes, 1))
    factors = {}
    for (name, p), (left, right) in zip(params.items(), shapes, strict=True):
        a = next(pieces)
        b = None if right is None else next(pieces)
        if not left:
            a = a.reshape(num_tangents)
        if right is not None and len(right) > 1:
            b = b.reshape(num_tangents, *right)
        if p.dtype is not dtype:
            a, b = a.to(p.dtype), b if b is None else b.to(p.dtype)
        factors[name] = RankOne(a, b)
    return factors


@functools.lru_cache(maxsize=128)
def _pieces(shapes: tuple[torch.Size, ...]) -> tuple[list[tuple[torch.Size, torch.Size | None]], list[int]]:
    # The shapes of the two factors of each parameter, and the number of signs of each factor.
    pairs = [(shape[:1], shape[1:]) if len(shape) > 1 else (shape, None) for shape in shapes]
    return pairs, [math.prod(shape) for pair in pairs for shape in pair if shape is not None]


SIGNS_PER_WORD = 64


def num_drawn(shape: Sequence[int]) -> int:
    """Return how many signs are drawn for a shape: those of whole random words."""
    return SIGNS_PER_WORD * (math.prod(shape) // SIGNS_PER_WORD + 1)


def random_signs(shape: Sequence[int], like: Tensor, generator: AnyGenerator = None) -> Tensor:
    """Sample independent signs, -1 or +1, 64 from each random word: many times faster than one by one.

    Args:
        shape: of the result.
        like: a tensor with the dtype and device wanted.
        generator: where the randomness comes from; None for torch's global generator.
    """
    size, num_words = math.prod(shape), num_drawn(shape) // SIGNS_PER_WORD

    def signs(gen: torch.Generator | None) -> Tensor:
        words = torch.randint(-(2**63), 2**63 - 1, (num_words,), generator=gen, device=like.device)
        return torch.embedding(_sign_table(like.dtype, like.device), words.view(torch.uint8).int()).reshape(-1)[:size]

    return draw(generator, signs).reshape(shape)


@functools.cache
def _sign_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    # Row i: the eight bits of the byte i as signs.
    bits = (torch.arange(256).unsqueeze(1) >> torch.arange(8)) & 1
    return (2 * bits - 1).to(device, dtype)


MAX_UNIT_BYTES = 2**32


def unit(params: Params, num_tangents: int, generator: AnyGenerator = None) -> Params:
    """Return the P unit tangents, one for each component of the parameters; nothing is drawn.

    The jvps are the partial derivatives, so the sum of jvp times tangent is the gradient: exact, in place of a mean
    that estimates it. That is for few parameters; see :mod:`fwdlib.methods.sensitivity`. Arguments and return value are
    those of :func:`normal`.

    Raises:
        ValueError: if ``num_tangents`` is not P, or the tangents take more than 4 GiB.
    """
    first, size = next(iter(params.values())), sum(p.numel() for p in params.values())
    if num_tangents != size:
        raise ValueError(
            f"there are {size} unit tangents, one for each number in params, got {num_tangents}; leave num_tangents out"
        )
    if (num_bytes := size * size * first.element_size()) > MAX_UNIT_BYTES:
        raise ValueError(
            f"unit tangents of {size:,} parameters are as many rows of that length, {num_bytes / 2**30:.0f} GiB; they "
            f"are for few parameters. Use other tangents, such as 'rank-one', or backprop_gradient"
        )
    return _cut(params, torch.eye(size, dtype=first.dtype, device=first.device))


TANGENTS: dict[str, Sampler] = {
    "normal": normal,
    "rademacher": rademacher,
    "orthonormal": orthonormal,
    "rank-one": rank_one,
}
"""Random tangents of unit variance, by name."""
NAMED = TANGENTS | {"unit": unit}
"""All tangents that have a name."""


def count_tangents(params: Params, num_tangents: int, tangents: str | Sampler) -> int:
    """Return K: ``num_tangents``, or the number of parameters for unit tangents if ``num_tangents`` is left at 1.

    Raises:
        ValueError: if ``num_tangents`` is below 1.
    """
    check_count("num_tangents", num_tangents)
    is_open = num_tangents == 1 and isinstance(tangents, str) and tangents == "unit"
    return sum(p.numel() for p in params.values()) if is_open else num_tangents


def divisor_of(num_tangents: int, tangents: str | Sampler) -> int:
    """Return by what the sum of jvp times tangent is divided: K for a mean; 1 for unit tangents, whose sum is exact."""
    return 1 if isinstance(tangents, str) and tangents == "unit" else num_tangents


def weighted_sum(weights: Tensor, tangents: Tensor) -> Tensor:
    """Return the sum of weights (K,) times tangents (K, ...), in the tangents' dtype even under ``torch.autocast``."""
    with own_precision(tangents):
        return torch.tensordot(weights.to(tangents.dtype), tangents, dims=1)


def own_precision(x: Tensor) -> AbstractContextManager:
    """Return a context in which ``torch.autocast``, which is for the products of a model, changes no precision."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def sample_tangents(
    params: Params, num_tangents: int = 1, tangents: str | Sampler = "normal", generator: AnyGenerator = None
) -> Params:
    """Sample ``num_tangents`` tangents for ``params``.

    Args:
        params: the parameters, real and floating.
        num_tangents: K, at least 1.
        tangents: ``"normal"``, ``"rademacher"``, ``"orthonormal"``, ``"rank-one"``, ``"unit"``, or a sampler of your
            own with the signature of :func:`normal`.
        generator: where the randomness comes from; None for torch's global generator.

    Returns:
        For each parameter of shape (...) a tensor of shape (K, ...). The k-th tangent does not depend on K, but a
        rank-one one does.

    Raises:
        ValueError: if ``num_tangents`` is below 1, or above the number of parameters for ``"orthonormal"``,
            ``tangents`` is unknown, there are no parameters, or a sampler of your own returns other names or shapes.
        TypeError: if a parameter is an integer or complex tensor, which has no tangent here, or the generator is none.

    Example:
        >>> params = {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}
        >>> tangents = sample_tangents(params, 4, "rademacher", torch.Generator().manual_seed(0))
        >>> tangents["weight"].shape, tangents["bias"].shape
        (torch.Size([4, 2, 3]), torch.Size([4, 2]))
    """
    check_count("num_tangents", num_tangents)
    check_params(params)
    check_generator(generator)
    sampler = tangents if callable(tangents) else NAMED[check_choice("tangents", tangents, NAMED)]
    sampled = sampler(params, num_tangents, generator)
    if not isinstance(sampled, Mapping):
        raise ValueError(
            f"the sampler {sampler!r} must return a dict with a tensor for each parameter, got {type(sampled).__name__}"
        )
    for name, p in params.items():
        v, expected = sampled.get(name), (num_tangents, *p.shape)
        given = tuple(v.shape) if isinstance(v, Tensor) else None if v is None else type(v).__name__
        if given != expected:
            raise ValueError(
                f"the sampler {sampler!r} must give {name!r} a tensor of the shape {expected}, got {given}"
            )
    return {name: sampled[name].to(p.dtype) for name, p in params.items()}


def check_params(params: Params) -> None:
    """Refuse parameters that have no tangent.

    Raises:
        ValueError: if there are none, or none has an element.
        TypeError: if they are no dict, or one is no tensor, or an integer or complex one.
    """
    if not isinstance(params, Mapping):
        raise TypeError(
            f"params must be a dict of tensors, got {type(params).__name__}; params_of(model) returns a model's"
        )
    if not params:
        raise ValueError(
            "params is empty: there is nothing to differentiate. Does the model have trainable parameters?"
        )
    for name, value in params.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            given = value.dtype if isinstance(value, Tensor) else f"{type(value).__name__}; torch.tensor(...) makes one"
            raise TypeError(f"params[{name!r}] must be a real floating tensor, got {given}")
    if not any(p.numel() for p in params.values()):
        raise ValueError(f"params has only empty tensors, {', '.join(params)}: there is nothing to differentiate")


def check_generator(generator: AnyGenerator) -> None:
    """Refuse what is no source of randomness.

    Raises:
        TypeError: if it is none.
    """
    if generator is not None and not isinstance(generator, (torch.Generator, Replicate)):
        raise TypeError(
            f"generator must be a torch.Generator, such as torch.Generator().manual_seed(0), got {generator!r}"
        )


def draw(generator: AnyGenerator, sample: Callable[[torch.Generator | None], Tensor]) -> Tensor:
    """Return ``sample(generator)``, inside ``torch.func.vmap`` over replicates each with its own generator.

    Args:
        generator: a ``torch.Generator``, a :class:`Replicate`, or None for torch's global generator.
        sample: makes a tensor from a ``torch.Generator`` or None.
    """
    return generator.draw(sample) if isinstance(generator, Replicate) else sample(generator)


def is_transformed() -> bool:
    """Return whether this runs inside a ``torch.func`` transform, where torch.autograd and dual levels do not work."""
    # There is no public test for it.
    return torch._C._functorch.maybe_current_level() is not None


def is_traced() -> bool:
    """Return whether make_fx is recording for a compiler, which fuses small operations."""
    # make_fx asks the same way; its public function is slow to import.
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def _draw_rows(params: Params, num_tangents: int, generator: AnyGenerator, fill: Callable) -> Params:
    return _cut(params, _draw_block(params, num_tangents, generator, fill))


def _draw_block(params: Params, num_tangents: int, generator: AnyGenerator, fill: Callable) -> Tensor:
    # One row of P numbers per tangent: one draw for all parameters, and tangent k does not depend on K.
    first = next(iter(params.values()))
    dtype = functools.reduce(torch.promote_types, (p.dtype for p in params.values()), torch.float32)
    size = sum(p.numel() for p in params.values())

    def rows(gen: torch.Generator | None) -> Tensor:
        block = torch.empty(num_tangents, size, dtype=dtype, device=first.device)
        for row in block:
            fill(row, gen)
        return block

    return draw(generator, rows)


def _cut(params: Params, block: Tensor) -> Params:
    # The rows of a block (K, P) as views, one for each parameter.
    pieces = block.split([p.numel() for p in params.values()], dim=1)
    return {
        name: piece.reshape(len(block), *p.shape).to(p.dtype)
        for (name, p), piece in zip(params.items(), pieces, strict=True)
    }


class Replicates:
    """One random generator for each of S replicates, usable inside ``torch.func.vmap`` over the replicates.

    vmap draws either one random tensor with a row for each replicate, or the same numbers for all. Neither gives a
    replicate the numbers that it draws alone. Here each replicate has its own generator, so 100 seeds draw the same
    numbers together as in 100 single runs.

    Args:
        generators: one per replicate.

    Example:
        >>> replicates = Replicates([torch.Generator().manual_seed(seed) for seed in (0, 1)])
        >>> params = {"x": torch.zeros(2, 3)}  # two replicates of a parameter of shape (3,)
        >>> def draw(params, index):
        ...     return normal(params, 1, replicates.at(index))["x"][0]
        >>> stacked = torch.func.vmap(draw)(params, replicates.indices)
        >>> alone = normal({"x": torch.zeros(3)}, 1, torch.Generator().manual_seed(1))["x"][0]
        >>> torch.equal(stacked[1], alone)
        True
    """

    def __init__(self, generators: list[torch.Generator]) -> None:
        self.generators = generators
        self.indices = torch.arange(len(generators))

    def __iter__(self) -> Iterator[torch.Generator]:
        return iter(self.generators)

    def at(self, index: Tensor) -> Replicate:
        """Return the replicate of ``index``, the element of ``indices`` that vmap passes."""
        return Replicate(self.generators, index)


class Replicate:
    """One replicate of :class:`Replicates` inside vmap; samplers take it in place of a ``torch.Generator``."""

    def __init__(self, generators: list[torch.Generator], index: Tensor) -> None:
        self.generators = generators
        self.index = index

    def draw(self, sample: Callable[[torch.Generator], Tensor]) -> Tensor:
        """Return ``sample(generator)`` with this replicate's own generator."""
        return _DrawPerReplicate.apply(self.index, self.generators, sample)


class _DrawPerReplicate(torch.autograd.Function):
    # An autograd.Function, because only there torch accepts a vmap rule.
    @staticmethod
    def forward(index: Tensor, generators: list[torch.Generator], sample: Callable) -> Tensor:
        return sample(generators[int(index)])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, index: Tensor, generators: list[torch.Generator], sample: Callable) -> tuple:
        return torch.stack([sample(generators[i]) for i in index.tolist()]), 0
