"""A step recorded as one graph of torch's operations, and compiled."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._python_dispatch import TorchDispatchMode

from fwdlib.stacked.guarded import READS_VALUES, Refused
from fwdlib.tangents import AnyGenerator, num_drawn, random_signs

T = TypeVar("T")

LOOSE = 8  # so many calls of a record that begins are at most one that is left
SECONDS_PER_OPERATION = 0.03


def how_large(num_operations: int) -> str:
    """Return the size of a step, in words."""
    seconds = SECONDS_PER_OPERATION * num_operations
    return f"{num_operations:,} operations, about {seconds:.0f} s"


class CountedSigns:
    """A source of signs that counts how many are to be drawn at once, to be the same as those of single draws.

    Args:
        generator: where the randomness comes from.
    """

    def __init__(self, generator: AnyGenerator = None) -> None:
        self._generator = generator
        self.total = -1  # the last random word is cut

    def __call__(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Draw."""
        self.total += num_drawn(shape)
        return random_signs(shape, like, self._generator)


class GivenSigns:
    """A source that cuts its signs from a tensor.

    Args:
        signs: shape (total of :class:`CountedSigns`,).
    """

    def __init__(self, signs: Tensor) -> None:
        self._signs = signs
        self.used = 0

    def __call__(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Cut the next signs."""
        start, self.used = self.used, self.used + num_drawn(shape)
        return self._signs[start : start + math.prod(shape)].reshape(shape).to(like.dtype)


class Recorded(NamedTuple):
    """A step as a graph."""

    graph: GraphModule
    """Takes the arguments of the function, and the constants."""
    constants: list[Tensor]
    """Tensors that the graph itself holds."""
    num_operations: int
    """The number of calls in the graph."""


def record(function: Callable, arguments: Sequence[Tensor], max_operations: int | None = None) -> Recorded:
    """Record a function of tensors, without their values.

    Args:
        function: takes the tensors, may write into them, and returns tensors.
        arguments: shapes, strides and dtypes of the tensors.
        max_operations: the largest number of operations; None for no limit.

    Raises:
        Refused: if it is too large, or an argument has gaps or overlaps in memory.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    with nullcontext() if max_operations is None else _Limit(LOOSE * max_operations):
        graph = run_without_values(make_fx(function), arguments)
    graph.graph.eliminate_dead_code()
    _loosen_views(graph)
    graph.recompile()
    num_operations = sum(node.op == "call_function" for node in graph.graph.nodes)
    if max_operations is not None and num_operations > max_operations:
        raise Refused(_too_large(how_large(num_operations)))
    return Recorded(graph, _lift_constants(graph), num_operations)


def _loosen_views(graph: GraphModule) -> None:
    # The compiler may lay out a tensor otherwise than it was recorded, so that a view must be a copy. It may be one
    # where nobody writes into the memory.
    calls = [node for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    base = {node: node for node in graph.graph.nodes}
    for node in calls:
        if node.target.is_view or node.target._schema.is_mutable:
            base[node] = base[node.args[0]]
    written = {base[node] for node in calls if node.target._schema.is_mutable}
    for node in calls:
        if node.target is torch.ops.aten.view.default and base[node] not in written:
            node.target = torch.ops.aten.reshape.default


def run_without_values(function: Callable[..., T], arguments: Sequence[Tensor]) -> T:
    """Call a function with tensors without values in place of the arguments.

    Raises:
        Exception: if it reads the value of a tensor, or the shape of a result depends on values.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return function(*[mode.from_tensor(copied(x)) for x in arguments])


def copied(x: Tensor) -> Tensor:
    """Return a copy of a tensor with the same strides.

    Raises:
        Refused: if that is impossible.
    """
    if x.is_conj() or x.is_neg():
        raise Refused("a tensor is a view that conjugates or negates another; use .resolve_conj() or .resolve_neg()")
    if x.layout is not torch.strided:
        raise Refused(f"it reads a {x.layout} tensor")
    copy = x.detach().clone()
    if copy.stride() != x.stride():
        raise Refused("a tensor has gaps or overlaps in memory; use .contiguous()")
    return copy


def share_memory(tensors: Sequence[Tensor]) -> bool:
    """Return whether two of the tensors overlap in memory."""
    spans = sorted((x.data_ptr(), x.data_ptr() + _num_bytes(x)) for x in tensors if x.numel())
    return any(begin < end for (_, end), (begin, _) in pairwise(spans))


def _num_bytes(x: Tensor) -> int:
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return (last + 1) * x.element_size()


CONSTANTS = ("zeros_like", "ones_like", "full_like", "full", "zeros", "ones", "new_zeros", "scalar_tensor", "_to_copy")
"""Functions that compute nothing and are not said to be element-wise."""


def is_elementwise(recorded: Recorded) -> bool:
    """Return whether a record computes element by element alone, writes into nothing and draws no random numbers."""
    functions = [node.target for node in recorded.graph.graph.nodes if node.op == "call_function"]
    return all(
        (torch.Tag.pointwise in func.tags or func.is_view or func._opname in CONSTANTS)
        and torch.Tag.nondeterministic_seeded not in func.tags
        and not func._schema.is_mutable
        for func in functions
        if isinstance(func, torch._ops.OpOverload)
    )


def compiled(recorded: Recorded, arguments: Sequence[Tensor], *, fixed: bool = False) -> Callable:
    """Return a record as machine code, which takes its arguments and the constants.

    Args:
        recorded: the record.
        arguments: shapes and dtypes of its arguments.
        fixed: whether they lie in the same memory at each call, so that a GPU may replay its kernels.
    """
    # Not by torch.compile: the graph is there, and the caller has checked its conditions.
    import torch._inductor

    options = {"fallback_random": True}  # random numbers of torch's generator, as without compiling
    if fixed and arguments[0].is_cuda:
        options["triton.cudagraphs"] = True
    return torch._inductor.compile(recorded.graph, [*map(copied, (*arguments, *recorded.constants))], options=options)


DEPENDS_ON_VALUES = (
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "PendingUnbackedSymbolNotFound",
    "UserError",
)
"""Errors of torch's tracer."""


def cause_of(error: Exception) -> str:
    """Return in words why something could not be recorded or compiled."""
    inner = getattr(error, "inner_exception", None)
    if isinstance(inner, Exception):
        return cause_of(inner)
    text, kind = (str(error).strip() or "no message").splitlines()[0].rstrip(".:"), type(error).__name__
    if isinstance(error, Refused):
        return text
    place = _place_of(error)
    if kind in DEPENDS_ON_VALUES or "ata-dependent" in text:
        return READS_VALUES + place
    if kind == "Unsupported":
        return f"torch's compiler cannot follow the Python code ({text}){place}"
    return f"{kind}: {text}"


def _place_of(error: Exception) -> str:
    stack = getattr(error, "real_stack", None)
    return f", in {stack[-1].filename}:{stack[-1].lineno}" if stack else ""


def _too_large(size: str) -> str:
    return f"compiling it takes long ({size}); pass compiled=True to compile it all the same"


def _lift_constants(graph: GraphModule) -> list[Tensor]:
    # Tensors that the graph holds as attributes become arguments, so that it sees when they are changed in place.
    found: dict[str, Any] = {}
    last = [node for node in graph.graph.nodes if node.op == "placeholder"][-1]
    constants = []
    for node in list(graph.graph.nodes):
        if node.op == "get_attr" and isinstance(value := getattr(graph, node.target, None), Tensor):
            if node.target not in found:
                constants.append(value)
                with graph.graph.inserting_after(last):
                    last = found[node.target] = graph.graph.placeholder(f"constant_{len(constants)}")
                last.meta.update(node.meta)
            node.replace_all_uses_with(found[node.target])
            graph.graph.erase_node(node)
    graph.recompile()
    return constants


class _Limit(TorchDispatchMode):
    # Ends a record early that is going to be too large.
    def __init__(self, num_calls: int) -> None:
        super().__init__()
        self._left = num_calls
        self._num_calls = num_calls

    def __torch_dispatch__(self, func: Callable, types: Iterable, args: tuple = (), kwargs: dict | None = None) -> Any:
        self._left -= 1
        if self._left < 0:
            raise Refused(_too_large(f"{self._num_calls:,} operations or more"))
        return func(*args, **(kwargs or {}))
