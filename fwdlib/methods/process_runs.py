"""Running a process with derivatives: step by step as it is written, or some compiled steps at a time."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_structure, tree_unflatten

from fwdlib import runtime
from fwdlib.forward.derivatives import either_engine, pushforward, repeated_pushforward, unrolled_pushforward
from fwdlib.methods.process import ProcessLoss, Tree, is_inexact, parted
from fwdlib.methods.programs import Step
from fwdlib.stacked.batches import describe
from fwdlib.stacked.estimator import stacked_pushforward
from fwdlib.stacked.graph import Recorded, cause_of, is_elementwise, record
from fwdlib.tangents import Params

MAX_OPERATIONS = 1_500
"""How many operations a compiled chunk of steps has at most, of which 100 take a second to compile."""
MAX_CHUNK = 10
EAGER_CHUNK = 50
UNROLLED_CHUNK = 8
"""The tangents of an element-wise step are compiled one by one, into one loop, if so many steps fit into a chunk."""
MAX_LANES = 8
"""An element-wise step of numbers along at most so many tangents is computed once for each: in one vector register."""
LARGE, LARGE_CHUNK = 2**16, 2
"""The bytes of a state from which calls cost little beside the steps, and how many of these are compiled together."""
COMPILED_FROM = 1_000
"""From so many steps on a process is compiled at its first use."""


class Moment(NamedTuple):
    """A state and its derivatives."""

    num_steps: int
    """How many steps came before."""
    state: Tree
    tangents: Tree
    """The state's derivatives along the K tangents, shape (K, ...) for a tensor of shape (...); None for integers."""


class Layout(NamedTuple):
    """How parameters and state lie in a list of tensors, which is what a graph takes.

    In order: the parameters, their tangents, the tensors of the state that have derivatives, their tangents, the rest.
    """

    names: list[str]
    spec: TreeSpec
    has_tangents: list[bool]  # of the state's tensors

    def cut(self, rows: Sequence[Tensor]) -> tuple[Params, Params, list[Tensor]]:
        """Return the point, its tangents, and the tensors of the state without derivatives."""
        p, s = len(self.names), sum(self.has_tangents)
        names = [*self.names, *(f" state {i}" for i in range(s))]
        values, tangents = [*rows[:p], *rows[2 * p :][:s]], [*rows[p:][:p], *rows[2 * p + s :][:s]]
        return dict(zip(names, values, strict=True)), dict(zip(names, tangents, strict=True)), [*rows[2 * (p + s) :]]

    def uncut(self, point: Params, others: Sequence[Any]) -> tuple[Params, Tree]:
        """Return the parameters and the state."""
        params = {name: point[name] for name in self.names}
        rest, others = (x for name, x in point.items() if name not in params), iter(others)
        return params, tree_unflatten([next(rest) if has else next(others) for has in self.has_tangents], self.spec)


def find_step(process: ProcessLoss, params: Params, state: Tree, *, trace: bool = True) -> Step | None:
    """Return the graph of a process's step, for the Python values that it reads now.

    Args:
        process: the process.
        params: the point.
        state: a state.
        trace: whether to make one if there is none.

    Raises:
        Exception: if it cannot be traced.
    """
    inputs = tree_map(lambda x: x[0], process.inputs_between(0, 1))
    return process.programs.step(process.step, state, params, inputs, trace=trace)


