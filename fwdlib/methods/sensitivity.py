r"""Few parameters, many steps: exact gradients of a simulated process by forward mode, in constant memory.

A process is a state that a function advances, :math:`z_{t+1} = s(z_t, \theta)`, for T steps: the integrator of a
differential equation, a training loop whose learning rate is a parameter, a recurrent layer. Beside the state runs its
derivative along K tangents of the parameters,

.. math:: \dot z_{t+1} = \frac{\partial s}{\partial z}\, \dot z_t + \frac{\partial s}{\partial \theta}\, v.

With the P unit tangents that is the exact gradient. Nothing of the past is kept, so the memory does not depend on T;
backprop keeps all states, or some of them and computes each step twice. The time grows with P: forward mode wins up to
some dozens of parameters (Ma et al. 2021, *A Comparison of Automatic Differentiation and Continuous Sensitivity
Analysis for Derivatives of Differential Equation Solutions*, arXiv 1812.01892).

:func:`sensitivity_gradient` is the estimator for a :class:`ProcessLoss`, and :func:`online_gradient` the one for
element-wise recurrence, where a few tangents are exact for any number of parameters. :func:`reverse_gradient` is their
rival.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import (
    TreeSpec,
    keystr,
    tree_flatten,
    tree_flatten_with_path,
    tree_leaves,
    tree_map,
    tree_structure,
    tree_unflatten,
)
from tqdm.auto import tqdm

from fwdlib import runtime
from fwdlib.checks import check_count
from fwdlib.estimators import GradientEstimate
from fwdlib.forward.derivatives import either_engine, pushforward, unrolled_pushforward
from fwdlib.objectives import check_scalar, requiring_grad
from fwdlib.stacked.batches import describe
from fwdlib.stacked.estimator import stacked_pushforward
from fwdlib.stacked.graph import Recorded, cause_of, compiled, is_elementwise, record_function
from fwdlib.stacked.state import State
from fwdlib.tangents import AnyGenerator, Params, Sampler, check_params, count_tangents, sample_tangents

Tree = Any
"""A tensor, or a nest of tuples, lists and dicts of tensors."""

MAX_OPERATIONS = 1_500
"""How many operations a compiled chunk of steps has at most, of which 100 take a second to compile."""
MAX_CHUNK = 10
EAGER_CHUNK = 50
UNROLLED_CHUNK = 8
"""The tangents of an element-wise step are compiled one by one, into one loop, if so many steps fit into a chunk."""
MAX_SHAPES = 256
"""How many forms of steps :func:`reverse_gradient` compiles before it gives up with an error."""
COMPILED_FROM = 1_000
"""From so many steps on a process is compiled at its first use."""


class ProcessLoss:
    """The loss of a process, as a function of its parameters: an objective for every estimator.

    Calling it runs all steps one by one, as any Python code; :func:`sensitivity_gradient` knows more of it.

    Args:
        step: ``(state, params) -> state``, or ``(state, params, input) -> state`` if there are ``inputs``. It returns a
            new state of the same structure, shapes and dtypes, and may read anything, but change nothing.
        initial: the state before the first step, a tensor or any nest of tensors; or a function of the parameters that
            returns it.
        loss: ``(state, params) -> scalar``, or ``(state, params, observed) -> scalar`` if there are ``observations``.
        num_steps: T.
        inputs: what each step reads, a tensor or a nest of tensors of shape (T, ...).
        observations: what was observed, by the number of steps before it, from 0 to T: the losses of all are summed.
            None for one loss of the last state.

    Raises:
        ValueError: if a count is out of range, an input has another length than T, or an observation is not a number.
        TypeError: if the state has no tensors, or something else than tensors.

    Example:
        Exponential decay, solved by Euler's method; the gradient of the end by the rate:

        >>> process = ProcessLoss(
        ...     step=lambda z, p: z - 0.01 * p["rate"] * z,
        ...     initial=torch.ones((), dtype=torch.float64),
        ...     loss=lambda z, p: z,
        ...     num_steps=100,
        ... )
        >>> sensitivity_gradient(process, {"rate": torch.ones((), dtype=torch.float64)}).grads["rate"]
        tensor(-0.3697, dtype=torch.float64)
    """

    def __init__(
        self,
        step: Callable[..., Tree],
        initial: Tree | Callable[[Params], Tree],
        loss: Callable[..., Tensor],
        num_steps: int,
        *,
        inputs: Tree = None,
        observations: Mapping[int, Any] | None = None,
    ) -> None:
        self.step = step
        self.initial = initial
        self.loss = loss
        self.num_steps = check_count("num_steps", num_steps)
        self.inputs = () if inputs is None else (inputs,)  # what step takes beside state and parameters
        self.observations = None if observations is None else dict(sorted(observations.items()))
        self.programs = _Programs()
        self.reverse: Callable | None = None  # the steps as torch.compile has them
        for path, x in tree_flatten_with_path(self.inputs)[0]:
            if not isinstance(x, Tensor) or x.dim() == 0 or len(x) != num_steps:
                raise ValueError(
                    f"inputs{keystr(path[1:])} must be a tensor of shape ({num_steps}, ...), a row for each step, got "
                    f"{tuple(x.shape) if isinstance(x, Tensor) else repr(x)}"
                )
        for moment, observed in (self.observations or {}).items():
            if isinstance(moment, bool) or not isinstance(moment, int) or not 0 <= moment <= num_steps:
                raise ValueError(f"observations are by number of steps, from 0 to {num_steps}, got {moment!r}")
            for path, x in tree_flatten_with_path(observed)[0]:
                if isinstance(x, Tensor) and x.isnan().any():
                    raise ValueError(
                        f"observations[{moment}]{keystr(path)} has nan at {x.isnan().nonzero()[0].tolist()}: leave out "
                        f"what was not observed, or mask it in the loss"
                    )
        if self.observations == {}:
            raise ValueError("observations is empty: there is nothing to compute a loss from")

    @property
    def moments(self) -> list[int]:
        """The numbers of steps after which there is a loss."""
        return [self.num_steps] if self.observations is None else list(self.observations)

    def on(self, inputs: Tree = None, observations: Mapping[int, Any] | None = None) -> ProcessLoss:
        """Return the same process on other data, for example the next batch. Both share what has been compiled.

        Args:
            inputs: of the shapes that it has now; None for these.
            observations: after the same numbers of steps; None for these.

        Raises:
            ValueError: if the numbers of steps differ, or as :class:`ProcessLoss`.
        """
        inputs = (self.inputs[0] if self.inputs else None) if inputs is None else inputs
        observations = self.observations if observations is None else observations
        other = ProcessLoss(
            self.step, self.initial, self.loss, self.num_steps, inputs=inputs, observations=observations
        )
        if other.moments != self.moments:
            raise ValueError(
                f"observations must be after the same numbers of steps, {self.moments}, got {other.moments}"
            )
        other.programs, other.reverse = self.programs, self.reverse
        return other

    def start(self, params: Params) -> Tree:
        """Return the state before the first step.

        Raises:
            TypeError: if it is something else than tensors.
        """
        state = self.initial(params) if callable(self.initial) else self.initial
        for path, x in tree_flatten_with_path(state)[0]:
            if not isinstance(x, Tensor):
                raise TypeError(f"the initial state{keystr(path)} must be a tensor, got {type(x).__name__}")
        if not tree_leaves(state):
            raise TypeError("the initial state has no tensors")
        return state

    def advance(self, state: Tree, params: Params, first: int, inputs: tuple, num_steps: int) -> Tree:
        """Return the state after some steps.

        Args:
            state: before them.
            params: the parameters.
            first: how many steps came before, for messages.
            inputs: those of these steps, from :meth:`inputs_between`.
            num_steps: how many.

        Raises:
            ValueError: if a step changes the structure, a shape or a dtype of the state.
        """
        before = _layout(state)
        for i in range(num_steps):
            state = self.step(state, params, *tree_map(lambda x, i=i: x[i], inputs))
            if (after := _layout(state)) != before:
                raise ValueError(
                    f"a step must return a state like the one it got, tensors of the same shapes and dtypes. Step "
                    f"{first + i + 1} made {_described(after)} of {_described(before)}"
                )
        return state

    def inputs_between(self, first: int, last: int) -> tuple:
        """Return the inputs of the steps from ``first`` to ``last``, one nest of tensors or nothing."""
        return tree_map(lambda x: x[first:last].contiguous(), self.inputs)

    def loss_at(self, moment: int, state: Tree, params: Params) -> Tensor:
        """Return the loss of one state, a scalar."""
        return check_scalar(
            self.loss(state, params, *([] if self.observations is None else [self.observations[moment]]))
        )

    def __call__(self, params: Params) -> Tensor:
        """Run all steps and return the sum of the losses, a scalar."""
        state, total, done = self.start(params), 0, 0
        for moment in self.moments:
            state = self.advance(state, params, done, self.inputs_between(done, moment), moment - done)
            total, done = total + self.loss_at(moment, state, params), moment
        return total


class Moment(NamedTuple):
    """A state and its derivatives."""

    num_steps: int
    """How many steps came before."""
    state: Tree
    tangents: Tree
    """The state's derivatives along the K tangents, shape (K, ...) for a tensor of shape (...); None for integers."""


