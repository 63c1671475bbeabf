"""Functions that torch.compile traces, so that a change of any Python value that they read is noticed.

A graph of a model's step is right as long as the model's Python code would do the same again. Torch's tracer follows
this code, and guards every value that it reads; here it does so as strictly as it can.
"""

from __future__ import annotations

import functools
import gc
import inspect
import operator
import os
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from types import CodeType, FunctionType
from typing import Any, NamedTuple

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
    "trace_numpy": False,  # its random numbers would be lost
    "allow_rnn": True,
    "trace_autograd_ops": True,
    "recompile_limit": MAX_GRAPHS,
    "accumulated_recompile_limit": 2**30,
}
"""Options of torch's tracer, as far as its version has them."""

_one_at_a_time = threading.RLock()  # the options hold for all threads
GLOBAL_HOOKS = nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks
"""Those of all modules, of which torch's tracer would not notice a new one."""

DESCRIPTORS: dict[Any, str] = {
    (staticmethod, classmethod): "__func__",
    property: "fget",
    (functools.cached_property, functools.partialmethod): "func",
}
"""Where they have their function."""
SPECIAL = "__call__", "_call_impl", "__getattr__", "__getattribute__"
"""Methods that torch's tracer does not enter."""

Backend = Callable[[GraphModule, Sequence[Tensor]], Callable]

FULL = f"there are {MAX_GRAPHS} graphs already, for other shapes of tensors or Python values, which are used further"
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
    """How many graphs were made, of at most MAX_GRAPHS."""

    def __init__(self, function: Callable, backend: Backend, opaque: Callable) -> None:
        import torch._dynamo as dynamo

        dynamo.allow_in_graph(opaque)
        self._source, self._backend = function, backend
        self._start()

    def _start(self) -> None:
        function = self._source

        def guarded(*args: Any) -> Any:
            if not torch.compiler.is_dynamo_compiling():
                return None  # torch runs the function as it is written where there is no graph
            return function(*args)

        code = guarded.__code__.replace()  # torch keeps the graphs by the code
        own = FunctionType(code, guarded.__globals__, guarded.__name__, closure=guarded.__closure__)
        self._function = own
        self._trace = torch.compile(own, backend=self._compile, fullgraph=True, dynamic=False)
        self._names: dict[type, set[str]] = {}
        self._methods: list[_Methods] = []

    def _compile(self, graph: GraphModule, examples: Sequence[Tensor]) -> Callable:
        _check_followed(graph)
        names = _traced_methods()
        with torch._guards.tracing(None):  # what the backend traces and compiles is none of this trace's business
            found = self._backend(graph, examples)
        self.num_graphs += 1
        for cls in names:
            self._names.setdefault(cls, set()).update(names[cls])
        self._methods = [_Methods(cls, read := operator.attrgetter(*n), read(cls)) for cls, n in self._names.items()]
        return found

    @property
    def is_full(self) -> bool:
        """Whether there are as many graphs as there may be."""
        return self.num_graphs >= MAX_GRAPHS

    def __call__(self, *args: Any) -> Any:
        """Run the graph that is right for the arguments, in grad mode, and return its result; None if there is none."""
        if any(GLOBAL_HOOKS):
            return None
        if self._have_methods_changed():
            self._start()
            return None
        enabled = torch.is_grad_enabled()
        torch._C._set_grad_enabled(True)
        before = set_eval_frame(False)  # as torch._dynamo.run does, in a third of the time
        try:
            return self._function(*args)
        finally:
            set_eval_frame(before)
            torch._C._set_grad_enabled(enabled)

    def _have_methods_changed(self) -> bool:
        try:
            for cls, read, found in self._methods:
                if read(cls) != found:
                    return True
        except AttributeError:  # one was deleted
            return True
        return False

    def trace(self, *args: Any) -> Any:
        """Run the function likewise, with a new graph if there is none; return None where torch is told not to trace.

        Raises:
            Refused: if there are as many graphs as there may be, or hooks are registered for all modules.
            Exception: if it cannot be one graph.
        """
        if self.is_full:
            raise Refused(FULL)
        if any(GLOBAL_HOOKS):
            raise Refused("a hook is registered for all modules, which torch's tracer would not notice")
        import torch._dynamo as dynamo

        config = dynamo.config
        strict = {name: value for name, value in STRICT.items() if hasattr(config, name)}
        with _one_at_a_time, config.patch(strict), torch.enable_grad():
            return self._trace(*args)


