"""The forward pass with tangents: it catches torch's functions and applies the rule registered for each.

A :class:`Pass` catches every torch function called on a :class:`~fwdlib.stacked.dual.Dual`, or on a parameter that has
a tangent. The function's rule (:mod:`fwdlib.stacked.rules`) treats all rows at once: a linear layer is one matrix
product. A function without a rule goes through :func:`torch.func.jvp`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map, tree_unflatten

from fwdlib.forward import by_backward, passes
from fwdlib.forward.by_backward import jvp_by_backward, leaves_on_tape
from fwdlib.forward.mode import METADATA, OF_THE_TAPE, SET_REQUIRES_GRAD, as_on_tape, check_no_hook, repeats
from fwdlib.forward.passes import Refusal
from fwdlib.stacked.aliases import FILLED, MAY_SHARE, VIEWS, Doubtful, Filled, memory_of
from fwdlib.stacked.dual import OTHER_ENGINE, Dual, Passes, function_name, is_size, joined, pad_rows, primals_of
from fwdlib.stacked.in_place import InPlace, in_place
from fwdlib.stacked.perturbations import Perturbation
from fwdlib.stacked.special import SPECIAL
from fwdlib.stacked.without_rule import Argument, call_without_rule
from fwdlib.tangents import is_traced, is_transformed

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


SIMPLE = {type(None), bool, int, float, str, torch.dtype}
_VIEW = Tensor.view
_current_level = torch._C._functorch.maybe_current_level
_is_fwd_grad_enabled = torch._C._is_fwd_grad_enabled
_is_grad_enabled = torch.is_grad_enabled
_set_grad_enabled = torch._C._set_grad_enabled


class _Kind(NamedTuple):
    # What a function is that does not go straight to its rule; one that is nothing of it may share memory.
    is_metadata: bool = False
    special: Callable | None = None
    in_place: InPlace | None = None


_KINDS: dict[Callable, _Kind | None] = {
    **dict.fromkeys(METADATA, _Kind(is_metadata=True)),
    **{func: _Kind(special=handler) for func, handler in SPECIAL.items()},
    **dict.fromkeys(MAY_SHARE, _Kind()),
}


def _kind_of(func: Callable) -> _Kind | None:
    return None if (found := in_place(func)) is None else _Kind(in_place=found)


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

    Inside, grad mode is on, as in training, and ``torch.no_grad()`` cuts tangents as it cuts gradients.

    Args:
        perturbation: which tangents the parameters have, and where they enter.
        params: parameter by name; the tensors themselves, as the model uses them. They should require a gradient: by
            the tape, the pass finds results that were computed from them without it.
        calls: a list to record the calls in, for :func:`fwdlib.stacked.explain.explain`.
        keeps_tape: whether rules record autograd's tape, of the primal alone.
    """

    def __init__(
        self,
        perturbation: Perturbation,
        params: dict[str, Tensor],
        calls: list[Call] | None = None,
        *,
        keeps_tape: bool = False,
    ) -> None:
        super().__init__()
        self.perturbation = perturbation
        self.names = {id(p): name for name, p in params.items()}
        self._frozen: dict[int, str] = {}  # parameters whose requires_grad the model has switched off
        self._calls = calls
        self._keeps_tape = keeps_tape
        self._filled: Filled | None = None  # made when a model first needs it
        self._doubtful: Doubtful | None = None
        self._num_doubts = 0
        self._number = 0
        self._has_stale = False  # whether the arguments of this call have duals of an earlier pass among them
        self._may_hide = False  # whether they have tensors with a tape among them
        self._is_inside = False  # whether a rule runs, whose own calls come here if it opens the pass again
        self._has_forward_ad = torch._C._is_fwd_grad_enabled()

    def __enter__(self) -> Pass:
        """Begin."""
        if not self._is_inside:
            self._grad_before = torch.is_grad_enabled()
            torch._C._set_grad_enabled(True)
            self._grad_of_model = True
            self._is_inference = torch.is_inference_mode_enabled()
            self._level = _current_level()
            passes.begin(self._apply_function)
            self._number = Passes.begin()
        return super().__enter__()

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        """End: the settings are as before, and tensors that were filled with tangents are plain.

        Raises:
            Refusal: that the model has caught.
        """
        super().__exit__(kind, error, where)
        if not self._is_inside:
            refusals = passes.end()
            Passes.end(self._number)
            if self._filled is not None:
                self._filled.release()
                self._filled = None
            torch._C._set_grad_enabled(self._grad_before)
            passes.raise_hidden(refusals, error)

    def __torch_function__(self, func: Callable, types: Iterable, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Apply the rule of ``func``.

        Raises:
            Refusal: if the pass cannot follow it here.
        """
        self._may_hide = False
        is_concerned = self._concerns(args)
        if kwargs:
            if not SIMPLE.issuperset(map(type, kwargs.values())):
                is_concerned = self._concerns(kwargs.values()) or is_concerned
        else:
            kwargs = {}
        if self._has_stale:
            self._has_stale = False
            if func not in METADATA:
                args, kwargs = self._without_stale(func, args, kwargs)
        if not is_concerned:
            if func is _set_grad_enabled and _is_fwd_grad_enabled():
                self._grad_of_model = args[0]  # and not what a torch.autograd.Function sets for itself
            if self._frozen and func in SET_REQUIRES_GRAD:
                return SPECIAL[func](self, func, *args, **kwargs)
            found = func(*args, **kwargs)
            if isinstance(found, Dual):
                raise Refusal(_nested(func))
            return found
        try:
            kind = _KINDS[func]
        except KeyError:
            kind = _KINDS[func] = _kind_of(func)
        if kind is not None and kind.is_metadata:
            if func in OF_THE_TAPE and self.has_tangents(args[0]):
                return as_on_tape(func, is_param=id(args[0]) in self.names)
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if self._is_inside:
            return self._apply(func, kind, args, kwargs)
        if kind is not None and kind.special is not None:
            return kind.special(self, func, *args, **kwargs)
        if _current_level() != self._level:
            raise Refusal(
                f"{function_name(func)} was called on a tensor with tangents inside a torch.func transform (grad, jvp, "
                f"vmap, ...) of the model's own, which the stacked engine cannot follow. {OTHER_ENGINE}"
            )
        if not (_is_grad_enabled() and _is_fwd_grad_enabled()) and self._cuts(func):
            return self.on_primals(func, args, kwargs)
        if not self._keeps_tape:
            if self._may_hide:
                self._check_visible((*args, *kwargs.values()))
            _set_grad_enabled(False)
        self._is_inside = True
        try:
            return self._apply(func, kind, args, kwargs)
        finally:
            self._is_inside = False
            if not self._keeps_tape:
                _set_grad_enabled(True)

    def stack(self, x: Any) -> Tensor:
        """Return the rows of ``x``, shape (1 + R, ...). A plain tensor has one row, itself.

        Raises:
            Refusal: if ``x`` is sparse.
        """
        if isinstance(x, Dual):
            return x.stack
        if id(x) in self.names:
            return self._rows_of_parameter(x)
        if x.layout is not torch.strided:
            raise Refusal(f"a sparse tensor met a tensor with tangents in a function's rule. {OTHER_ENGINE}")
        return x.unsqueeze(0)

    def _rows_of_parameter(self, x: Tensor) -> Tensor:
        return torch.cat([x.unsqueeze(0), self.perturbation.dense(self.names[id(x)])])

    def name_of(self, x: Any) -> str | None:
        """Return the name of ``x`` if it is a parameter with a tangent."""
        return self.names.get(id(x))

    def has_tangents(self, x: Any) -> bool:
        """Return whether ``x`` is a dual of this pass or a parameter with a tangent."""
        return x.since >= self._number if isinstance(x, Dual) else id(x) in self.names

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

    def on_primals(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """Call ``func`` on the primals. What it writes changes the values of the duals and not their tangents.

        Raises:
            Refusal: if it changes a shape, or may return its argument or not.
        """
        given: dict[int, tuple[Dual, Tensor]] = {}

        def primal_of(x: Any) -> Any:
            if not isinstance(x, Dual):
                return x
            if id(x) not in given:
                given[id(x)] = x, x.primal.detach()
            return given[id(x)][1]

        self._check_fresh((args, kwargs))
        args, kwargs = tree_map(primal_of, (args, kwargs), is_leaf=is_size)
        found = func(*args, **kwargs)
        if any(primal.shape != x.shape for x, primal in given.values()):
            raise Refusal(_moved(func))
        same = {id(primal): x for x, primal in given.values()}  # a function in place returns its argument
        if id(found) in same and (func is Tensor.contiguous or kwargs.get("memory_format") is not None):
            raise Refusal(
                f"{function_name(func)} was called under torch.no_grad(). Whether it returns its argument, which has a "
                f"gradient, depends on the layout, which the stacked engine does not always keep as torch does. Use "
                f".detach(). {OTHER_ENGINE}"
            )
        return tree_map(lambda y: same.get(id(y), y), found)

    def settle(self, x: Any) -> Any:
        """Return a plain tensor that was filled with tangents as a dual, and anything else unchanged.

        Raises:
            Refusal: if ``x`` was computed from parameters, and not by functions that came here.
        """
        self._check_visible((x,))
        if not self._is_filled(x):
            return self._constant(x)
        return Dual(joined(x.detach(), self._tangents(x)))

    def result(self, x: Any) -> Any:
        """Return a result of what runs in this pass: :meth:`settle`, and a parameter with a tangent as a dual."""
        if id(x) not in self.names:
            return self.settle(x)
        with torch._C.DisableTorchFunction():
            return Dual(self._rows_of_parameter(x))

    def forget(self, x: Tensor) -> None:
        """Drop the tangents of a plain tensor."""
        if self._filled is not None:
            self._filled.forget(x)

    def detach(self, x: Dual) -> None:
        """Drop the tangents of a dual. Views that were made of it before keep theirs."""
        before = Dual(x.stack)
        x.stack = pad_rows(x.stack[:1], len(x.stack))
        self._doubt(before, x, "detach_()")

    def require_grad(self, x: Tensor, requires_grad: bool) -> None:
        """Note that the model switches a parameter's gradient off or on again."""
        here, there = (self._frozen, self.names) if requires_grad else (self.names, self._frozen)
        if (name := here.pop(id(x), None)) is not None:
            there[id(x)] = name

    def _cuts(self, func: Callable) -> bool:
        # Whether the model has switched gradients off.
        if self._has_forward_ad and not torch._C._is_fwd_grad_enabled():
            if torch.is_inference_mode_enabled() and not self._is_inference:
                return True
            if self._grad_of_model:
                raise Refusal(
                    f"{function_name(func)} was called in the forward of a torch.autograd.Function, whose own "
                    f"derivative the stacked pass cannot see (reentrant checkpoints and backward hooks of modules are "
                    f"such functions, too). Write the function as a plain one, with a rule by "
                    f"fwdlib.register_rule if it needs one, or use fwdlib.forward_gradient(..., engine='torch')."
                )
            return True
        return not torch.is_grad_enabled()

    def _concerns(self, values: Iterable) -> bool:
        # Also notes whether there are duals of an earlier pass among them, and tensors with a tape.
        found = False
        for value in values:
            kind = type(value)
            if kind in SIMPLE:
                continue
            if kind is Dual:
                if value.since < self._number:
                    self._has_stale = True
                else:
                    found = True
            elif id(value) in self.names:
                found = True
            elif kind is Tensor:
                if value.requires_grad:
                    self._may_hide = True
                    found = found or (self._filled is not None and self._is_filled(value))
            elif isinstance(value, (list, tuple)):
                found = self._concerns(value) or found
            elif self._filled is not None and self._is_filled(value):
                found = True
        return found

    def _without_stale(self, func: Callable, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        # What a closure has kept of an earlier pass is a constant in this one, as in torch's forward mode.
        if self._is_stale(args[0] if args else None) and in_place(func) is not None:
            raise Refusal(
                f"{function_name(func)} was called on a tensor that an earlier pass has computed. Let the closure keep "
                f"x.detach() from one call to the next."
            )
        if not all(x.is_over() for x in tree_leaves((args, kwargs)) if self._is_stale(x)):
            raise Refusal(_nested(func))
        return tree_map(self._constant, (args, kwargs))

    def _is_stale(self, x: Any) -> bool:
        return isinstance(x, Dual) and x.since < self._number

    def _constant(self, x: Any) -> Any:
        return x.constant if self._is_stale(x) else x

    def _is_filled(self, x: Any) -> bool:
        # Filled tensors have a tape, and the views of one that were made under torch.no_grad() have none.
        if self._filled is None or not isinstance(x, Tensor) or isinstance(x, Dual):
            return False
        return x.grad_fn is not None and x in self._filled

    def _tangents(self, x: Tensor) -> Tensor:
        # Those of a plain tensor, to write into.
        if self._filled is None:
            self._filled = Filled(self.perturbation.num_tangents)
        return self._filled.tangents(x)

    def _check_visible(self, values: Iterable) -> None:
        # Refuse a plain tensor that was computed from a tensor with tangents: its own tangents are lost.
        for value in values:
            if type(value) is Tensor and value.requires_grad and value.grad_fn is not None:
                if not self._is_filled(value):
                    self._check_tape(value)
            elif isinstance(value, (list, tuple)):
                self._check_visible(value)

    def _check_tape(self, value: Tensor) -> None:
        for leaf in leaves_on_tape(value):
            if self.has_tangents(leaf) or leaf is FILLED:
                name = self.name_of(leaf)
                raise Refusal(
                    f"a tensor was computed from {f'the parameter {name!r}' if name else 'a tensor with tangents'} "
                    f"below torch's function overrides: by TorchScript, a torch.func transform, a "
                    f"torch.autograd.Function, or code in C++. The stacked engine cannot see such calls. {OTHER_ENGINE}"
                )

    def _apply_function(self, cls: type[torch.autograd.Function], args: tuple) -> Any:
        # The call cls.apply(*args), which is no function that comes to __torch_function__.
        args = tuple(map(self._constant, args))
        if not any(self.has_tangents(x) or self._is_filled(x) for x in args) or _current_level() != self._level:
            return NotImplemented
        check_no_hook(cls)
        if by_backward.only_saves(cls):
            return NotImplemented
        if by_backward.is_checkpoint(cls):
            function, _, *rest = args
            return function(*rest)
        given = [self.settle(x) for x in args]
        arguments = [self._argument(x) if self.has_tangents(x) else None for x in given]
        leaves = [a.primal if isinstance(x, Dual) else x for x, a in zip(given, arguments, strict=True)]
        num_rows = 1 + self.perturbation.num_tangents
        tangents = [None if a is None else pad_rows(a.tangents[: num_rows - 1], num_rows - 1) for a in arguments]
        self.mix_examples()  # nothing is known about the function, so it may
        found = jvp_by_backward(cls.apply, leaves, tangents, cls.__name__, self.names)
        results = []
        for y, v, place in zip(found.leaves, found.tangents, found.written, strict=True):
            dual = y if v is None else Dual(joined(y, v))
            results.append(dual if place is None else args[place].copy_(dual))
        return tree_unflatten(results, found.structure)

    def _check_fresh(self, tree: Any) -> None:
        if self._doubtful is not None:
            for leaf in tree_leaves(tree):
                if isinstance(leaf, Dual):
                    self._doubtful.check(leaf)

    def _apply(self, func: Callable, kind: _Kind | None, args: tuple, kwargs: dict) -> Any:
        if self._doubtful is not None and self._doubtful.has_stale:
            self._check_fresh((args, kwargs))
        if kwargs:
            if "input" in kwargs and not args and func in RULES:  # torch's name of the argument that rules take first
                args, kwargs = (kwargs["input"],), {key: value for key, value in kwargs.items() if key != "input"}
            if "inplace" in kwargs:  # handled here for all functions, so that rules never see it
                kwargs = dict(kwargs)
                if kwargs.pop("inplace"):
                    return self._in_place(func, InPlace(func), args, kwargs)
            if kwargs.get("out") is not None:
                raise Refusal(f"{function_name(func)}(out=...) has no derivative in torch. Leave out= away.")
        if kind is not None and kind.in_place is not None:
            return self._in_place(func, kind.in_place, args, kwargs)
        if self._filled is not None:
            return self._with_filled(func, kind, args, kwargs)
        return self._call(func, kind, args, kwargs)

    def _call(self, func: Callable, kind: _Kind | None, args: tuple, kwargs: dict) -> Any:
        rule = RULES.get(func)
        found = rule(self, *args, **kwargs) if rule is not None else NotImplemented
        has_rule = found is not NotImplemented
        if not has_rule:
            found = self._without_rule(func, args, kwargs)
        if self._calls is not None:
            shape = tuple(found.stack.shape[1:]) if isinstance(found, Dual) else None
            self._calls.append(Call(function_name(func), shape, has_rule))
        is_single = type(found) is Dual
        if is_single and self.perturbation.per_example:
            self._follow_examples(found)
        if func in VIEWS and args and self._is_in_parameter(args[0]):
            return _in_memory_of_parameter(func, args, kwargs, found)
        if is_single and (kind is not None or func is _VIEW or "memory_format" in kwargs):
            self._doubt_view(func, kind, args, kwargs, found)
        return found

    def _is_in_parameter(self, x: Any) -> bool:
        is_own = x.is_view_of_parameter if type(x) is Dual else id(x) in self.names
        return is_own and not self._keeps_tape and not is_transformed()

    def _doubt_view(self, func: Callable, kind: _Kind | None, args: tuple, kwargs: dict, found: Dual) -> None:
        # Note a result that may be a view in torch, or a copy, where it is the other one here.
        is_doubtful = kind is not None or kwargs.get("memory_format") is not None
        source = args[0] if args else None
        if is_doubtful and func is Tensor.contiguous and isinstance(source, Dual) and repeats(source.stack[0]):
            is_doubtful = False  # torch copies, too
        if isinstance(source, Dual) and (is_doubtful or (func is _VIEW and _is_copy(found, source))):
            self._doubt(source, found, function_name(func))

    def _with_filled(self, func: Callable, kind: _Kind | None, args: tuple, kwargs: dict) -> Any:
        # Filled tensors go into the rule as duals. A view of one is a plain tensor again, whose tangents are a view.
        given = (args, kwargs)
        args, kwargs = tree_map(self.settle, given)
        num_doubts = self._num_doubts
        found = self._call(func, kind, args, kwargs)
        pairs = zip(tree_leaves((args, kwargs)), tree_leaves(given), strict=True)
        memories = {memory_of(x.stack) for x, before in pairs if x is not before}
        tensors = [y.stack if isinstance(y, Dual) else y for y in tree_leaves(found) if isinstance(y, Tensor)]
        shares = any(memory_of(y) in memories for y in tensors)
        if shares or self._num_doubts > num_doubts:
            with torch.enable_grad():
                plain = func(*primals_of(given[0]), **primals_of(given[1]))
            found = tree_map(lambda y, p: y if isinstance(y, Dual) and not self._is_filled(p) else p, found, plain)
        return found

    def _doubt(self, source: Dual, result: Dual, name: str) -> None:
        if not self._keeps_tape:
            self._doubtful = self._doubtful or Doubtful()
            self._doubtful.add(source, result, name)
            self._num_doubts += 1

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

    def _in_place(self, func: Callable, kind: InPlace, args: tuple, kwargs: dict) -> Any:
        # Write the result of the counterpart into the memory of the first argument. Views of a dual are views of its
        # stack, so they see the change.
        if not args:  # every name but `input`, as torch.nn.init's `tensor`
            raise Refusal(f"{function_name(func)}: pass the tensor that it writes into as first argument.")
        target, *rest = args
        if not kind.is_known or not isinstance(target, Tensor):
            raise Refusal(
                f"{function_name(func)} writes into its arguments, and the stacked engine does not know how. Write the "
                f"model without the function. {OTHER_ENGINE}"
            )
        is_view = isinstance(target, Dual) and target.is_view_of_parameter
        if is_view or (name := self.name_of(target)) is not None:
            raise RuntimeError(
                f"{function_name(func)} writes into {'a view of a parameter' if is_view else repr(name.strip())}, "
                f"which requires a gradient: torch allows it under torch.no_grad() alone. Write x = x + y in place of "
                f"x += y."
            )
        if not (target.is_floating_point() or target.is_complex()):  # integers have no tangents
            return func(*primals_of(args), **primals_of(kwargs))
        if kind.moves:
            if isinstance(target, Dual):
                raise Refusal(_moved(func))
            return func(*args, **kwargs)
        if isinstance(target, Dual) and self._doubtful is not None:
            self._doubtful.write(target)
        if func is Tensor.__setitem__:
            return self._set(target, *map(self.settle, rest))
        found = self._result_of(func, kind, target, *tree_map(self.settle, (rest, kwargs)))
        self._write(target, found)
        return target

    def _result_of(self, func: Callable, kind: InPlace, target: Tensor, rest: list, kwargs: dict) -> Any:
        if func is Tensor.copy_:
            return rest[0] if rest else kwargs["src"]
        first = self.settle(target)
        if torch.is_grad_enabled() and isinstance(first, Dual):  # the tape may need the values that are overwritten
            first = Dual(first.stack.clone())
        if kind.counterpart is not None:
            with self:
                return kind.counterpart(first, *rest, **kwargs)
        on_copy = functools.wraps(func)(lambda x, *others, **options: func(x.clone(), *others, **options))
        return self._without_rule(on_copy, (first, *rest), kwargs)

    def _write(self, target: Tensor, found: Any) -> None:
        stack = found.stack if isinstance(found, Dual) else self.stack(found)
        if isinstance(target, Dual) and len(stack) > len(target.stack):
            # a loss plus another one that carries the pieces of its examples, or a tensor that was detached in place
            target.stack = stack.expand(len(stack), *target.shape).clone() if stack.shape[1:] != target.shape else stack
        elif isinstance(target, Dual):
            target.stack.copy_(_spread(pad_rows(stack, len(target.stack)), target.dim()))
        else:
            num_rows = 1 + self.perturbation.num_tangents
            self.mix_examples()  # the target may be a view, in which an example stands in the place of another
            tangents = self._tangents(target)
            target.copy_(stack[0])
            tangents.copy_(_spread(pad_rows(stack[:num_rows], num_rows), target.dim())[1:])

    def _set(self, target: Tensor, index: Any, value: Any) -> None:
        if self._calls is not None:
            self._calls.append(Call(function_name(Tensor.__setitem__), None, has_rule=True))
        if isinstance(target, Dual):
            if RULES[Tensor.__setitem__](self, target, index, value) is NotImplemented:
                self._write(target, self._without_rule(_with_entries, (target, index, value), {}))
            return
        self.mix_examples()  # the index may put an example in the place of another
        values = self.stack(value) if isinstance(value, Tensor) else [value]
        rows = target, *self._tangents(target)
        for i, row in enumerate(rows):
            row[index] = values[i] if i < len(values) else 0

    def _without_rule(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        self.mix_examples()  # nothing is known about the function, so it may
        arguments = {
            i: self._argument(leaf) for i, leaf in enumerate(tree_leaves((args, kwargs))) if self.has_tangents(leaf)
        }
        return call_without_rule(func, args, kwargs, arguments, self._check_value, self._doubt)

    def _argument(self, x: Tensor) -> Argument:
        if isinstance(x, Dual):
            x.stack  # noqa: B018  (joins the parts)
            return Argument(_apart(x.primal if self._keeps_tape else x.primal.detach()), x.tangents, x)
        return Argument(_apart(x.detach()), self.perturbation.dense(self.names[id(x)]), None)

    def _check_value(self, value: Tensor) -> None:
        if not self._keeps_tape and value.requires_grad:
            self._check_tape(value)


def _apart(x: Tensor) -> Tensor:
    # Torch gives a tangent the layout of its primal, which it cannot where entries share memory, as after expand(), or
    # where the primal is a view made while torch.fx traces.
    return x.clone() if repeats(x) or is_traced() else x


def _in_memory_of_parameter(func: Callable, args: tuple, kwargs: dict, found: Any) -> Any:
    # What a function of a parameter has found, with views of the parameter in place of copies.
    source, *rest = args
    primal = source.primal if isinstance(source, Dual) else source.detach()
    plain = func(primal, *primals_of(rest), **primals_of(kwargs))

    def share(y: Any, p: Any) -> Any:
        return y.as_view_of_parameter(p) if isinstance(y, Dual) and memory_of(p) == memory_of(primal) else y

    return tree_map(share, found, plain)


def _is_copy(y: Dual, x: Dual) -> bool:
    # Torch's view is none, but the pass does not always keep the layout that allows one.
    return memory_of(y.stack) != memory_of(x.stack)


def _with_entries(x: Tensor, index: Any, value: Any) -> Tensor:
    y = x.clone()
    y[index] = value
    return y


def _nested(func: Callable) -> str:
    return (
        f"{function_name(func)} was called in a pass inside another one, whose parameters or tensors with tangents it "
        f"reads. The stacked engine makes one pass at a time. {OTHER_ENGINE}"
    )


def _moved(func: Callable) -> str:
    return (
        f"{function_name(func)} changes the shape or the memory of a tensor with tangents in place, which the stacked "
        f"engine cannot do. Use the function that returns a new tensor, x = x.squeeze() in place of x.squeeze_(). "
        f"{OTHER_ENGINE}"
    )


def _spread(stack: Tensor, num_axes: int) -> Tensor:
    # Axes of length 1 behind the axis of rows, so that each row broadcasts to a tensor of so many axes.
    return stack.reshape(len(stack), *[1] * (num_axes - stack.dim() + 1), *stack.shape[1:])
