"""The step of a process with the values that it reads now, and what is compiled of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from fwdlib.objectives import is_same
from fwdlib.stacked.graph import Recorded, compiled, run_without_values
from fwdlib.stacked.guarded import Guarded, Refused, call_in, changed_by_trace
from fwdlib.tangents import Params


class Step:
    """A step with the Python values that it read when torch traced it, and the programs made with these.

    Args:
        graph: of :func:`one_step`.
        examples: the tensors that it reads now: parameters, state, inputs, and others.

    Raises:
        Refused: if the step changes anything but its state, or reads values of tensors.
    """

    def __init__(self, graph: GraphModule, examples: Sequence[Tensor]) -> None:
        if (name := changed_by_trace()) is not None:
            raise Refused(f"the step changes something outside of its state, which torch's tracer calls {name}")
        (found, given), places = call_in(graph, end)
        self._places = [i for node, i in places.items() if node not in given]
        self.num_results = len(found)
        self.others: list[Tensor] = []
        """What it reads besides parameters, state and inputs: the tensors as they were found last."""
        self.programs: dict[tuple, Callable[..., Any]] = {}
        """Compiled chunks of steps, by the layout of their arguments and their length."""
        self.plans: dict[tuple, tuple[int, Callable]] = {}
        """The length of a chunk and how it is differentiated, by the layout of its arguments."""
        self.elementwise: set[tuple] = set()
        """The parameters for which the step was found to be element-wise, with all shapes."""
        run_without_values(partial(_run_without_writes, graph), examples)

    def find(self, tensors: Sequence[Tensor]) -> None:
        """Note the tensors that the step reads now."""
        self.others = [tensors[i] for i in self._places]

    def compile(self, recorded: Recorded, arguments: Sequence[Tensor]) -> Callable[..., Any]:
        """Return a recorded chunk of steps as machine code, which reads the others as they are at the time.

        Args:
            recorded: made of the step as it is now.
            arguments: shapes and dtypes of its arguments.
        """
        program = compiled(recorded, arguments)
        places = [next((i for i, x in enumerate(self.others) if is_same(x, c)), None) for c in recorded.constants]

        def run(*given: Tensor) -> Any:
            constants = zip(places, recorded.constants, strict=True)
            return program(*given, *(c if i is None else self.others[i] for i, c in constants))

        return run


def _run_without_writes(graph: GraphModule, *tensors: Tensor) -> None:
    versions = [x._version for x in tensors]
    graph(*tensors)
    if versions != [x._version for x in tensors]:
        raise Refused("the step writes into a tensor that it was given")


class Programs:
    """What is compiled of a process: a step for each state of the Python values that it reads."""

    def __init__(self) -> None:
        self.is_used = self.is_refused = False
        self._steps: Guarded | None = None
        self._found: Step | None = None

    def __deepcopy__(self, memo: dict) -> Programs:
        """Return one that is empty: machine code cannot be copied."""
        return Programs()

    def __reduce__(self) -> tuple:
        """Return what is pickled, likewise."""
        return Programs, ()

    def step(self, step: Callable, state: Any, params: Params, inputs: tuple, *, trace: bool = True) -> Step | None:
        """Return the step as it is now; None if there is none that was traced.

        Args:
            step: of the process.
            state: like any state.
            params: like the parameters.
            inputs: those of a step.
            trace: whether to trace it if there is none.

        Raises:
            Refused: if torch.compile is switched off.
            Exception: if it cannot be traced.
        """
        if self._steps is None:
            self._steps = Guarded(one_step, self._compile, end)
        self._found, arguments = None, (step, state, params, inputs)
        if self._steps(*arguments) is None and trace and self._steps.trace(*arguments) is None:
            raise Refused("torch.compile is switched off")
        return self._found

    def _compile(self, graph: GraphModule, examples: Sequence[Tensor]) -> Callable:
        found = Step(graph, examples)

        def note(*tensors: Tensor) -> Sequence[Tensor]:
            found.find(tensors)
            self._found = found
            return [tensors[0]] * found.num_results  # nobody reads them

        return note


def one_step(step: Callable, state: Any, params: Params, inputs: tuple) -> tuple[Tensor, ...]:
    """Take a step: what torch traces."""
    given = [*params.values(), *tree_leaves(state), *tree_leaves(inputs)]
    return end(tree_leaves(step(state, params, *inputs)), given)


def end(results: list[Tensor], given: list[Tensor]) -> tuple[Tensor, ...]:
    """Stand at the end of a traced step, and tell what are its results and what it was given."""
    return tuple(x.clone() if any(x is y for y in given) else x for x in results)