@torch.no_grad()
def sensitivity_gradient(
    objective: ProcessLoss,
    params: Params,
    *,
    num_tangents: int = 1,
    tangents: str | Sampler = "unit",
    generator: AnyGenerator = None,
    compiled: bool | None = None,
    progress: str | None = "steps",
) -> GradientEstimate:
    """Compute the gradient of a process by forward mode: exact with unit tangents, else an estimate.

    This is real-time recurrent learning (Williams & Zipser 1989) for few parameters, and the forward hypergradient of
    Franceschi et al. 2017, *Forward and Reverse Gradient-Based Hyperparameter Optimization* (arXiv 1703.01785, eq. 14).

    Cost: the work of 1 + K runs of the process; one state and K tangents of it in memory, whatever T is.

    Args:
        objective: the process.
        params: the point.
        num_tangents: K; leave it out for unit tangents, which are P.
        tangents: as for :func:`fwdlib.forward_gradient`, but for those that need layers.
        generator: where random tangents come from.
        compiled: whether the steps run as machine code, some of them at a time; None for yes if there is a compiler
            and the process is long, or used again. Compiling takes seconds to half a minute, once for each process, and
            is done anew if Python values that the step reads change.
        progress: title of the progress bar, which appears after two seconds; None for no bar.

    Returns:
        The estimate. With unit tangents the ``jvps`` are the gradient's components.

    Raises:
        FloatingPointError: if the loss or a derivative is not finite: the message names the first such step.
        ValueError: if a step changes the layout of the state, or as :func:`fwdlib.forward_gradient`.
        TypeError: if the objective is not a process, or as :func:`fwdlib.forward_gradient`.
        NotImplementedError: if a function of the step has no forward derivative.
        RuntimeError: if ``compiled`` is True and there is no compiler.
    """
    if not isinstance(objective, ProcessLoss):
        raise TypeError(
            f"sensitivity_gradient needs a ProcessLoss, got {type(objective).__name__}; for any other objective use "
            f"forward_gradient(..., tangents='unit')"
        )
    check_params(params)
    params = {name: p.detach() for name, p in params.items()}
    num_tangents = count_tangents(params, num_tangents, tangents)
    along = sample_tangents(params, num_tangents, tangents, generator)
    loss, jvps = 0, 0
    for moment in sensitivities(objective, params, along, compiled=compiled, progress=progress):
        value, derivatives = _loss_along(objective, params, along, moment)
        if not (value.isfinite() and derivatives.isfinite().all()):
            raise FloatingPointError(_where_it_diverged(objective, params, moment.num_steps))
        loss, jvps = loss + value, jvps + derivatives
    divisor = 1 if tangents == "unit" else num_tangents
    grads = {name: torch.tensordot(jvps.to(v.dtype), v, dims=1) / divisor for name, v in along.items()}
    return GradientEstimate(loss, grads, jvps)


