"""The dual batch: a value and its derivatives along R directions, carried through a model together.

A :class:`Dual` looks like the tensor that a model's ``forward`` expects. Inside it is one stack of 1 + R rows: the
primal, then one tangent for each direction. A :class:`Pass` catches every torch function that is called on a dual, or
on a parameter that has a tangent, and applies the rule registered for it (:mod:`fwdlib.stacked.rules`), which treats all
rows in one go: a linear layer is one matrix product. A function without a rule goes through :func:`torch.func.jvp`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

if TYPE_CHECKING:
    from fwdlib.stacked.perturbations import Perturbation

Rule = Callable[..., Any]
RULES: dict[Callable, Rule] = {}


def register_rule(*functions: Callable) -> Callable[[Rule], Rule]:
    """Register a rule: how the stacked pass differentiates some torch functions.

    The rule is called as ``rule(run, *args, **kwargs)``, with the :class:`Pass` and the arguments of the call, among
    them duals, parameters and plain tensors. It gets their rows with ``run.stack(x)`` and returns a :class:`Dual`, or
    ``NotImplemented`` for arguments that it has no answer to: those go through :func:`torch.func.jvp`. Torch has
    several names for most functions (``torch.relu``, ``F.relu``, ``Tensor.relu``): name them all. In-place variants
    need no rule of their own.

    Args:
        functions: the torch functions.

    Returns:
        A decorator that returns the rule unchanged.

    Example:
        >>> import torch
        >>> from fwdlib.stacked.estimator import Dual, register_rule
        >>> @register_rule(torch.special.expit)
        ... def expit(run, x):
        ...     stack = run.stack(x)
        ...     y = torch.special.expit(stack[0])
        ...     return Dual(torch.cat([y[None], stack[1:] * (y * (1 - y))]))
    """

    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(functions, rule))
        return rule

    return register


class Dual(Tensor):
    """A tensor with tangents. Shape, dtype and device are those of its primal.

    Args:
        stack: shape (1 + R, ...): the primal, then R tangents.
    """

    _rows: Tensor | None
    _parts: tuple[Tensor, Tensor] | None

    @staticmethod
    def __new__(cls, stack: Tensor) -> Dual:
        """Make a dual from its rows."""
        return cls._make(stack.shape[1:], stack, stack, None)

    @classmethod
    def of(cls, primal: Tensor, tangents: Tensor) -> Dual:
        """Make a dual from its two parts, which are joined only when the stack is asked for.

        Args:
            primal: shape (...).
            tangents: shape (R, ...).
        """
        return cls._make(primal.shape, primal, None, (primal, tangents))

    @classmethod
    def _make(cls, shape: torch.Size, like: Tensor, rows: Tensor | None, parts: tuple[Tensor, Tensor] | None) -> Dual:
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device, requires_grad=False)
        self._rows, self._parts = rows, parts
        return self

    @property
    def stack(self) -> Tensor:
        """All rows, shape (1 + R, ...)."""
        if self._rows is None:
            primal, tangents = self._parts
            self.stack = torch.cat([primal.unsqueeze(0), tangents])
        return self._rows

    @stack.setter
    def stack(self, rows: Tensor) -> None:
        self._rows, self._parts = rows, None

    @property
    def primal(self) -> Tensor:
        """The value, an ordinary tensor."""
        return self._parts[0] if self._parts else self._rows[0]

    @property
    def tangents(self) -> Tensor:
        """The derivatives, shape (R, ...)."""
        return self._parts[1] if self._parts else self._rows[1:]

    def __repr__(self) -> str:
        return f"Dual(shape={tuple(self.stack.shape[1:])}, num_tangents={len(self.stack) - 1})"

    @classmethod
    def __torch_function__(cls, func: Callable, types: Iterable, args: tuple = (), kwargs: dict | None = None) -> Any:
        # Only reached where no Pass is on: its own __torch_function__ comes first.
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise RuntimeError(
            f"{_name_of(func)} was called on a dual tensor outside its pass. Does the model keep an activation from "
            f"one call to the next? Keep x.detach() instead."
        )

    @classmethod
    def __torch_dispatch__(cls, func: Callable, types: Iterable, args: tuple = (), kwargs: dict | None = None) -> Any:
        raise NotImplementedError(f"{func} was called on a dual tensor past torch's own function overrides")


# What a dual answers from its wrapper, without a look at any row.
METADATA = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "itemsize", "nbytes")),
    *(getattr(Tensor, name).__get__ for name in ("requires_grad", "grad_fn")),
    *(
        value.__get__
        for name, value in vars(torch._C.TensorBase).items()
        if name.startswith("is_") and not callable(value)
    ),
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.__len__, Tensor.get_device),
    *(Tensor.is_floating_point, Tensor.is_complex, Tensor.element_size, Tensor.is_contiguous),
    *(torch.numel, torch.is_floating_point, torch.is_complex, torch.is_tensor),
}


class Call(NamedTuple):
    """One torch function that was called on duals or parameters in a pass."""

    name: str
    """As torch writes it, for example ``torch.nn.functional.linear``."""
    shape: tuple[int, ...] | None
    """Of what it returned; None where that is not one tensor."""
    has_rule: bool
    """Whether a rule treated it, or :func:`torch.func.jvp`."""


class Pass(TorchFunctionMode):
    """One forward pass with tangents: a context in which the perturbed parameters of a model have tangents.

    Args:
        perturbation: what the tangents of the parameters are, and where they enter.
        params: parameter by name; the tensors themselves, as the model uses them.
        calls: a list to record the calls in, for :func:`fwdlib.stacked.estimator.explain`.
    """

    def __init__(
        self,
        perturbation: Perturbation,
        params: dict[str, Tensor],
        calls: list[Call] | None = None,
    ) -> None:
        super().__init__()
        self.perturbation = perturbation
        self._has_forward_ad = torch._C._is_fwd_grad_enabled()
        self._names = {id(p): name for name, p in params.items()}
        self._calls = calls

    def __torch_function__(self, func: Callable, types: Iterable, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Apply the rule of ``func``."""
        kwargs = kwargs or {}
        if not self._concerns(args) and not (kwargs and self._concerns(kwargs.values())):
            return func(*args, **kwargs)
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if self._has_forward_ad and not torch._C._is_fwd_grad_enabled():
            raise NotImplementedError(
                f"{_name_of(func)} was called in the forward of a torch.autograd.Function (or in inference_mode): its "
                f"own derivative the stacked pass cannot see. Write the function as a plain one, with a rule by "
                f"fwdlib.stacked.estimator.register_rule if it needs one, or use fwdlib.estimators.forward_gradient."
            )
        if "input" in kwargs:  # torch's name of what rules get first
            args, kwargs = (kwargs["input"], *args), {key: value for key, value in kwargs.items() if key != "input"}
        if "inplace" in kwargs:  # done here, for functions with a rule and without
            kwargs = dict(kwargs)
            if kwargs.pop("inplace"):
                return self._in_place(func, args, kwargs)
        if _is_in_place(func):
            return self._in_place(func, args, kwargs)
        rule = RULES.get(func)
        found = rule(self, *args, **kwargs) if rule is not None else NotImplemented
        has_rule = found is not NotImplemented
        if not has_rule:
            found = self._without_rule(func, args, kwargs)
        if self._calls is not None:
            shape = tuple(found.stack.shape[1:]) if isinstance(found, Dual) else None
            self._calls.append(Call(_name_of(func), shape, has_rule))
        if self.perturbation.per_example and isinstance(found, Dual):
            self._follow_examples(found)
        return found

    def stack(self, x: Any) -> Tensor:
        """Return the rows of ``x``, shape (1 + R, ...); of a plain tensor the one row that it is."""
        if isinstance(x, Dual):
            return x.stack
        if (name := self._names.get(id(x))) is not None:
            return torch.cat([x.unsqueeze(0), self.perturbation.dense(name)])
        return x.unsqueeze(0)

    def name_of(self, x: Any) -> str | None:
        """Return the name of ``x`` if it is a parameter with a tangent."""
        return self._names.get(id(x))

    def has_tangents(self, x: Any) -> bool:
        """Tell whether ``x`` is a dual or a parameter with a tangent."""
        return isinstance(x, Dual) or id(x) in self._names

    def is_batch(self, x: Any) -> bool:
        """Tell whether axis 0 of ``x`` can be that of the examples: it is, as long as nothing mixes them."""
        with torch._C.DisableTorchFunctionSubclass():
            return x.dim() > 0 and x.shape[0] == self.perturbation.num_examples

    def mix_examples(self) -> None:
        """Say that from here on the loss of one example depends on others, as BatchNorm's does in training.

        What was perturbed so far is then estimated from the derivative of the whole loss, not from that of each
        example's: more variance, and still no bias.
        """
        self.perturbation.mix_examples()

    def split_examples(self, pieces: Tensor) -> Tensor:
        """Sum ``pieces``, tangents of a loss of shape (R, B), over the examples, and keep them where they are wanted.

        Returns:
            Shape (R,), or (R + R B,) if the perturbation estimates each example by itself.
        """
        total = pieces.sum(1)
        if self.perturbation.per_example and len(pieces) == self.perturbation.num_tangents:
            return torch.cat([total, pieces.flatten()])
        return total

    def _concerns(self, values: Iterable) -> bool:
        for value in values:
            if isinstance(value, Dual) or id(value) in self._names:
                return True
            if isinstance(value, (list, tuple)) and self._concerns(value):
                return True
        return False

    def _follow_examples(self, found: Dual) -> None:
        # A scalar that comes with the pieces of the examples is the loss, or a part of it; any other result without the
        # axis of the examples has mixed them, and so has a tensor that is made from such a scalar.
        num_rows = 1 + self.perturbation.num_tangents
        has_pieces = len(found.stack) > num_rows
        if has_pieces and found.stack.dim() > 1:
            found.stack = found.stack[:num_rows]
            self.mix_examples()
        elif not has_pieces and not self.is_batch(found):
            self.mix_examples()

    def _in_place(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        # What the function's counterpart gives goes into the memory of the first argument: views of a dual are views of
        # its stack, and see it.
        target = args[0]
        if torch.is_grad_enabled() and isinstance(target, Dual):  # the tape may need what is written over
            args = (Dual(target.stack.clone()), *args[1:])
        counterpart = _out_of_place(func) if _is_in_place(func) else func
        if counterpart is not None:
            with self:
                found = counterpart(*args, **kwargs)
        else:
            on_copy = functools.wraps(func)(lambda x, *rest, **options: func(x.clone(), *rest, **options))
            found = self._without_rule(on_copy, args, kwargs)
        if not isinstance(target, Dual):
            raise NotImplementedError(
                f"{_name_of(func)} would write tangents into a tensor without them. Write x = x + y instead of x += y, "
                f"and make what is filled piece by piece with torch.cat or torch.stack."
            )
        stack = found.stack if isinstance(found, Dual) else found.unsqueeze(0)
        if len(stack) > len(target.stack):  # a loss to which another is added that comes with its pieces
            target.stack = stack
        else:
            target.stack.copy_(pad_rows(stack, len(target.stack)))
        return target

    def _without_rule(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        name = _name_of(func)
        self.mix_examples()  # for all that is known
        leaves, structure = tree_flatten((args, kwargs))
        where = [i for i, leaf in enumerate(leaves) if self.has_tangents(leaf)]
        stacks = same_rows([self.stack(leaves[i]) for i in where])
        primals = tuple(stack[0] for stack in stacks)
        shape: Any = None
        is_real: list[bool] = []

        def call(*values: Tensor) -> tuple[Tensor, ...]:
            nonlocal shape
            for i, value in zip(where, values, strict=True):
                leaves[i] = value
            inner_args, inner_kwargs = tree_unflatten(leaves, structure)
            outputs, shape = tree_flatten(func(*inner_args, **inner_kwargs))
            is_real[:] = [_is_differentiable(o) for o in outputs]
            return tuple(o for o in outputs if _is_differentiable(o))

        try:
            with sdpa_kernel(SDPBackend.MATH):  # torch's fused kernels of attention have no forward derivative
                if len(stacks[0]) == 2:
                    values, derivatives = jvp(call, primals, tuple(stack[1] for stack in stacks))
                    rows = [torch.stack([v, d.detach()]) for v, d in zip(values, derivatives, strict=True)]
                else:
                    along = vmap(lambda *tangents: jvp(call, primals, tangents), randomness="same")
                    values, derivatives = along(*(stack[1:] for stack in stacks))
                    rows = [torch.cat([v[:1], d.detach()]) for v, d in zip(values, derivatives, strict=True)]
        except (NotImplementedError, RuntimeError) as error:
            if not isinstance(error, NotImplementedError) and "jvp" not in str(error):
                raise
            raise NotImplementedError(
                f"{name} has no rule in the stacked pass and no forward derivative in torch. Register a rule with "
                f"fwdlib.stacked.estimator.register_rule, or write the model without it. torch says: {error}"
            ) from error
        duals = iter([Dual(row) for row in rows])
        if all(is_real):
            return tree_unflatten(list(duals), shape)
        for i, value in zip(where, primals, strict=True):
            leaves[i] = value
        plain_args, plain_kwargs = tree_unflatten(leaves, structure)
        plain, _ = tree_flatten(func(*plain_args, **plain_kwargs))  # indices, say, which a transform would not hand out
        return tree_unflatten([next(duals) if real else o for real, o in zip(is_real, plain, strict=True)], shape)


def pad_rows(stack: Tensor, num_rows: int) -> Tensor:
    """Return ``stack`` with zero tangents added, so that it has ``num_rows`` rows; a row that is missing is zero."""
    if len(stack) == num_rows:
        return stack
    return torch.cat([stack, stack.new_zeros(num_rows - len(stack), *stack.shape[1:])])


def same_rows(stacks: Sequence[Tensor]) -> list[Tensor]:
    """Return all ``stacks`` with as many rows as the longest."""
    num_rows = max(map(len, stacks))
    return [pad_rows(stack, num_rows) for stack in stacks]


def primal_of(x: Any) -> Any:
    """Return ``x`` without tangents: the primal of a dual, anything else as it is."""
    return x.primal if isinstance(x, Dual) else x


def primals_of(tree: Any) -> Any:
    """Return a nest of lists, tuples and dicts with every dual replaced by its primal."""
    return tree_map(primal_of, tree)


def _name_of(func: Callable) -> str:
    return resolve_name(func) or getattr(func, "__name__", str(func))


def _is_differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


@functools.cache
def _is_in_place(func: Callable) -> bool:
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        return name.startswith("__i") and hasattr(Tensor, f"__{name[3:]}")
    return name.endswith("_")


@functools.cache
def _out_of_place(func: Callable) -> Callable | None:
    # relu_ -> relu, __iadd__ -> __add__
    name = func.__name__
    if name.startswith("__"):
        return getattr(Tensor, f"__{name[3:]}")
    return next((getattr(home, name[:-1]) for home in (Tensor, torch, F) if hasattr(home, name[:-1])), None)
