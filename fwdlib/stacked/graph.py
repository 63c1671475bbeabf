"""A step recorded as one graph of torch's operations, and compiled.

The record holds what one run of the step did. So it is refused where another run could do something else: where Python
reads the values of tensors, or changes values of its own.
"""

from __future__ import annotations

import functools
import gc
import logging
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fwdlib.stacked.places import STANDARD, is_library
from fwdlib.stacked.state import State, share_memory
from fwdlib.tangents import AnyGenerator, Params, random_signs

Step = Callable[[list[Tensor], list[Tensor], Tensor, Callable], Tensor]
"""``step(tensors, leaves, rate, draw_signs) -> loss``: see :func:`record`."""


LOOSE = 8  # so many calls of a record that begins are at most one that is left
SECONDS_PER_OPERATION = 0.03


def how_large(num_operations: int) -> str:
    """Return the size of a step, in words."""
    seconds = SECONDS_PER_OPERATION * num_operations
    return f"{num_operations:,} operations, about {seconds:.0f} s"


class Refused(Exception):
    """A step cannot be one graph; the message says why."""


class CountedSigns:
    """A source of signs that counts them.

    Args:
        generator: where the randomness comes from.
    """

    def __init__(self, generator: AnyGenerator = None) -> None:
        self._generator = generator
        self.total = 0

    def __call__(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Draw."""
        self.total += math.prod(shape)
        return random_signs(shape, like, self._generator)


class GivenSigns:
    """A source that cuts its signs from a tensor.

    Args:
        signs: shape (number of signs,).
    """

    def __init__(self, signs: Tensor) -> None:
        self._signs = signs
        self.used = 0

    def __call__(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Cut the next signs."""
        start, self.used = self.used, self.used + math.prod(shape)
        return self._signs[start : self.used].reshape(shape).to(like.dtype)


class Recorded(NamedTuple):
    """A step as a graph."""

    graph: GraphModule
    """Takes the model's tensors, those of the batch, the learning rate, the signs, and the constants."""
    constants: list[Tensor]
    """Tensors that the step reads and that are neither parameters nor buffers."""
    num_operations: int
    """The number of calls in the graph."""


def record(
    step: Step,
    probe: Callable[[list[Tensor], list[Tensor]], object],
    state: State,
    leaves: Sequence[Tensor],
    signs: Tensor,
    max_operations: int | None = None,
) -> Recorded:
    """Record a step on copies, and undo what it does to the model.

    It runs three times. In a run of ``probe`` tensors have no values, so code that reads values fails. Two records that
    differ show a counter or a random number of Python.

    Args:
        step: takes the model's tensors in the order of ``state.tensors``, the tensors of the batch, the learning rate
            and a source of signs; changes the model's tensors in place, and returns the loss.
        probe: computes the loss from the model's tensors and those of the batch, without tangents.
        state: what the step reads besides its batch.
        leaves: the tensors of the batch.
        signs: as many as the step consumes.
        max_operations: the largest number of operations; None for no limit.

    Returns:
        The record.

    Raises:
        Refused: if the record would not be right for other values or the next step.
    """
    if state.share_memory:
        raise Refused("two parameters or buffers share memory")
    if any(share_memory([*state.tensors, leaf]) for leaf in leaves):
        raise Refused("the batch shares memory with the model")
    return _recorded(
        state,
        lambda: _run_without_values(probe, state.tensors, leaves),
        lambda: _trace_step(step, state.tensors, leaves, signs),
        max_operations,
    )


def record_function(
    function: Callable[..., list[Tensor]],
    arguments: Sequence[Tensor],
    state: State,
    probe: Callable[..., object],
    max_operations: int | None = None,
) -> Recorded:
    """Record a function of tensors, under the conditions of :func:`record`.

    Args:
        function: takes the tensors and returns others; writes into none of them.
        arguments: shapes and dtypes of the tensors.
        state: what the function reads besides them.
        probe: takes the tensors and computes the same without tangents.
        max_operations: the largest number of operations; None for no limit.

    Raises:
        Refused: if the record would not be right for other values or another call.
    """
    return _recorded(
        state,
        lambda: _run_without_values(lambda given, _: probe(*given), arguments, []),
        lambda: _trace(function, arguments),
        max_operations,
    )


def _recorded(
    state: State, run_without_values: Callable, trace: Callable[[], GraphModule], max_operations: int | None
) -> Recorded:
    limit = nullcontext() if max_operations is None else _Limit(LOOSE * max_operations)
    as_written = torch.compiler.set_stance("force_eager")  # compile no part of the model to find that out
    with state.kept() as changed, as_written:
        with _watched(state.codes), _NoGenerators():
            run_without_values()
        with limit:
            graph = trace()
        if (name := changed()) is not None:
            raise Refused(f"the forward pass changes {name}")
        num_operations = sum(node.op == "call_function" for node in graph.graph.nodes)
        if max_operations is not None and num_operations > max_operations:
            raise Refused(_too_large(how_large(num_operations)))
        again = trace()
    constants, constants_again = _lift_constants(graph), _lift_constants(again)
    if graph.code != again.code or not _are_equal(constants, constants_again):
        raise Refused("the forward pass does something else each time, as with a counter or a random number of Python")
    return Recorded(graph, constants, num_operations)


SEEDING = ("manual_seed", "seed", "initial_seed", "set_state")
"""Methods of a generator that a record leaves out: it has the random numbers alone."""
CALLED = {"print": "prints", "open": "opens a file", "input": "asks for input"}
COMPUTED = {"globals", "eval", "exec", "__import__"}
"""Functions through which code reads variables that it does not name."""
PURE = {
    *("_abc", "_bisect", "_collections", "_collections_abc", "_contextvars", "_decimal", "_functools", "_heapq"),
    *("_operator", "_random", "_sre", "_thread", "_weakref", "_weakrefset", "abc", "bisect", "builtins", "cmath"),
    *("collections", "contextlib", "copy", "copyreg", "dataclasses", "decimal", "enum", "fractions", "functools"),
    *("heapq", "inspect", "itertools", "keyword", "logging", "math", "numbers", "operator", "random", "re"),
    *("reprlib", "statistics", "string", "threading", "types", "typing", "warnings", "weakref"),
}
"""Modules of the standard library whose results depend on their arguments, or on what is followed otherwise."""
INSIDE = ("warnings", "importlib._bootstrap", "_frozen_importlib", "inspect")
"""Modules that read files and the clock for themselves."""


@contextmanager
def _watched(codes: set[CodeType]) -> Iterator[None]:
    # Refuse what a record would leave out or never read again. A profile sees each call, in this thread alone.
    refusals = []

    def watch(frame: FrameType, event: str, function: Any) -> None:
        cause = None
        if event == "call":
            cause = _cause_in_call(frame, codes)
        elif event == "c_call":
            cause = _cause_in_builtin(frame, function)
        if cause is not None:
            refusals.append(Refused(f"the forward pass {cause}"))
            raise refusals[0]

    before, collects = sys.getprofile(), gc.isenabled()
    gc.disable()  # what runs at a collection is no part of the forward pass
    sys.setprofile(watch)
    try:
        yield
    finally:
        sys.setprofile(before) if before is None or callable(before) else before.enable()  # cProfile's is no function
        if collects:
            gc.enable()
        if refusals:  # also where the user's code caught it
            raise refusals[0]


def _cause_in_call(frame: FrameType, codes: set[CodeType]) -> str | None:
    module, code = _module_of(frame), frame.f_code
    if not is_library(module):
        if code in codes:
            return None
        return f"calls {module}.{code.co_qualname}, which is not found by reading the code that forward names"
    is_log = code is logging.Logger._log.__code__
    if (is_log or not _is_pure(module)) and _is_called_by_user(frame.f_back):
        return "logs" if is_log else f"calls {module}.{code.co_qualname}, whose result may change unnoticed"
    return None


def _cause_in_builtin(frame: FrameType, function: Any) -> str | None:
    owner, name = getattr(function, "__self__", None), function.__name__
    if isinstance(owner, torch.Generator):
        return "seeds torch's random numbers" if name in SEEDING else None
    module = function.__module__ or (owner if isinstance(owner, type) else type(owner)).__module__
    if module == "builtins":
        if name in CALLED and not is_library(_module_of(frame)):
            return CALLED[name]
        is_known = name not in COMPUTED or owner is not _BUILTINS
    else:
        is_known = not is_library(module) or _is_pure(module)
    if is_known or not _is_called_by_user(frame):
        return None
    return f"calls {module}.{name}, whose result may change unnoticed"


_BUILTINS = print.__self__


def _is_called_by_user(frame: FrameType | None) -> bool:
    # Whether code of the user's called something, itself or through the standard library.
    while frame is not None and (module := _module_of(frame)).partition(".")[0] in STANDARD:
        if module.startswith(INSIDE):
            return False
        frame = frame.f_back
    return frame is not None and not is_library(module)


def _module_of(frame: FrameType) -> str:
    # Code that torch and namedtuple write has no module.
    module = frame.f_globals.get("__name__") or "torch"
    return "collections" if module.startswith("namedtuple_") else module


@functools.cache
def _is_pure(module: str) -> bool:
    package = module.partition(".")[0]
    return package in PURE or package not in STANDARD


class _NoGenerators(TorchFunctionMode):
    # A record would hold one generator, with the state that it had.
    def __torch_function__(self, func: Callable, types: Iterable, args: tuple = (), kwargs: dict | None = None) -> Any:
        if (kwargs or {}).get("generator") is not None:
            raise Refused("the forward pass draws from a torch.Generator, whose state cannot be followed")
        return func(*args, **(kwargs or {}))


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
    # Not by torch.compile: the graph is there, and the caller holds the conditions that it would check.
    import torch._inductor

    options = {"fallback_random": True}  # random numbers of torch's generator, as without compiling
    if fixed and arguments[0].is_cuda:
        options["triton.cudagraphs"] = True
    return torch._inductor.compile(recorded.graph, [*map(_copy, (*arguments, *recorded.constants))], options=options)


class CompiledStep:
    """A recorded step as machine code.

    Args:
        recorded: the record.
        tensors: those of the model.
        leaves: those of a batch.
        signs: as many as the step consumes.
    """

    def __init__(self, recorded: Recorded, tensors: list[Tensor], leaves: Sequence[Tensor], signs: Tensor) -> None:
        like = tensors[0]
        self._options = {"dtype": like.dtype, "device": like.device}
        self._like, self._num_signs = signs[:0], len(signs)
        self._constants = recorded.constants
        rate = torch.ones((), **self._options)
        self._graph = compiled(recorded, (*tensors, *leaves, rate, signs), fixed=True)

    def __call__(
        self, tensors: list[Tensor], leaves: Sequence[Tensor], learning_rate: float, generator: AnyGenerator
    ) -> Tensor:
        """Take a step: change the model's tensors, and return the loss."""
        rate = torch.as_tensor(learning_rate, **self._options)
        signs = random_signs((self._num_signs,), self._like, generator)
        found = self._graph(*tensors, *leaves, rate, signs, *self._constants)
        return found[0] if isinstance(found, (list, tuple)) else found


def write_assigned(given: Params, buffers: Params) -> None:
    """Write buffers that a forward pass has assigned into those that it was given.

    Args:
        given: buffer by name, before the pass.
        buffers: the same after it.

    Raises:
        Refused: if one cannot hold the other's values.
    """
    assigned = {name: x for name, x in buffers.items() if x is not given[name]}
    for name, x in assigned.items():
        if x is None or x.shape != given[name].shape or x.dtype != given[name].dtype:
            raise Refused(f"the forward pass changes the shape or the dtype of the buffer {name}")
    copies = {name: x.detach().clone() for name, x in assigned.items()}  # one may be another's old tensor
    for name, x in copies.items():
        given[name].copy_(x)


def cause_of(error: Exception) -> str:
    """Return in words why a step could not be recorded or compiled."""
    text = (str(error).strip() or "no message").splitlines()[0].rstrip(".")
    if isinstance(error, Refused):
        return text
    kind = type(error).__name__
    if kind == "DataDependentOutputException" or "get value out of a tracing tensor" in text:
        return "the model's Python code reads the value of a tensor, as .item(), bool() and float() do"
    if kind == "DynamicOutputShapeException":
        return f"the shape of a tensor depends on values, in {text}"
    if "dynamo-optimized" in text:
        return "torch.compile has compiled a part of the model"
    if "TorchScript interpreter" in text:
        return "a function in TorchScript reads the values of a tensor"
    if any(words in text for words in ("data pointer", "numpy()", "tolist()", "storage")):
        return "code outside torch reads the values of a tensor, as .tolist() and .numpy() do"
    return f"{kind}: {text}"


def _too_large(size: str) -> str:
    return f"compiling it takes long ({size}); pass compiled=True to compile it all the same"


def _trace_step(step: Step, tensors: list[Tensor], leaves: Sequence[Tensor], signs: Tensor) -> GraphModule:
    num_tensors, given = len(tensors), GivenSigns(signs)

    def run(*flat: Tensor) -> Tensor:
        *flat, rate, given._signs = flat
        return step(flat[:num_tensors], flat[num_tensors:], rate, given)

    rate = torch.ones((), dtype=tensors[0].dtype, device=tensors[0].device)
    graph = _trace(run, [*tensors, *leaves, rate, signs], num_written=num_tensors)
    if given.used != len(signs):
        raise Refused("the number of its random signs is not the same in each step")
    return graph


def _trace(function: Callable, arguments: Sequence[Tensor], num_written: int = 0) -> GraphModule:
    # A graph of the function, which may write into the first arguments.
    from torch.fx.experimental.proxy_tensor import make_fx

    copies = [*map(_copy, arguments)]
    versions = [x._version for x in copies[num_written:]]
    graph = make_fx(function)(*copies)
    if versions != [x._version for x in copies[num_written:]]:
        raise Refused("the forward pass writes into its batch")
    assert len([node for node in graph.graph.nodes if node.op == "placeholder"]) == len(arguments)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _copy(x: Tensor) -> Tensor:
    if x.is_conj() or x.is_neg():
        raise Refused("a tensor is a view that conjugates or negates another; use .resolve_conj() or .resolve_neg()")
    copy = x.detach().clone()
    if copy.stride() != x.stride():
        raise Refused("a tensor has gaps or overlaps in memory; use .contiguous()")
    return copy


def _run_without_values(probe: Callable, tensors: list[Tensor], leaves: Sequence[Tensor]) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [[mode.from_tensor(_copy(x)).requires_grad_(x.requires_grad) for x in of] for of in (tensors, leaves)]
        with torch.enable_grad():
            probe(*fakes)


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


def _are_equal(ones: list[Tensor], others: list[Tensor]) -> bool:
    return len(ones) == len(others) and all(map(torch.equal, ones, others))


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
