"""A process: a state that a function advances for many steps, with a loss on the way or at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves, tree_map

from fwdlib.checks import check_count
from fwdlib.methods.programs import Programs
from fwdlib.objectives import check_scalar
from fwdlib.tangents import Params

Tree = Any
"""A tensor, or a nest of tuples, lists and dicts of tensors."""


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
        TypeError: if the state has no tensors, or something else than tensors, or the observations are no dict.

    Example:
        Exponential decay, solved by Euler's method; the gradient of the end by the rate:

        >>> import torch
        >>> from fwdlib.methods.sensitivity import sensitivity_gradient
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
        self.observations = None if observations is None else _by_moment(observations, num_steps)
        self.programs = Programs()
        self.reverse: Callable | None = None  # the steps as torch.compile has them
        for path, x in tree_flatten_with_path(self.inputs)[0]:
            if not isinstance(x, Tensor) or x.dim() == 0 or len(x) != num_steps:
                raise ValueError(
                    f"inputs{keystr(path[1:])} must be a tensor of shape ({num_steps}, ...), a row for each step, got "
                    f"{tuple(x.shape) if isinstance(x, Tensor) else repr(x)}"
                )
        for moment, observed in (self.observations or {}).items():
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
        """Return the state before the first step, a copy, so that a step in place leaves the given one as it is.

        Raises:
            TypeError: if it is something else than tensors.
        """
        with _named(params):
            state = self.initial(params) if callable(self.initial) else self.initial
        for path, x in tree_flatten_with_path(state)[0]:
            if not isinstance(x, Tensor):
                raise TypeError(f"the initial state{keystr(path)} must be a tensor, got {type(x).__name__}")
        if not tree_leaves(state):
            raise TypeError("the initial state has no tensors")
        return tree_map(torch.clone, state)

    def advance(self, state: Tree, params: Params, first: int, inputs: tuple, num_steps: int) -> Tree:
        """Return the state after some steps.

        Args:
            state: before them.
            params: the parameters.
            first: how many steps came before, for messages.
            inputs: those of these steps, from :meth:`inputs_between`.
            num_steps: how many.

        Raises:
            ValueError: if a step changes the structure, a shape or a dtype of the state, or reads a parameter that
                there is not.
        """
        before = _layout(state)
        with _named(params):
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
        observed = [] if self.observations is None else [self.observations[moment]]
        with _named(params):
            return check_scalar(self.loss(state, params, *observed))

    def __call__(self, params: Params) -> Tensor:
        """Run all steps and return the sum of the losses, a scalar."""
        state, total, done = self.start(params), 0, 0
        for moment in self.moments:
            state = self.advance(state, params, done, self.inputs_between(done, moment), moment - done)
            total, done = total + self.loss_at(moment, state, params), moment
        return total


def parted(state: Tree) -> tuple[list[Tensor], list[Tensor]]:
    """Return the tensors of a state that have derivatives, and the others."""
    leaves = tree_leaves(state)
    return [x for x in leaves if is_inexact(x)], [x for x in leaves if not is_inexact(x)]


def is_inexact(x: Tensor) -> bool:
    """Return whether a tensor has derivatives."""
    return x.is_floating_point() or x.is_complex()


def _by_moment(observations: Mapping[int, Any], num_steps: int) -> dict[int, Any]:
    if not isinstance(observations, Mapping):
        raise TypeError(
            f"observations must be a dict from a number of steps to what was observed, got "
            f"{type(observations).__name__}; of a list after each step make one by dict(enumerate(observations, 1))"
        )
    for moment in observations:
        if isinstance(moment, bool) or not isinstance(moment, Integral) or not 0 <= moment <= num_steps:
            raise ValueError(f"observations are by number of steps, from 0 to {num_steps}, got {moment!r}")
    return {int(moment): observations[moment] for moment in sorted(observations)}


@contextmanager
def _named(params: Params) -> Iterator[None]:
    # For functions that look up what is not there.
    try:
        yield
    except KeyError as error:
        if error.args[:1] and error.args[0] in params:
            raise
        raise ValueError(
            f"a function of the process looked up {error} and did not find it; params has {', '.join(params)}"
        ) from error


def _layout(state: Tree) -> list[tuple]:
    return [
        (keystr(path), tuple(getattr(x, "shape", ())), getattr(x, "dtype", type(x)))
        for path, x in tree_flatten_with_path(state)[0]
    ]


def _described(layout: list[tuple]) -> str:
    return ", ".join(f"state{path} {shape} {str(dtype).removeprefix('torch.')}" for path, shape, dtype in layout)
