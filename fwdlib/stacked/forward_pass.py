"""The forward pass with tangents: it catches torch's functions and applies the rule registered for each.

A :class:`Pass` catches every torch function called on a :class:`~fwdlib.stacked.dual.Dual`, or on a parameter that has
a tangent. The function's rule (:mod:`fwdlib.stacked.rules`) treats all rows at once: a linear layer is one matrix
product. A function without a rule goes through :func:`torch.func.jvp`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from fwdlib.stacked.dual import METADATA, Dual, function_name, pad_rows, same_rows
from fwdlib.stacked.perturbations import Perturbation

Rule = Callable[..., Any]
RULES: dict[Callable, Rule] = {}


def register_rule(*functions: Callable) -> Callable[[Rule], Rule]:
    """Register a rule: how the stacked pass differentiates some torch functions.

    The pass calls ``rule(run, *args, **kwargs)`` with itself and the arguments of the call, among them duals,
    parameters and plain tensors. The rule gets their rows with ``run.stack(x)`` and returns a
    :class:`~fwdlib.stacked.dual.Dual`.
    For arguments that it cannot handle it returns ``NotImplemented``; the call then goes through
    :func:`torch.func.jvp`. Torch has several names for most functions (``torch.relu``, ``F.relu``, ``Tensor.relu``):
    register all of them. In-place variants need no rule of their own.

    Args:
        functions: the torch functions.

    Returns:
        A decorator that returns the rule unchanged.

    Example:
        >>> from fwdlib import Dual, register_rule
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


class Call(NamedTuple):
    """A call of a torch function on duals or parameters in a pass."""

    name: str
    """Torch's name of the function, for example ``torch.nn.functional.linear``."""
    shape: tuple[int, ...] | None
    """The shape of the result; None if the result is not one tensor with tangents."""
    has_rule: bool
    """Whether a rule handled the call; if not, :func:`torch.func.jvp` did."""