@torch.no_grad()
def sensitivities(
    process: ProcessLoss,
    params: Params,
    tangents: Params,
    *,
    compiled: bool | None = None,
    progress: str | None = "steps",
) -> Iterator[Moment]:
    """Run a process with the derivatives of its state along given tangents, and yield both at its moments.

    Args:
        process: the process.
        params: the point.
        tangents: for each parameter of shape (...) a tensor of shape (K, ...).
        compiled: as for :func:`sensitivity_gradient`.
        progress: as for :func:`sensitivity_gradient`.

    Yields:
        The state after each number of steps in ``process.moments``.

    Raises:
        ValueError: as :func:`sensitivity_gradient`.
        NotImplementedError: as :func:`sensitivity_gradient`.
        RuntimeError: as :func:`sensitivity_gradient`.
    """
    run, done = _Run(process, params, tangents, compiled), 0
    with tqdm(total=process.num_steps, desc=progress, disable=progress is None, delay=2, leave=False) as bar:
        for moment in process.moments:
            while done < moment:
                num = run.advance(done, moment)
                done += num
                bar.update(num)
            yield run.moment(moment)


@torch.no_grad()
def online_gradient(
    objective: ProcessLoss,
    params: Params,
    *,
    elementwise: Sequence[str],
    compiled: bool | None = None,
    progress: str | None = "steps",
) -> GradientEstimate:
    r"""Compute the exact gradient of an element-wise recurrence while its inputs come in, for any number of units.

    Where unit i of the state depends on component i of each parameter alone, the derivatives of all units by their own
    components are one tangent of ones for each parameter, :math:`e_i = \partial z_i / \partial a_i`. At a loss,

    .. math:: \frac{\partial L}{\partial a_i} = \sum_n \frac{\partial L}{\partial z_{ni}}\, e_{ni},

    where :math:`\partial L/\partial z` is the derivative of the loss by the present state: no step of the past is
    needed (Zucchet et al. 2023, *Online learning of long-range dependencies*, arXiv 2305.15947, section 3). It is taken
    by a backward pass through the loss alone, which also gives the gradients of the parameters of a readout.

    Cost: the work of 1 + K runs, K being the number of ``elementwise`` parameters, and the memory of 1 + K states.

    Args:
        objective: the process. Its step uses the ``elementwise`` parameters alone; its loss may use any.
        params: the point.
        elementwise: names of the parameters of the step. Their shapes are the last axes of the state's tensors.
        compiled: as for :func:`sensitivity_gradient`.
        progress: as for :func:`sensitivity_gradient`.

    Returns:
        The exact gradient; ``jvps`` is empty.

    Raises:
        ValueError: if the step mixes units or uses another parameter; checked at the first steps of each call.
        FloatingPointError: as :func:`sensitivity_gradient`.
    """
    check_params(params)
    params = {name: p.detach() for name, p in params.items()}
    ones = _ones(params, elementwise)
    _check_elementwise(objective, params, elementwise, ones)
    grads, total = {name: torch.zeros_like(p) for name, p in params.items()}, 0
    for moment in sensitivities(objective, params, ones, compiled=compiled, progress=progress):
        leaves, spec = tree_flatten(moment.state)
        leaves = [x.detach().clone() for x in leaves]
        own = {name: p.clone() for name, p in params.items()}
        inexact = [x for x in leaves if _is_inexact(x)]
        with requiring_grad([*inexact, *own.values()]), torch.enable_grad():
            loss = objective.loss_at(moment.num_steps, tree_unflatten(leaves, spec), own)
            by_loss = torch.autograd.grad(loss, [*inexact, *own.values()], materialize_grads=True)
        if not all(g.isfinite().all() for g in (loss, *by_loss)):
            raise FloatingPointError(_where_it_diverged(objective, params, moment.num_steps))
        total = total + loss.detach()
        for name, direct in zip(own, by_loss[len(inexact) :], strict=True):
            grads[name] += direct
        eligibility = [e for e in tree_leaves(moment.tangents) if e is not None]
        for k, name in enumerate(elementwise):
            for g, e in zip(by_loss, eligibility, strict=False):
                grads[name] += _sum_to((g.conj() * e[k]).real if e.is_complex() else g * e[k], params[name].shape)
    return GradientEstimate(total, grads, total.new_empty(0))


