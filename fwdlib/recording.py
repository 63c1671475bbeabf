"""Recording: what a function of tensors does, replayed without the Python and the autograd engine around it.

In a step of a small network it takes as long to find out what to compute as to compute a layer. What to compute is the
same in every step, so it can be found out once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor
from torch.fx import GraphModule

MOST = 16
"""Recordings that are kept; the oldest goes for a new one, or a key that is new in each step would fill the memory."""


class Recording:
    """Functions of tensors, recorded at the first call for each key and each layout, and from then on replayed.

    What is replayed are torch's kernels, one after the other, those of a backward pass among them. Random numbers are
    drawn anew, and what is changed in place is changed again. Everything that Python supplies on the way stays as it
    was: which branch was taken, numbers such as a dropout's p or an option of the loss, hooks, modes such as autocast.
    What of it may change belongs in the key. A branch on the values of a tensor cannot be recorded: torch raises.

    Example:
        >>> recording = Recording()
        >>> double = lambda x: (x + x,)
        >>> recording(double, torch.ones(2)), recording(double, torch.zeros(3))
        ((tensor([2., 2.]),), (tensor([0., 0., 0.]),))
    """

    def __init__(self) -> None:
        self._graphs: dict[Hashable, GraphModule] = {}

    def __call__(
        self, function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor, key: Hashable = None
    ) -> tuple[Tensor, ...]:
        """Return what the function makes of the tensors.

        Args:
            function: looked at only where its recording is missing.
            tensors: its arguments.
            key: of the recording, beside shapes, strides, dtypes and devices of the tensors.
        """
        key = key, tuple([(x.shape, x.stride(), x.dtype, x.device) for x in tensors])
        if key not in self._graphs:
            if len(self._graphs) == MOST:
                del self._graphs[next(iter(self._graphs))]
            self._graphs[key] = _record(function, tensors)
        return self._graphs[key].forward(*tensors)


def _record(function: Callable[..., tuple[Tensor, ...]], tensors: tuple[Tensor, ...]) -> GraphModule:
    from torch.fx.experimental.proxy_tensor import make_fx

    # On copies, and with random numbers of its own: recording runs the function, and is not yet the call.
    devices = {x.device for x in tensors if x.is_cuda}
    with torch.random.fork_rng(devices):
        graph = make_fx(function)(*map(_copy, tensors))
    for node in graph.graph.nodes:
        if node.target is torch.ops.aten.alias.default:  # what detach() leaves: a call that computes nothing
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.recompile()
    return graph


def _copy(x: Tensor) -> Tensor:
    # With its strides: a flatten() that is a view of this layout may not be one of another.
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)
