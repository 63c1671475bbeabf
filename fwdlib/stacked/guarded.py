"""Functions that torch.compile traces, so that a change of any Python value that they read is noticed.

A graph of a model's step is right as long as the model's Python code would do the same again. Torch's tracer follows
this code, and guards every value that it reads; here it does so as strictly as it can.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import set_eval_frame
from torch.fx import GraphModule, Node

MAX_GRAPHS = 8
"""How many graphs a function may have, before no more are made."""
STRICT = {
    # guards that torch leaves away for speed
    "skip_nnmodule_hook_guards": False,
    "skip_no_tensor_aliasing_guards_on_parameters": False,
    "skip_tensor_guards_with_matching_dict_tags": False,
    "assume_dunder_attributes_remain_unchanged": False,
    # a custom derivative and numpy's random numbers would be lost
    "capture_autograd_function": False,
    "trace_numpy": False,
    "allow_rnn": True,
    "trace_autograd_ops": True,
    "recompile_limit": MAX_GRAPHS,
    "accumulated_recompile_limit": 2**30,
}
"""Options of torch's tracer, as far as its version has them."""

_one_at_a_time = threading.RLock()  # the options hold for all threads
GLOBAL_HOOKS = nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks
"""Those of all modules, of which torch's tracer would not notice a new one."""

Backend = Callable[[GraphModule, Sequence[Tensor]], Callable]


READS_VALUES = "the Python code depends on the values of a tensor, as .item(), bool() and len(torch.nonzero()) do"


class Refused(Exception):
    """A function cannot be one graph; the message says why."""


class Guarded:
    """A function with one graph for each state of the Python values that it reads.

    Args:
        function: of any values. Its code is traced by torch.compile as one graph.
        backend: takes a graph of torch's functions and the tensors that it reads now; returns what runs in its place.
        opaque: a function that stays one call in the graph.
    """

    num_graphs = 0
    """How many graphs there are."""

    def __init__(self, function: Callable, backend: Backend, opaque: Callable) -> None:
        import torch._dynamo as dynamo

        def guarded(*args: Any) -> Any:
            if not torch.compiler.is_dynamo_compiling():
                return None  # torch runs the function as it is written where there is no graph
            return function(*args)

        def counted(graph: GraphModule, examples: Sequence[Tensor]) -> Callable:
            _check_followed(graph)
            with torch._guards.tracing(None):  # what the backend traces and compiles is none of this trace's business
                found = backend(graph, examples)
            self.num_graphs += 1
            return found

        dynamo.allow_in_graph(opaque)
        code = guarded.__code__.replace()  # torch keeps the graphs by the code
        own = FunctionType(code, guarded.__globals__, guarded.__name__, closure=guarded.__closure__)
        self._function = own
        self._trace = torch.compile(own, backend=counted, fullgraph=True, dynamic=False)

    def __call__(self, *args: Any) -> Any:
        """Run the graph that is right for the arguments, in grad mode, and return its result; None if there is none."""
        if any(GLOBAL_HOOKS):
            return None
        enabled = torch.is_grad_enabled()
        torch._C._set_grad_enabled(True)
        before = set_eval_frame(False)  # as torch._dynamo.run does, in a third of the time
        try:
            return self._function(*args)
        finally:
            set_eval_frame(before)
            torch._C._set_grad_enabled(enabled)

    def trace(self, *args: Any) -> Any:
        """Run the function likewise, with a new graph if there is none; return None where torch is told not to trace.

        Raises:
            Refused: if hooks are registered for all modules.
            Exception: if it cannot be one graph.
        """
        if any(GLOBAL_HOOKS):
            raise Refused("a hook is registered for all modules, which torch's tracer would not notice")
        import torch._dynamo as dynamo

        config = dynamo.config
        strict = {name: value for name, value in STRICT.items() if hasattr(config, name)}
        with _one_at_a_time, config.patch(strict), torch.enable_grad():
            return self._trace(*args)


def call_in(graph: GraphModule, function: Callable) -> tuple[tuple, dict[Node, int]]:
    """Return the arguments of a function's only call in a graph, as nodes, and the places of the graph's inputs."""
    (call,) = [node for node in graph.graph.nodes if node.target is function]
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    return call.args, {node: i for i, node in enumerate(inputs)}


def changed_by_trace() -> str | None:
    """Return, inside a backend, the name of something in Python that the traced function changes, or None."""
    from torch._dynamo.symbolic_convert import InstructionTranslator
    from torch._dynamo.variables.base import AttributeMutationExisting, ValueMutationExisting

    effects = InstructionTranslator.current_tx().output.side_effects
    existing = AttributeMutationExisting, ValueMutationExisting
    for variable in effects.id_to_variable.values():
        if isinstance(variable.mutation_type, existing) and effects.is_modified(variable):
            name = variable.source.name
            return name() if callable(name) else name
    return None


def _check_followed(graph: GraphModule) -> None:
    # Refuse what torch's tracer takes for a constant, although it may change.
    from torch._dynamo.symbolic_convert import InstructionTranslator
    from torch._dynamo.variables.lists import DequeVariable
    from torch._dynamo.variables.misc import RandomVariable

    output = InstructionTranslator.current_tx().output
    variables = output.side_effects.id_to_variable.values()
    if output.random_calls or any(isinstance(variable, RandomVariable) for variable in variables):
        raise Refused("the forward pass uses Python's random numbers")
    if any(isinstance(x, DequeVariable) and output.side_effects.is_modified(x) for x in variables):
        raise Refused("the forward pass changes a deque, whose greatest length torch's tracer forgets")
    if os.getenv.__code__ in output.tracing_context.traced_code:
        raise Refused("the forward pass calls os.getenv; read os.environ")
    for node in graph.graph.nodes:
        if "_data_attr" in getattr(node.target, "__name__", ""):
            raise Refused("the forward pass reads or writes x.data; use torch.no_grad()")
        value = node.meta.get("example_value")
        if node.op.startswith("call_") and isinstance(value, (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)):
            raise Refused(READS_VALUES)
