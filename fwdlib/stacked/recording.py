"""Recording: the kernels that a function of tensors runs, replayed without Python and the autograd engine.

For small layers, dispatch overhead costs as much as the kernels. The kernels are the same in every step, so they are
found once.
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
"""Functions that view the memory of node.args[0] with other shapes and strides."""
EMPTY = aten.empty.memory_format, aten.new_empty.default, aten.new_zeros.default
MOST = 16
"""Number of recordings kept. A new one replaces the oldest, so a key that is new in each step cannot fill memory."""


class Recording:
    """Functions of tensors, recorded at the first call for each key and layout, and replayed from then on.

    A replay runs the recorded kernels of torch in order, those of a backward pass included. It draws new random numbers
    and repeats every change in place. Everything that Python decides stays as recorded: the branch taken, numbers such
    as the p of a dropout or an option of the loss, hooks, modes such as autocast. Put whatever of it can change into
    the key. A branch on the values of a tensor cannot be recorded: torch raises.

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
        """Return ``function(*tensors)``.

        Args:
            function: called only if there is no recording for this key yet.
            tensors: its arguments.
            key: identifies the recording, together with the tensors' shapes, strides, dtypes and devices.
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

    # Recording runs the function once more than the call, so it works on copies and restores the random state.
    devices = {x.device for x in tensors if x.is_cuda}
    with torch.random.fork_rng(devices):
        module = make_fx(function)(*map(_copy, tensors))
    _simplify(module.graph)
    return _compile(module)


def _simplify(graph: Graph) -> None:
    # Drop the calls that compute nothing: each takes half as long as adding two activations.
    for node in graph.nodes:
        source = node
        while source.target in VIEWS:
            source = source.args[0]
            if _layout(source) == _layout(node):
                node.replace_all_uses_with(source)
    for node in reversed(graph.nodes):
        is_mark = getattr(node.target, "namespace", "") == "profiler"  # an optimizer marks its step for the profiler
        if is_mark or (node.target in (*VIEWS, *EMPTY) and not node.users):
            graph.erase_node(node)


def _layout(node: Node) -> tuple:
    x = node.meta["val"]
    return x.shape, x.stride(), x.storage_offset()


def _compile(module: GraphModule) -> Replay:
    # The code of torch.fx, with one name, bound to the builtin, for each chain such as torch.ops.aten.mm.default.
    code = module.graph.python_code("self")
    source, names = code.src, dict(code.globals)
    for kernel in {node.target for node in module.graph.nodes if isinstance(node.target, OpOverload)}:
        name = str(kernel).replace(".", "_")
        source, names[name] = source.replace(f"torch.ops.{kernel}(", f"{name}("), kernel._op
    exec(source, names)
    return partial(names["forward"], module)


def _copy(x: Tensor) -> Tensor:
    # Keep the strides: flatten() is a view for some layouts and a copy for others.
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)
