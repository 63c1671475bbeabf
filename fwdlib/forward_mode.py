"""Torch's forward mode, made to follow what a model does for reverse mode.

A model is written for backprop: it cuts gradients by ``torch.no_grad()``, asks parameters whether they require a
gradient, calls fused kernels that have a backward pass and no forward derivative. :class:`ForwardMode` translates these
for both engines, so that a directional derivative is backprop's gradient along the tangent.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fwdlib.padding import Padding
from fwdlib.replacements import CONTEXTS, REPLACEMENTS
from fwdlib.tangents import AnyGenerator, Params

REQUIRES_GRAD = Tensor.requires_grad.__get__


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
    *(Tensor.element_size, Tensor.is_contiguous),
    *(torch.numel, torch.is_floating_point, torch.is_complex, torch.is_tensor),
}


class ForwardMode(TorchFunctionMode):
    """A context for a forward pass with tangents.

    - ``torch.no_grad()`` inside the model cuts tangents as it cuts gradients.
    - Parameters with a tangent say that they require a gradient, although no tape is kept for them.
    - Attention, LSTM, embeddings and weight normalisation are computed by functions that have the right forward
      derivative (:mod:`fwdlib.replacements`).

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

    def __torch_function__(self, func: Callable, types: Iterable, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Call ``func``, translated."""
        kwargs = kwargs or {}
        if func is torch._C._set_grad_enabled:
            self._follow(*args)
        elif func in METADATA:
            if func == REQUIRES_GRAD and id(args[0]) in self._names:
                return True
        else:
            self.padding.note(func, args, kwargs, self._names)
            if func in CONTEXTS:
                with CONTEXTS[func]():
                    return func(*args, **kwargs)
            func = REPLACEMENTS.get(func, func)
        return func(*args, **kwargs)

    def _follow(self, enabled: bool) -> None:
        # A torch.autograd.Function switches forward mode off by itself: only what we have cut is ours to join again.
        if not enabled and torch._C._is_fwd_grad_enabled():
            self._cuts = True
            torch._C._set_fwd_grad_enabled(False)
        elif enabled and self._cuts:
            self._cuts = False
            torch._C._set_fwd_grad_enabled(True)

    def __exit__(self, *exc: object) -> None:
        """Leave the context."""
        super().__exit__(*exc)
        self._follow(True)


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


@contextmanager
def tangents_on(own: Params, tangent: Params) -> Iterator[None]:
    """Give a model's own parameters a tangent, for as long as the context lasts.

    An in-place copy of a dual onto a tensor gives the tensor itself the tangent, so nothing in the model is replaced.

    Args:
        own: the model's parameters.
        tangent: a tensor of the same shape for each.
    """
    with forward_ad.dual_level():
        with torch.no_grad():
            for name, p in own.items():
                p.copy_(forward_ad.make_dual(p.detach(), tangent[name]))
        yield


class Rewind:
    """The state that an estimate advances: random numbers and a model's buffers. :meth:`__call__` restores it.

    Args:
        model: whose buffers count.
        generator: where the tangents come from, beside torch's global generators.
    """

    def __init__(self, model: nn.Module, generator: AnyGenerator = None) -> None:
        generators = [] if generator is None else getattr(generator, "generators", [generator])
        self._generators = [(one, one.get_state()) for one in generators]
        self._slots, devices = [], set()
        for module in model.modules():
            devices |= {p.device for p in module._parameters.values() if p is not None}
            for leaf, buffer in module._buffers.items():
                self._slots.append((module._buffers, leaf, buffer, None if buffer is None else buffer.clone()))
                devices |= set() if buffer is None else {buffer.device}
        self._cpu = torch.get_rng_state()
        self._cuda = [(device, torch.cuda.get_rng_state(device)) for device in devices if device.type == "cuda"]

    @torch.no_grad()
    def __call__(self) -> None:
        """Restore."""
        for buffers, leaf, buffer, value in self._slots:
            buffers[leaf] = buffer
            if buffer is not None:
                buffer.copy_(value)
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda:
            torch.cuda.set_rng_state(state, device)
        for one, state in self._generators:
            one.set_state(state)
