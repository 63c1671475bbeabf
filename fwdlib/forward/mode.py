"""Torch's forward mode, made to follow what a model does for reverse mode.

A model is written for backprop: it cuts gradients by ``torch.no_grad()``, asks parameters whether they require a
gradient, calls fused kernels that have a backward pass and no forward derivative. :class:`ForwardMode` translates these
for both engines, so that a directional derivative is backprop's gradient along the tangent.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.nn.modules._functions import BackwardHookFunction
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves, tree_map, tree_unflatten

from fwdlib.forward import by_backward, passes
from fwdlib.forward.by_backward import LACKS, OTHERS, fails_in_silence, jvp_by_backward, tangent_of
from fwdlib.forward.padding import Padding
from fwdlib.forward.passes import NoTape, Refusal
from fwdlib.forward.replacements import CONTEXTS, REPLACEMENTS
from fwdlib.tangents import Params, is_transformed

REQUIRES_GRAD, IS_LEAF, GRAD_FN = Tensor.requires_grad.__get__, Tensor.is_leaf.__get__, Tensor.grad_fn.__get__
OF_THE_TAPE = {REQUIRES_GRAD, IS_LEAF, GRAD_FN}
"""Questions to a tensor that depend on its tape."""
SET_REQUIRES_GRAD = {Tensor.requires_grad_, Tensor.requires_grad.__set__}
HOOKS = {Tensor.register_hook, Tensor.register_post_accumulate_grad_hook}
NO_TAPE = (
    "Forward mode keeps no tape, so nothing would come of it. To change gradients, use a hook of a parameter that is "
    "registered before the pass, or change .grad afterwards."
)


@contextmanager
def quiet_vmap() -> Iterator[None]:
    """Silence torch's advice about functions that its vmap calls row by row: users cannot change that."""
    torch._C._functorch._set_vmap_fallback_warning_enabled(False)
    try:
        yield
    finally:
        torch._C._functorch._set_vmap_fallback_warning_enabled(True)


METADATA = {
    # functions that read no values of a tensor
    *(
        value.__get__
        for name, value in vars(torch._C.TensorBase).items()
        if inspect.isgetsetdescriptor(value) and name not in ("T", "mT", "H", "mH", "real", "imag", "data")
    ),
    *(Tensor.retain_grad, Tensor.is_floating_point, Tensor.is_complex),
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.__len__, Tensor.get_device),
    Tensor.element_size,
    *(torch.numel, torch.is_floating_point, torch.is_complex, torch.is_tensor),
}


def as_on_tape(func: Callable, is_param: bool) -> bool | None:
    """Answer a question of :data:`OF_THE_TAPE` to a tensor with a tangent as backprop's tape would.

    Raises:
        NoTape: for the ``grad_fn`` of an activation.
    """
    if func == GRAD_FN and not is_param:
        raise NoTape(f"grad_fn of a tensor with tangents was read. {NO_TAPE}")
    return {REQUIRES_GRAD: True, IS_LEAF: is_param, GRAD_FN: None}[func]


def check_no_hook(cls: type[torch.autograd.Function]) -> None:
    """Refuse the function by which a module calls its backward hooks.

    Raises:
        NoTape: if ``cls`` is it.
    """
    if cls is BackwardHookFunction:
        raise NoTape(f"a module with backward hooks was called. {NO_TAPE}")