def reverse_gradient(
    objective: ProcessLoss, params: Params, *, num_checkpoints: int | None = None, num_compiled: int | None = None
) -> GradientEstimate:
    """Compute the gradient of a process by backprop through all its steps: the rival of forward mode.

    Args:
        objective: the process.
        params: the point.
        num_checkpoints: how many states are kept; the steps between them are computed again in the backward pass. None
            to keep everything. The square root of T needs least memory.
        num_compiled: how many steps ``torch.compile`` compiles together; None to run them as they are written.

    Returns:
        The exact gradient; ``jvps`` is empty.
    """
    check_params(params)
    leaves = {name: p.detach() for name, p in params.items()}
    advance, size, many_shapes = objective.advance, objective.num_steps, contextlib.nullcontext()
    if num_compiled is not None:
        # torch.compile counts the shapes of all processes together, and from the ninth on it silently runs eagerly
        many_shapes = torch._dynamo.config.patch(recompile_limit=MAX_SHAPES, fail_on_recompile_limit_hit=True)
        size = check_count("num_compiled", num_compiled)
        if objective.reverse is None:
            objective.reverse = torch.compile(partial(_bare, objective.step), dynamic=False)
        advance = objective.reverse

    def segment(state: Tree, first: int, last: int) -> tuple[Tree, Tensor | int]:
        # The state after some steps, and the loss there if there is one.
        for begin in range(first, last, size):
            end = min(begin + size, last)
            state = advance(state, leaves, 0, objective.inputs_between(begin, end), end - begin)
        return state, objective.loss_at(last, state, leaves) if last in moments else 0

    moments = objective.moments
    stride = objective.num_steps if num_checkpoints is None else -(-objective.num_steps // num_checkpoints)
    borders = sorted({*range(0, moments[-1], stride), *moments, 0})
    with requiring_grad(leaves.values()), many_shapes:
        if num_checkpoints is None:
            total, found = _through_all(objective, leaves, segment, borders)
        else:
            total, found = _by_segments(objective, leaves, segment, borders)
    return GradientEstimate(total, dict(zip(leaves, found, strict=True)), total.new_empty(0))


def _bare(step: Callable, state: Tree, params: Params, first: int, inputs: tuple, num_steps: int) -> Tree:
    # ProcessLoss.advance without its checks, which a compiler cannot follow.
    for i in range(num_steps):
        state = step(state, params, *tree_map(lambda x, i=i: x[i], inputs))
    return state


Segment = Callable[[Tree, int, int], tuple[Tree, "Tensor | int"]]


@torch.enable_grad()
def _through_all(
    process: ProcessLoss, leaves: Params, segment: Segment, borders: list[int]
) -> tuple[Tensor, Sequence[Tensor]]:
    # One backward pass through everything.
    state, total = segment(process.start(leaves), 0, 0)
    for first, last in itertools.pairwise(borders):
        state, loss = segment(state, first, last)
        total = total + loss
    return total.detach(), torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)