class _Methods(NamedTuple):
    # Methods of a class as they were traced. Torch guards what an object has, but not what its class has.
    cls: type
    read: Callable[[type], Any]
    found: Any


def _traced_methods() -> dict[type, list[str]]:
    # The names of those that are called in the trace, by class: of the classes of what it reads, and of those that
    # define them, since torch's tracer forgets objects that the trace makes for itself.
    output = _output()
    codes, classes, found = set(output.tracing_context.traced_code), set(), {}
    for cls in [x for x in gc.get_objects() if issubclass(type(x), type)]:
        if any(_code_of(attribute) in codes for attribute in vars(cls).values()):
            classes.add(cls)
    for variable in output.side_effects.id_to_variable.values():
        value = vars(variable).get("value")
        classes.update((value if isinstance(value, type) else type(value)).__mro__)
    for cls in classes:
        names = [name for name in dir(cls) if _code_of(inspect.getattr_static(cls, name)) in codes]
        names += SPECIAL if issubclass(cls, nn.Module) else ()
        if names:
            found[cls] = names
    return found


def _code_of(attribute: Any) -> CodeType | None:
    # That of a function, or of one behind a descriptor or a decorator.
    for kinds, name in DESCRIPTORS.items():
        if isinstance(attribute, kinds):
            attribute = getattr(attribute, name)
    return getattr(inspect.unwrap(attribute), "__code__", None) if isinstance(attribute, FunctionType) else None


def call_in(graph: GraphModule, function: Callable) -> tuple[tuple, dict[Node, int]]:
    """Return the arguments of a function's only call in a graph, as nodes, and the places of the graph's inputs."""
    (call,) = [node for node in graph.graph.nodes if node.target is function]
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    return call.args, {node: i for i, node in enumerate(inputs)}


def changed_by_trace() -> str | None:
    """Return, inside a backend, torch's name of something in Python that the traced function changes, or None."""
    from torch._dynamo.variables.base import AttributeMutationExisting, ValueMutationExisting

    effects = _output().side_effects
    existing = AttributeMutationExisting, ValueMutationExisting
    for variable in effects.id_to_variable.values():
        if isinstance(variable.mutation_type, existing) and effects.is_modified(variable):
            name = variable.source.name
            return name() if callable(name) else name
    return None


def _check_followed(graph: GraphModule) -> None:
    # Refuse what torch's tracer takes for a constant, although it may change.
    from torch._dynamo.variables.lists import DequeVariable
    from torch._dynamo.variables.misc import RandomVariable

    output = _output()
    variables = output.side_effects.id_to_variable.values()
    if output.random_calls or any(isinstance(variable, RandomVariable) for variable in variables):
        raise Refused("the forward pass uses Python's random numbers")
    if any(isinstance(x, DequeVariable) and output.side_effects.is_modified(x) for x in variables):
        raise Refused("the forward pass changes a deque, whose greatest length torch's tracer forgets")
    if os.getenv.__code__ in output.tracing_context.traced_code:
        raise Refused("the forward pass calls os.getenv; read os.environ")
    for cached in _cached_functions():
        if cached.__code__ in output.tracing_context.traced_code:
            raise Refused(f"the forward pass calls {cached.__qualname__}, whose results functools.lru_cache keeps")
    for node in graph.graph.nodes:
        name = getattr(node.target, "__name__", "")
        if name == "autograd_function_apply":
            raise Refused("the forward pass calls a torch.autograd.Function")
        if "_data_attr" in name:
            raise Refused("the forward pass reads or writes x.data; use torch.no_grad()")
        value = node.meta.get("example_value")
        if node.op.startswith("call_") and isinstance(value, (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)):
            raise Refused(READS_VALUES)


def _cached_functions() -> Iterable[FunctionType]:
    # Those under functools.lru_cache, which torch's tracer calls anew each time; not those of torch and Python.
    wrappers = [x for x in gc.get_objects() if type(x) is functools._lru_cache_wrapper]
    functions = (inspect.unwrap(wrapper) for wrapper in wrappers)
    others = {"torch", *sys.stdlib_module_names}
    return [f for f in functions if isinstance(f, FunctionType) and f.__module__.partition(".")[0] not in others]


def _output() -> Any:
    # What torch's tracer knows of the trace that runs.
    from torch._dynamo.symbolic_convert import InstructionTranslator

    return InstructionTranslator.current_tx().output