class ForwardMode(TorchFunctionMode):
    """A context for a forward pass with tangents.

    - ``torch.no_grad()`` inside the model cuts tangents as it cuts gradients.
    - Parameters with a tangent say that they require a gradient, although no tape is kept for them.
    - Attention, LSTM, embeddings and weight normalisation are computed by functions that have the right forward
      derivative (:mod:`fwdlib.forward.replacements`).
    - What has a derivative for the backward pass alone is differentiated by means of it
      (:mod:`fwdlib.forward.by_backward`).

    Args:
        params: parameter by name; the tensors themselves, as the model uses them.
        padding: where the pass notes rows without a gradient; None for a new one.
    """

    padding: Padding

    def __init__(self, params: Params, padding: Padding | None = None) -> None:
        super().__init__()
        self.padding = Padding() if padding is None else padding
        self._names = {id(p): name for name, p in params.items()}
        self._cuts = False
        self._is_inference = torch.is_inference_mode_enabled()

    def __torch_function__(self, func: Callable, types: Iterable, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Call ``func``, translated.

        Raises:
            RuntimeError: if the function itself raises it.
            NoTape: if it registers a hook of a tensor with a tangent, or switches its gradient off.
            Refusal: if it writes before it turns out to have no forward derivative.
        """
        kwargs = kwargs or {}
        if func is torch._C._set_grad_enabled:
            self._follow(*args)
            return func(*args, **kwargs)
        if func in METADATA:
            return self._asked(func, args, kwargs)
        if func in HOOKS and self._has_gradient(args[0]):
            raise NoTape(f"{_name_of(func)} was called on a tensor with tangents. {NO_TAPE}")
        if func in SET_REQUIRES_GRAD and self._has_gradient(args[0]):
            return self._switch(*args, **kwargs)
        self.padding.note(func, args, kwargs, self._names)
        if func in CONTEXTS and not self._cuts:
            with CONTEXTS[func]():
                return func(*args, **kwargs)
        func = REPLACEMENTS.get(func, func)
        if self._cuts or (torch.is_inference_mode_enabled() and not self._is_inference):
            return _without_tangents(func(*args, **kwargs), (args, kwargs))
        if func is torch.autograd.grad and not _creates_graph(*args, **kwargs):
            return tree_map(_constant, func(*args, **kwargs))
        if fails_in_silence(func, args, kwargs):
            return _by_backward(func, args, kwargs, self._names)
        version = args[0]._version if args and isinstance(args[0], Tensor) and not args[0].is_inference() else None
        try:
            return func(*args, **kwargs)
        except (NotImplementedError, RuntimeError) as error:
            if is_transformed() or not any(words in str(error) for words in LACKS):
                raise
        if version is not None and args[0]._version != version:  # torch has written the value before it refused
            raise Refusal(f"{_name_of(func)} writes into its argument and has no forward derivative. {OTHERS}")
        return _by_backward(func, args, kwargs, self._names)

    def __enter__(self) -> ForwardMode:
        """Begin."""
        passes.begin(self._apply_function)
        self._level = torch._C._functorch.maybe_current_level()
        return super().__enter__()

    def _has_gradient(self, x: Any) -> bool:
        # Whether backprop would keep a tape for x, which has a tangent here.
        is_inside = torch._C._functorch.maybe_current_level() != self._level  # a transform of the model's own
        return id(x) in self._names or (not is_inside and tangent_of(x) is not None)

    def _asked(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        if func in OF_THE_TAPE and self._has_gradient(args[0]):
            return as_on_tape(func, is_param=id(args[0]) in self._names)
        if func == Tensor.retain_grad and self._has_gradient(args[0]):
            return None  # there will be no gradient to retain
        return func(*args, **kwargs)

    def _switch(self, x: Tensor, requires_grad: bool = True) -> Tensor:
        # Switch the gradient of a tensor that has one on, where nothing is to do, or off.
        if not requires_grad:
            name = self._names.get(id(x))
            raise NoTape(
                f"requires_grad of the parameter {name!r} was switched off inside the pass. Do so before, or use "
                f"fwdlib.forward_gradient(..., engine='stacked')."
                if name
                else "requires_grad of an activation was switched off; use x.detach()."
            )
        return x

    def _apply_function(self, cls: type[torch.autograd.Function], args: tuple) -> Any:
        if is_transformed() or all(tangent_of(x) is None for x in args):
            return NotImplemented
        check_no_hook(cls)
        if by_backward.is_checkpoint(cls):
            function, _, *rest = args
            return function(*rest)
        return (
            NotImplemented if by_backward.has_jvp(cls) else _by_backward(cls.apply, args, {}, self._names, cls.__name__)
        )

    def _follow(self, enabled: bool) -> None:
        # A torch.autograd.Function switches forward mode off by itself: only what we have cut is ours to join again.
        # Where C++ code has switched grad mode off, as around the hooks of saved tensors, torch.no_grad() changes
        # nothing. Nor does torch.enable_grad() in a torch.func transform, whose level is not that of the tangents.
        if not enabled and torch._C._is_fwd_grad_enabled() and torch.is_grad_enabled():
            self._cuts = True
            torch._C._set_fwd_grad_enabled(False)
        elif enabled and self._cuts and torch._C._functorch.maybe_current_level() == self._level:
            self._cuts = False
            torch._C._set_fwd_grad_enabled(True)

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        """Leave the context.

        Raises:
            Refusal: that the model has caught.
        """
        super().__exit__(kind, error, where)
        refusals = passes.end()
        self._follow(True)
        passes.raise_hidden(refusals, error)


def _without_tangents(found: Any, given: Any) -> Any:
    # Views that are made while forward mode is off have the tangents of what they view, all the same.
    known = {id(x) for x in tree_leaves(given)}

    def cut(x: Any) -> Any:
        return _constant(x) if isinstance(x, Tensor) and id(x) not in known and x._is_view() else x

    return tree_map(cut, found)


def _constant(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    with forward_ad._set_fwd_grad_enabled(False):
        return x.detach()


def _creates_graph(
    outputs: Any, inputs: Any, grad_outputs: Any = None, retain_graph: Any = None, create_graph: bool = False, **_: Any
) -> bool:
    return create_graph


def _name_of(func: Callable) -> str:
    return getattr(func, "__qualname__", None) or resolve_name(func) or str(func)


def _by_backward(func: Callable, args: tuple, kwargs: dict, own: Collection[int], name: str | None = None) -> Any:
    # The call with tangents, by means of the function's backward pass.
    name = name or _name_of(func)
    call, leaves = by_backward.with_tree(func, args, kwargs)
    if any(isinstance(x, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(x) for x in leaves):
        raise Refusal(f"inside torch.func's transforms {name} loses its tangents. {OTHERS}")
    tangents = [tangent_of(x) for x in leaves]
    if all(v is None for v in tangents):
        return func(*args, **kwargs)
    if any(_has_tape(x) for x in leaves if id(x) not in own):
        raise Refusal(f"{name} has no forward derivative, and the model differentiates it backward. {OTHERS}")
    rows = [None if v is None else v.unsqueeze(0) for v in tangents]
    found = jvp_by_backward(call, leaves, rows, name, own)
    results = []
    for y, v, place in zip(found.leaves, found.tangents, found.written, strict=True):
        dual = y if v is None else forward_ad.make_dual(y, v[0])
        results.append(dual if place is None else leaves[place].copy_(dual))
    return tree_unflatten(results, found.structure)


def _has_tape(x: Any) -> bool:
    with torch._C.DisableTorchFunction():  # in the mode, tensors with tangents say so, too
        return isinstance(x, Tensor) and x.requires_grad


@contextmanager
def without_tape(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Switch grad mode on, as a model expects it in training, without a tape for the parameters.

    So ``torch.autograd.grad`` and ``torch.enable_grad`` inside a model work, and the rest keeps no activations.
    """
    trainable = [p for p in parameters if p.requires_grad]
    try:
        for p in trainable:
            p.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for p in trainable:
            p.requires_grad_(True)


def repeats(x: Tensor) -> bool:
    """Return whether entries of a tensor share memory by a stride of 0, as after ``expand()``."""
    return any(step == 0 and size > 1 for step, size in zip(x.stride(), x.shape, strict=True))


@contextmanager
def tangents_on(own: Params, tangent: Params) -> Iterator[None]:
    """Give a model's own parameters a tangent, for as long as the context lasts.

    An in-place copy of a dual onto a tensor gives the tensor itself the tangent, so nothing in the model is replaced.

    Args:
        own: the model's parameters.
        tangent: a tensor of the same shape for each.

    Raises:
        NotImplementedError: if entries of a parameter share memory.
    """
    for name, p in own.items():
        if repeats(p):
            raise NotImplementedError(
                f"entries of the parameter {name!r} share memory, as after expand(), so no optimizer can change it. "
                f"Make it a tensor of its own: nn.Parameter(p.clone())."
            )
    with forward_ad.dual_level():
        with torch.no_grad():
            for name, p in own.items():
                p.copy_(forward_ad.make_dual(p.detach(), tangent[name]))
        yield