class Run:
    """One run of a process and of its derivatives: by compiled chunks of steps, or as they are written.

    Args:
        process: the process.
        params: the point.
        tangents: for each parameter of shape (...) a tensor of shape (K, ...).
        compiled: whether to compile; None for yes if there is a compiler and the process is long or used again.

    Raises:
        RuntimeError: if ``compiled`` is True and there is no compiler.
    """

    def __init__(self, process: ProcessLoss, params: Params, tangents: Params, compiled: bool | None) -> None:
        self._process = process
        self.layout, self.rows = _begin(process, params, tangents)
        self._size, self._programs = EAGER_CHUNK, None
        if self._is_compiled(compiled):
            try:
                self._compile()
            except Exception as error:  # one of the step itself comes again
                process.programs.is_refused = True
                warnings.warn(f"the process runs as with compiled=False, because {cause_of(error)}.", stacklevel=6)

    def advance(self, first: int, last: int) -> int:
        """Advance by some steps, at most to ``last``, and return how many."""
        num = min(self._size, last - first)
        if self._programs is not None:
            num = num if num in self._programs else 1
            inputs = tree_leaves(self._process.inputs_between(first, first + num)) if self._process.inputs else ()
            found = self._programs[num](*self.rows, *inputs)
        else:
            point, tangents, others = self.layout.cut(self.rows)
            steps = self._steps(first, num, others, self._process.inputs_between(first, first + num))
            found = [x.contiguous() for part in either(self._process, steps, point, tangents) for x in part]
        self.rows[2 * len(self.layout.names) :] = found
        return num

    def moment(self, num_steps: int) -> Moment:
        """Return the present."""
        point, tangents, others = self.layout.cut(self.rows)
        state, along = self.layout.uncut(point, others)[1], self.layout.uncut(tangents, [None] * len(others))[1]
        return Moment(num_steps, state, along)

    def _is_compiled(self, compiled: bool | None) -> bool:
        programs, has_compiler = self._process.programs, runtime.has_compiler()
        if compiled and not has_compiler:
            raise RuntimeError("compiled=True needs a C++ compiler, and none was found. Install g++ or clang++.")
        is_long = programs.is_used or self._process.num_steps >= COMPILED_FROM
        programs.is_used = True
        return (has_compiler and is_long if compiled is None else compiled) and not programs.is_refused

    def _steps(self, first: int, num: int, others: Sequence[Tensor], inputs: tuple) -> Callable:
        def steps(point: Params) -> tuple[list[Tensor], list[Tensor]]:
            params, state = self.layout.uncut(point, others)
            versions = _versions(others)
            found = parted(self._process.advance(state, params, first, inputs, num))
            if versions != _versions(others):
                raise ValueError(
                    "a step must return a new state, and this one writes into the state that it got: write x = x + y "
                    "in place of x += y"
                )
            return found

        return steps

    def _compile(self) -> None:
        point, _, others = self.layout.cut(self.rows)
        params, state = self.layout.uncut(point, others)
        step = find_step(self._process, params, state)
        key = (tuple(self.layout.names), str(self.layout.spec), *self._active(), *map(describe, self._arguments(1)))
        gaps = [last - first for first, last in itertools.pairwise([0, *self._process.moments])]
        if key not in step.plans:
            one, push = self._record_one()
            step.plans[key] = _chunk_size(gaps, self._largest(one.num_operations, push)), push
        self._size, push = step.plans[key]
        for num in {self._size} | ({1} if any(gap % self._size for gap in gaps) else set()):
            if (key, num) not in step.programs:  # the process that shares these programs may have other gaps
                step.programs[key, num] = step.compile(self._record(num, push), self._arguments(num))
        self._programs = {num: program for (of, num), program in step.programs.items() if of == key}

    def _arguments(self, num: int) -> list[Tensor]:
        return [*self.rows, *tree_leaves(self._process.inputs_between(0, num))]

    def _record(self, num: int, push: Callable) -> Recorded:
        # A graph of some steps, and of their derivatives by one of the engines.
        spec, num_rows = tree_structure(self._process.inputs_between(0, num)), len(self.rows)

        def along(*arguments: Tensor) -> list[Tensor]:
            point, tangents, others = self.layout.cut(arguments[:num_rows])
            steps = self._steps(0, num, others, tree_unflatten(list(arguments[num_rows:]), spec))
            return [x.contiguous() for part in push(steps, point, tangents) for x in part]

        return record(along, self._arguments(num), MAX_OPERATIONS)

    def _record_one(self) -> tuple[Recorded, Callable]:
        # A graph of one step, and the engine that suits it best.
        for push in pushforward, stacked_pushforward:
            try:
                recorded = self._record(1, push)
                break
            except NotImplementedError:
                if push is stacked_pushforward:
                    raise
        if push is stacked_pushforward or not is_elementwise(recorded):
            return recorded, push
        active = self._active()
        is_small = UNROLLED_CHUNK * len(active) * recorded.num_operations <= MAX_OPERATIONS
        if len(active) <= MAX_LANES and all(x.numel() <= len(active) for x in self._state):
            push = repeated_pushforward
        elif is_small:
            push = partial(unrolled_pushforward, active=active)
        return (recorded if push is pushforward else self._record(1, push)), push

    def _largest(self, num_operations: int, push: Callable) -> int:
        # How many steps are compiled together at most.
        size = sum(x.numel() * x.element_size() for x in self._state)
        is_one_loop = push not in (pushforward, stacked_pushforward)
        largest = LARGE_CHUNK if size >= LARGE and not is_one_loop else MAX_CHUNK
        return min(largest, MAX_OPERATIONS // max(1, num_operations))

    @property
    def _state(self) -> list[Tensor]:
        # The state with its tangents: the rows that a step replaces.
        return self.rows[2 * len(self.layout.names) :]

    def _active(self) -> list[tuple[str, ...]]:
        # The names along which each tangent may be other than zero.
        own = set(self.layout.names)
        tangents = {name: v.reshape(len(v), -1).any(1) for name, v in self.layout.cut(self.rows)[1].items()}
        num_tangents = len(next(iter(tangents.values())))
        return [tuple(name for name, v in tangents.items() if name not in own or v[k]) for k in range(num_tangents)]


def _begin(process: ProcessLoss, params: Params, tangents: Params) -> tuple[Layout, list[Tensor]]:
    # The layout, and all that runs at the start. An initial state that no parameter enters has no derivatives.
    leaves, spec = tree_flatten(process.start(params))
    k = len(next(iter(tangents.values())))
    if callable(process.initial):
        function = lambda point: parted(process.start(point))  # noqa: E731
        state, along, others = either(process.initial, function, params, tangents)
    else:
        state, others = parted(process.initial)
        along = [x.new_zeros(k, *x.shape) for x in state]
    rows = [*params.values(), *(tangents[name] for name in params), *state, *along, *(x.clone() for x in others)]
    return Layout(list(params), spec, [*map(is_inexact, leaves)]), [x.detach().contiguous() for x in rows]


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    return [x._version for x in tensors if not x.is_inference()]


def either(key: Any, function: Callable, point: Params, tangents: Params) -> tuple[list, list, list]:
    """Push tangents forward by the stacked engine, or by torch's where that one refuses, or has refused, ``key``."""
    stacked = partial(stacked_pushforward, function, point, tangents)
    return either_engine(key, stacked, partial(pushforward, function, point, tangents))


def _chunk_size(gaps: list[int], largest: int) -> int:
    # As many steps as a graph may have, a divisor of all gaps if there is a large one.
    gaps = [gap for gap in gaps if gap] or [1]
    largest, common = max(1, min(largest, *gaps)), math.gcd(*gaps)
    divisor = max(size for size in range(1, largest + 1) if common % size == 0)
    return divisor if 3 * divisor >= largest else largest
