"""Recording: what a function of tensors does, replayed without the Python and the autograd engine around it.

In a step of a small network it takes as long to find out what to compute as to compute a layer. What to compute is the
same in every step, so it can be found out once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node

Replay = Callable[..., tuple[Tensor, ...]]
aten = torch.ops.aten
VIEWS = (
    *(aten.alias.default, aten.t.default, aten.view.default, aten._unsafe_view.default),
    *(aten.unsqueeze.default, aten.squeeze.dim, aten.select.int),
)
"""What gives other shapes and strides to the same memory; node.args[0] is whose."""
EMPTY = aten.empty.memory_format, aten.new_empty.default, aten.new_zeros.default
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
        self._replays: dict[Hashable, Replay] = {}

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
        replay = self._replays.get(key)
        if replay is None:
            if len(self._replays) == MOST:
                del self._replays[next(iter(self._replays))]
            replay = self._replays[key] = _record(function, tensors)
        return replay(*tensors)


def _record(function: Callable[..., tuple[Tensor, ...]], tensors: tuple[Tensor, ...]) -> Replay:
    from torch.fx.experimental.proxy_tensor import make_fx

    # On copies, and with random numbers of its own: recording runs the function, and is not yet the call.
    devices = {x.device for x in tensors if x.is_cuda}
    with torch.random.fork_rng(devices):
        module = make_fx(function)(*map(_copy, tensors))
    _simplify(module.graph)
    return _compile(module)


def _simplify(graph: Graph) -> None:
    # Without what computes nothing: a call of it takes half as long as one that adds two activations.
    for node in graph.nodes:
        source = node
        while source.target in VIEWS:
            source = source.args[0]
            if _layout(source) == _layout(node):
                node.replace_all_uses_with(source)
    for node in reversed(graph.nodes):
        is_mark = getattr(node.target, "namespace", "") == "profiler"  # an optimizer's, around its step
        if is_mark or (node.target in (*VIEWS, *EMPTY) and not node.users):
            graph.erase_node(node)


def _layout(node: Node) -> tuple:
    x = node.meta["val"]
    return x.shape, x.stride(), x.storage_offset()


def _compile(module: GraphModule) -> Replay:
    # As torch.fx writes it, but torch.ops.aten.mm.default is one name, and that of the builtin which it would call.
    code = module.graph.python_code("self")
    source, names = code.src, dict(code.globals)
    for kernel in {node.target for node in module.graph.nodes if isinstance(node.target, OpOverload)}:
        name = str(kernel).replace(".", "_")
        source, names[name] = source.replace(f"torch.ops.{kernel}(", f"{name}("), kernel._op
    exec(source, names)
    return partial(names["forward"], module)


def _copy(x: Tensor) -> Tensor:
    # With its strides: a flatten() that is a view of this layout may not be one of another.
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)