class Pass(TorchFunctionMode):
    """One forward pass with tangents: a context in which the perturbed parameters of a model have tangents.

    Args:
        perturbation: which tangents the parameters have, and where they enter.
        params: parameter by name; the tensors themselves, as the model uses them.
        calls: a list to record the calls in, for :func:`fwdlib.stacked.explain.explain`.
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
                f"{function_name(func)} was called in the forward of a torch.autograd.Function (or in "
                f"inference_mode), whose own derivative the stacked pass cannot see. Write the function as a plain "
                f"one, with a rule by fwdlib.register_rule if it needs one, or use "
                f"fwdlib.forward_gradient(..., engine='torch')."
            )
        if "input" in kwargs:  # torch's name of the argument that rules take first
            args, kwargs = (kwargs["input"], *args), {key: value for key, value in kwargs.items() if key != "input"}
        if "inplace" in kwargs:  # handled here for all functions, so that rules never see it
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
            self._calls.append(Call(function_name(func), shape, has_rule))
        if self.perturbation.per_example and isinstance(found, Dual):
            self._follow_examples(found)
        return found

    def stack(self, x: Any) -> Tensor:
        """Return the rows of ``x``, shape (1 + R, ...). A plain tensor has one row, itself."""
        if isinstance(x, Dual):
            return x.stack
        if (name := self._names.get(id(x))) is not None:
            return torch.cat([x.unsqueeze(0), self.perturbation.dense(name)])
        return x.unsqueeze(0)

    def name_of(self, x: Any) -> str | None:
        """Return the name of ``x`` if it is a parameter with a tangent."""
        return self._names.get(id(x))

    def has_tangents(self, x: Any) -> bool:
        """Return whether ``x`` is a dual or a parameter with a tangent."""
        return isinstance(x, Dual) or id(x) in self._names

    def is_batch(self, x: Any) -> bool:
        """Return whether axis 0 of ``x`` can be the axis of the examples. It is, as long as no function mixes them."""
        with torch._C.DisableTorchFunctionSubclass():
            return x.dim() > 0 and x.shape[0] == self.perturbation.num_examples

    def mix_examples(self) -> None:
        """Note that from here on the loss of one example depends on other examples, as after BatchNorm in training.

        Everything perturbed so far is then weighted with the derivative of the whole loss, in place of the derivative
        of each example's loss. The variance grows; the estimate stays unbiased.
        """
        self.perturbation.mix_examples()

    def split_examples(self, pieces: Tensor) -> Tensor:
        """Sum ``pieces``, the tangents (R, B) of each example's loss, over the examples.

        Returns:
            Shape (R,), or (R + R B,) with the pieces appended if the perturbation weights each example by itself.
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
        # A scalar that carries the pieces of the examples is the loss or a part of it. Any other result without the
        # axis of the examples has mixed them, and so has a tensor computed from such a scalar.
        num_rows = 1 + self.perturbation.num_tangents
        has_pieces = len(found.stack) > num_rows
        if has_pieces and found.stack.dim() > 1:
            found.stack = found.stack[:num_rows]
            self.mix_examples()
        elif not has_pieces and not self.is_batch(found):
            self.mix_examples()

    def _in_place(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        # Write the result of the out-of-place function into the memory of the first argument. Views of a dual are views
        # of its stack, so they see the change.
        target = args[0]
        if torch.is_grad_enabled() and isinstance(target, Dual):  # the tape may need the values that are overwritten
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
                f"{function_name(func)} would write tangents into a tensor that has none. Write x = x + y instead of "
                f"x += y, and use torch.cat or torch.stack to fill a tensor piece by piece."
            )
        stack = found.stack if isinstance(found, Dual) else found.unsqueeze(0)
        if len(stack) > len(target.stack):  # a loss plus another one that carries the pieces of its examples
            target.stack = stack
        else:
            target.stack.copy_(pad_rows(stack, len(target.stack)))
        return target

    def _without_rule(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        self.mix_examples()  # nothing is known about the function, so it may
        leaves, structure = tree_flatten((args, kwargs))
        where = [i for i, leaf in enumerate(leaves) if self.has_tangents(leaf)]
        stacks = same_rows([self.stack(leaves[i]) for i in where])
        shape: Any = None
        is_real: list[bool] = []

        def call(*values: Tensor) -> list[Any]:
            nonlocal shape
            for i, value in zip(where, values, strict=True):
                leaves[i] = value
            inner_args, inner_kwargs = tree_unflatten(leaves, structure)
            outputs, shape = tree_flatten(func(*inner_args, **inner_kwargs))
            is_real[:] = [_is_differentiable(output) for output in outputs]
            return outputs

        try:
            rows = _rows_by_jvp(lambda *values: tuple(filter(_is_differentiable, call(*values))), stacks)
        except (NotImplementedError, RuntimeError) as error:
            if not isinstance(error, NotImplementedError) and "jvp" not in str(error):
                raise
            raise NotImplementedError(
                f"{function_name(func)} has no rule in the stacked pass and no forward derivative in torch. Register a "
                f"rule with fwdlib.register_rule, or write the model without the function. torch says: {error}"
            ) from error
        duals = [Dual(row) for row in rows]
        if all(is_real):
            return tree_unflatten(duals, shape)
        # A transform cannot return indices, for example, so the function runs once more on the primals.
        plain, rest = call(*(stack[0] for stack in stacks)), iter(duals)
        return tree_unflatten([next(rest) if real else o for real, o in zip(is_real, plain, strict=True)], shape)


def _rows_by_jvp(function: Callable[..., tuple[Tensor, ...]], stacks: Sequence[Tensor]) -> list[Tensor]:
    # For each output of the function its rows, from the rows of each argument.
    primals = tuple(stack[0] for stack in stacks)
    with sdpa_kernel(SDPBackend.MATH):  # torch's fused kernels of attention have no forward derivative
        if len(stacks[0]) == 2:
            values, derivatives = jvp(function, primals, tuple(stack[1] for stack in stacks))
            return [torch.stack([v, d.detach()]) for v, d in zip(values, derivatives, strict=True)]
        along = vmap(lambda *tangents: jvp(function, primals, tangents), randomness="same")
        values, derivatives = along(*(stack[1:] for stack in stacks))
        return [torch.cat([v[:1], d.detach()]) for v, d in zip(values, derivatives, strict=True)]


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