def _by_segments(
    process: ProcessLoss, leaves: Params, segment: Segment, borders: list[int]
) -> tuple[Tensor, Sequence[Tensor]]:
    # Keeps the states at the borders, and runs each segment again in the backward pass. torch.utils.checkpoint does the
    # same by hooks that torch.func, which a step may use, does not allow.
    params, pairs = list(leaves.values()), list(itertools.pairwise(borders))
    with torch.no_grad():
        states = [process.start(leaves)]
        for first, last in pairs:
            states.append(segment(states[-1], first, last)[0])
    total, found = 0, [torch.zeros_like(p) for p in params]
    by_state = [torch.zeros_like(x) for x in _parted(states.pop())[0]]  # the gradient by the state after a segment
    for first, last in reversed(pairs):
        values, spec = tree_flatten(states.pop())
        values = [x.detach().clone().requires_grad_(_is_inexact(x)) for x in values]
        before = [x for x in values if x.requires_grad]
        with torch.enable_grad():
            after, loss = segment(tree_unflatten(values, spec), first, last)
            slopes = _slopes(after, loss, by_state, [*before, *params])
        total, by_state = total + (loss.detach() if isinstance(loss, Tensor) else loss), slopes[: len(before)]
        found = [f + g for f, g in zip(found, slopes[len(before) :], strict=True)]
    with torch.enable_grad():
        after, loss = segment(process.start(leaves), 0, 0)
        slopes = _slopes(after, loss, by_state, params)
    return (total + loss).detach(), [f + g for f, g in zip(found, slopes, strict=True)]


def _slopes(after: Tree, loss: Tensor | int, by_state: Sequence[Tensor], inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    # The gradient by what goes into a segment, from the loss and the gradient by the state that comes out.
    for x, g in zip(_parted(after)[0], by_state, strict=True):
        loss = loss + (x * g.conj()).real.sum()
    if not loss.requires_grad:
        return [torch.zeros_like(x) for x in inputs]
    return torch.autograd.grad(loss, inputs, materialize_grads=True)


class _Layout(NamedTuple):
    # How parameters and state lie in a list of tensors, which is what a graph takes: parameters, their tangents, the
    # tensors of the state that have derivatives, their tangents, the others.
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


@dataclasses.dataclass
class _Programs:
    # The compiled chunks of a process, by their length and by the layout of their arguments.
    state: State | None = None
    known: dict[tuple, Callable] = dataclasses.field(default_factory=dict)
    sizes: dict[tuple, int] = dataclasses.field(default_factory=dict)
    is_used: bool = False
    is_refused: bool = False


class _Run:
    # Advances the rows of one run: by compiled chunks of steps, or as they are written.
    def __init__(self, process: ProcessLoss, params: Params, tangents: Params, compiled: bool | None) -> None:
        self._process = process
        self.layout, self.rows = _begin(process, params, tangents)
        self._size, self._programs = EAGER_CHUNK, None
        if self._is_compiled(compiled):
            try:
                self._compile()
            except (ValueError, TypeError):  # of the step itself
                raise
            except Exception as error:
                process.programs.is_refused = True
                warnings.warn(f"the process runs as with compiled=False, because {cause_of(error)}.", stacklevel=6)

    def advance(self, first: int, last: int) -> int:
        """Advance by some steps, at most to ``last``, and return how many."""
        num = min(self._size, last - first)
        if self._programs is not None:
            num = num if num in self._programs else 1
            program, constants = self._programs[num]
            inputs = tree_leaves(self._process.inputs_between(first, first + num)) if self._process.inputs else ()
            found = program(*self.rows, *inputs, *constants)
        else:
            point, tangents, others = self.layout.cut(self.rows)
            steps = self._steps(first, num, others, self._process.inputs_between(first, first + num))
            found = [x.contiguous() for part in _either(self._process, steps, point, tangents) for x in part]
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
            return _parted(self._process.advance(state, params, first, inputs, num))

        return steps

    def _compile(self) -> None:
        programs = self._process.programs
        if programs.state is None or not programs.state.is_current(EMPTY, self._process.step):
            programs.state, programs.known, programs.sizes = State(EMPTY, self._process.step), {}, {}
        key = (tuple(self.layout.names), str(self.layout.spec), *self._active(), *map(describe, self._arguments(1)))
        if key not in programs.sizes:
            one, push = self._record_one()
            gaps = [last - first for first, last in itertools.pairwise([0, *self._process.moments])]
            programs.sizes[key] = size = _chunk_size(gaps, one.num_operations)
            for num in {size} | ({1} if any(gap % size for gap in gaps) else set()):
                recorded = one if num == 1 else self._record(num, push)
                programs.known[key, num] = compiled(recorded, self._arguments(num)), recorded.constants
        self._size = programs.sizes[key]
        self._programs = {num: program for (of, num), program in programs.known.items() if of == key}

    def _arguments(self, num: int) -> list[Tensor]:
        return [*self.rows, *tree_leaves(self._process.inputs_between(0, num))]

    def _record(self, num: int, push: Callable) -> Recorded:
        # A graph of some steps, and of their derivatives by one of the engines.
        spec, num_rows = tree_structure(self._process.inputs_between(0, num)), len(self.rows)

        def steps_of(arguments: Sequence[Tensor]) -> tuple[Callable, Params, Params]:
            point, tangents, others = self.layout.cut(arguments[:num_rows])
            inputs = tree_unflatten(list(arguments[num_rows:]), spec)
            return self._steps(0, num, others, inputs), point, tangents

        def along(*arguments: Tensor) -> list[Tensor]:
            return [x.contiguous() for part in push(*steps_of(arguments)) for x in part]

        def plain(*arguments: Tensor) -> Tree:
            steps, point, _ = steps_of(arguments)
            return steps(point)

        return record_function(along, self._arguments(num), self._process.programs.state, plain, MAX_OPERATIONS)

    def _record_one(self) -> tuple[Recorded, Callable]:
        # A graph of one step, and the engine that suits it best.
        for push in pushforward, stacked_pushforward:
            try:
                recorded = self._record(1, push)
                break
            except NotImplementedError:
                if push is stacked_pushforward:
                    raise
        active = self._active()
        is_small = UNROLLED_CHUNK * len(active) * recorded.num_operations <= MAX_OPERATIONS
        if push is pushforward and is_small and is_elementwise(recorded):
            push = partial(unrolled_pushforward, active=active)
            recorded = self._record(1, push)
        return recorded, push

    def _active(self) -> list[tuple[str, ...]]:
        # The names along which each tangent may be other than zero.
        own = set(self.layout.names)
        tangents = {name: v.reshape(len(v), -1).any(1) for name, v in self.layout.cut(self.rows)[1].items()}
        num_tangents = len(next(iter(tangents.values())))
        return [tuple(name for name, v in tangents.items() if name not in own or v[k]) for k in range(num_tangents)]


EMPTY = nn.Module()


def _begin(process: ProcessLoss, params: Params, tangents: Params) -> tuple[_Layout, list[Tensor]]:
    # The layout, and all that runs at the start. An initial state that no parameter enters has no derivatives.
    leaves, spec = tree_flatten(process.start(params))
    k = len(next(iter(tangents.values())))
    if callable(process.initial):
        function = lambda point: _parted(process.start(point))  # noqa: E731
        state, along, others = _either(process.initial, function, params, tangents)
    else:
        state, others = _parted(process.initial)
        along = [x.new_zeros(k, *x.shape) for x in state]
    rows = [*params.values(), *(tangents[name] for name in params), *state, *along, *others]
    return _Layout(list(params), spec, [*map(_is_inexact, leaves)]), [x.detach().contiguous() for x in rows]


def _either(key: Any, function: Callable, point: Params, tangents: Params) -> tuple[list, list, list]:
    stacked = partial(stacked_pushforward, function, point, tangents)
    return either_engine(key, stacked, partial(pushforward, function, point, tangents))


def _chunk_size(gaps: list[int], num_operations: int) -> int:
    # As many steps as a graph may have, a divisor of all gaps if there is a large one.
    largest = max(1, min(MAX_CHUNK, MAX_OPERATIONS // max(1, num_operations), *(gap for gap in gaps if gap)))
    common = math.gcd(*gaps)
    divisor = max(size for size in range(1, largest + 1) if common % size == 0)
    return divisor if 3 * divisor >= largest else largest


def _loss_along(process: ProcessLoss, params: Params, along: Params, moment: Moment) -> tuple[Tensor, Tensor]:
    # The loss of one state, and its derivatives along the K tangents.
    leaves, spec = tree_flatten(moment.state)
    layout = _Layout(list(params), spec, [*map(_is_inexact, leaves)])
    state, others = _parted(moment.state)
    slopes = [x for x in tree_leaves(moment.tangents) if x is not None]
    point, tangents, _ = layout.cut([*params.values(), *(along[name] for name in params), *state, *slopes])

    def loss(point: Params) -> tuple[list[Tensor], list[Tensor]]:
        own, state = layout.uncut(point, others)
        return [process.loss_at(moment.num_steps, state, own)], []

    (value,), (derivatives,), _ = _either(process.loss, loss, point, tangents)
    return value, derivatives


def _where_it_diverged(process: ProcessLoss, params: Params, moment: int) -> str:
    # Runs the process once more, without derivatives, to find the first state that is not finite.
    values = ", ".join(f"{name} = {_short(p)}" for name, p in params.items())
    state = process.start(params)
    for t in range(moment + 1):
        for path, x in tree_flatten_with_path(state)[0]:
            if _is_inexact(x) and not x.isfinite().all():
                where = f"state{keystr(path)} is {x[~x.isfinite()][0].item()} after {t} of {process.num_steps} steps"
                return (
                    f"{where}, with {values}. Either the process diverges there, and needs smaller steps or another "
                    f"start, or a parameter has left the domain of a function of the step"
                )
        if t < moment:
            state = process.advance(state, params, t, process.inputs_between(t, t + 1), 1)
    return (
        f"all states up to step {moment} are finite, but the loss there or its derivative is not, with {values}: see "
        f"the loss, and functions without a finite derivative, such as sqrt at 0"
    )


def _short(p: Tensor) -> str:
    values = [f"{x:.4g}" for x in p.flatten()[:4].tolist()]
    return values[0] if p.dim() == 0 else f"[{', '.join(values)}{', ...' if p.numel() > 4 else ''}]"


def _ones(params: Params, elementwise: Sequence[str]) -> Params:
    # One tangent for each name, of ones in its parameter and zeros elsewhere.
    if not elementwise or not set(elementwise) <= params.keys():
        raise ValueError(f"elementwise must name parameters, among {', '.join(params)}, got {list(elementwise)}")
    rows = torch.eye(len(elementwise))
    return {
        name: torch.stack(
            [torch.full_like(p, row[elementwise.index(name)] if name in elementwise else 0) for row in rows]
        )
        for name, p in params.items()
    }


def _check_elementwise(process: ProcessLoss, params: Params, elementwise: Sequence[str], ones: Params) -> None:
    # Along signs of its components, a parameter of an element-wise step moves each unit by the sign of its own one.
    num = min(3, process.num_steps)
    draw = runtime.generator(0, next(iter(params.values())).device, "signs of units")

    def random(x: Tensor) -> Tensor:  # zeros, such as the first inputs often are, hide what a step does
        return torch.randn(x.shape, generator=draw, dtype=x.dtype, device=x.device) if _is_inexact(x) else x

    initial, inputs = tree_map(random, process.start(params)), tree_map(random, process.inputs_between(0, num))
    short = ProcessLoss(process.step, initial, process.loss, num, inputs=inputs[0] if inputs else None)
    signs = {
        name: torch.randint(0, 2, params[name].shape, generator=draw).to(params[name]) * 2 - 1 for name in elementwise
    }
    signs |= {name: torch.zeros_like(p) for name, p in params.items() if name not in signs}
    other = {name: torch.randn(p.shape, generator=draw).to(p) for name, p in params.items()}
    used = {name: torch.zeros_like(p) if name in elementwise else other[name] for name, p in params.items()}
    along = {name: torch.cat([v, v * signs[name], used[name].unsqueeze(0)]) for name, v in ones.items()}
    run = _Run(short, params, along, False)
    run.advance(0, num)
    for path, x in tree_flatten_with_path(run.moment(num).tangents)[0]:
        if x is None:
            continue
        if x[-1].any():
            raise ValueError(f"the step uses a parameter that elementwise does not name, {list(elementwise)}")
        for k, name in enumerate(elementwise):
            try:
                expected = x[k] * signs[name]
            except RuntimeError:
                expected = None
            if expected is None or not torch.allclose(
                x[len(elementwise) + k], expected, rtol=1e-4, atol=1e-6, equal_nan=True
            ):
                raise ValueError(
                    f"the step is not element-wise: unit i of state{keystr(path)} depends on other components of "
                    f"{name!r} than component i. Use sensitivity_gradient, or reverse_gradient"
                )


def _parted(state: Tree) -> tuple[list[Tensor], list[Tensor]]:
    # The tensors that have derivatives, and the others.
    leaves = tree_leaves(state)
    return [x for x in leaves if _is_inexact(x)], [x for x in leaves if not _is_inexact(x)]


def _is_inexact(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _layout(state: Tree) -> list[tuple]:
    return [
        (keystr(path), tuple(getattr(x, "shape", ())), getattr(x, "dtype", type(x)))
        for path, x in tree_flatten_with_path(state)[0]
    ]


def _described(layout: list[tuple]) -> str:
    return ", ".join(f"state{path} {shape} {str(dtype).removeprefix('torch.')}" for path, shape, dtype in layout)


def _sum_to(x: Tensor, shape: torch.Size) -> Tensor:
    return x.sum_to_size(shape) if x.shape != shape else x
