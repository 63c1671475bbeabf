"""A training step of plain SGD with the stacked forward gradient, compiled to one graph where that is right."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Hashable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fwdlib import runtime
from fwdlib.checks import check_choice, check_count, check_positive
from fwdlib.objectives import BatchLoss, ClosureLoss, ModelLoss, check_objective, swapped
from fwdlib.stacked.batches import count_examples, describe, flatten_batch, with_leaves
from fwdlib.stacked.estimator import evaluate
from fwdlib.stacked.graph import CompiledStep, CountedSigns, Refused, cause_of, how_large, record, write_assigned
from fwdlib.stacked.perturbations import PERTURBATIONS, DrawSigns
from fwdlib.stacked.state import State
from fwdlib.tangents import Params, random_signs

MAX_OPERATIONS = 1_000
"""Larger steps, which take more than half a minute to compile, are compiled only on request."""
MAX_STATES = 8
"""How many different states of a model's Python values the step follows, before it stops compiling; likewise of the
values and the structure of a batch."""

_OPTIONS: dict[str, Callable[[str, Any], Any]] = {
    "learning_rate": lambda name, value: 0.0 if value == 0 else check_positive(name, value),  # 0 ends a schedule
    "num_tangents": check_count,
    "tangents": partial(check_choice, allowed=PERTURBATIONS),
}


class SGDStep:
    """A step of plain SGD with the stacked forward gradient, compiled to one graph if there is a C++ compiler.

    Small models gain most, because their calls of torch cost more than the arithmetic. The second call for each shape
    of batch compiles the step, which takes seconds to half a minute; the first one, and shapes that occur once, run as
    with ``compiled=False``.

    A compiled step does what the model's code would do. It follows the Python values that the model and the loss read,
    such as ``model.training`` or an attribute that you set between two steps, and compiles anew when they change.

    What cannot be compiled runs as with ``compiled=False``, with the same numbers, after one warning that says why: a
    branch on the values of a tensor, ``.item()``, shapes that depend on values, a counter in Python, TorchScript, an
    autocast around the step, or a graph so large that it takes more than half a minute to compile.

    Args:
        model: the step updates its trainable parameters in place.
        loss: ``(logits, targets) -> scalar`` for ``step(inputs, targets)``; ``(model, batch) -> scalar`` for
            ``step(batch)``, where the batch is a tensor or any nest of dicts, lists and tuples.
        learning_rate: the learning rate of SGD; set the attribute of that name to change it.
        num_tangents: K.
        tangents: ``"rank-one"``, ``"per-example"`` or ``"activity"``.
        compiled: whether to compile; None to compile if there is a compiler and it takes less than half a minute.
        generator: the source of the signs; None for torch's global generator.

    Raises:
        ValueError: if an argument is out of its range.
        RuntimeError: if ``compiled`` is True and there is no C++ compiler.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> step = SGDStep(model, learning_rate=0.1, compiled=False)
        >>> loss = step(torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1]))
        >>> loss.shape
        torch.Size([])

        Any model and any batch, with a loss that calls the model:

        >>> model = nn.Bilinear(2, 2, 1)
        >>> step = SGDStep(
        ...     model, lambda model, batch: model(**batch).square().mean(), learning_rate=0.1, compiled=False
        ... )
        >>> loss = step({"input1": torch.randn(5, 2), "input2": torch.randn(5, 2)})
        >>> loss.shape
        torch.Size([])
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor] = F.cross_entropy,
        *,
        learning_rate: float,
        num_tangents: int = 1,
        tangents: str = "rank-one",
        compiled: bool | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self.model = model
        self.loss = loss
        self.learning_rate = check_positive("learning_rate", learning_rate)
        self.num_tangents = num_tangents
        self.tangents = tangents
        self.generator = generator
        self.compiled = runtime.has_compiler() if compiled is None else compiled
        if self.compiled and not runtime.has_compiler():
            raise RuntimeError(
                "compiled=True needs a C++ compiler, and none was found. Install g++ or clang++, name a compiler in "
                "the environment variable CXX, or pass compiled=False."
            )
        self._max_operations = MAX_OPERATIONS if compiled is None else None
        self._states: list[State] = []
        self._current: int | None = None  # which of them
        # by conditions; an int is the number of signs of a first, eager step; None: there can be no graph
        self._graphs: dict[tuple, CompiledStep | int | None] = {}
        self._structures: set[Hashable] = set()  # of batches, with their Python values
        self._warned: set[str] = set()

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; options of the step are checked."""
        super().__setattr__(name, _OPTIONS[name](name, value) if name in _OPTIONS else value)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy has: all but the graphs, which belong to this model."""
        return vars(self) | {"_states": [], "_current": None, "_graphs": {}}

    @torch.no_grad()
    def __call__(self, *batch: Any) -> Tensor:
        """Take one step and return the loss before it, a scalar.

        Args:
            batch: ``inputs`` of shape (B, ...) and ``targets``; or one batch of any kind.

        Raises:
            TypeError: if it is called with other arguments, or as :func:`fwdlib.stacked.estimator.stacked_gradient`.
            ValueError: as :func:`fwdlib.stacked.estimator.stacked_gradient`.
            NotImplementedError: likewise, or if a parameter has hooks, for which there is no gradient.
        """
        found = self._conditions(batch) if self.compiled else None
        if found is None:
            return self._eager(batch, partial(random_signs, generator=self.generator))
        key, leaves = found
        _refuse_hooks(self._states[self._current].trainable.values())
        graph = self._graphs.get(key)
        if isinstance(graph, int):
            graph = self._graphs[key] = self._compile(batch, leaves, graph)
        if graph is None:
            count = CountedSigns(self.generator)
            loss = self._eager(batch, count)
            self._graphs.setdefault(key, count.total)
            return loss
        return graph(self._states[self._current].tensors, leaves, self.learning_rate, self.generator)

    def _conditions(self, batch: tuple) -> tuple[tuple, list[Tensor]] | None:
        # What a graph of the step depends on, and the tensors of the batch; None if there can be no graph.
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda") or torch.is_inference_mode_enabled():
            self._warn_eager("it is called under torch.autocast or torch.inference_mode")
            return None
        if (current := self._follow_state()) is None:
            return None
        try:
            leaves, structure = flatten_batch(batch)
        except Refused as refusal:
            self._warn_eager(str(refusal))
            return None
        if structure not in self._structures:
            if len(self._structures) == MAX_STATES:
                self._warn_eager(
                    f"the Python values or the structure of the batch keep changing, so far {MAX_STATES} times; pass "
                    f"numbers that change as tensors"
                )
                return None
            self._structures.add(structure)
        options = self.tangents, self.num_tangents, torch.get_default_dtype()
        return (current, structure, options, *map(describe, leaves)), leaves

    def _follow_state(self) -> int | None:
        if self._current is not None and self._states[self._current].is_current(self.model, self.loss):
            return self._current
        try:
            state = State(self.model, self.loss)
        except (TypeError, RuntimeError) as error:
            return self._stop_compiling(str(error))
        for i, known in enumerate(self._states):
            if known.equals(state):
                self._states[i], self._current = state, i
                return i
        if len(self._states) == MAX_STATES:
            name = self._states[self._current].difference(state)
            return self._stop_compiling(f"{name} keeps changing, so far {MAX_STATES} times")
        self._states.append(state)
        self._current = len(self._states) - 1
        return self._current

    def _stop_compiling(self, reason: str) -> None:
        self._warn_eager(reason)
        self.compiled = False
        self._states, self._graphs = [], {}

    def _compile(self, batch: tuple, leaves: list[Tensor], num_signs: int) -> CompiledStep | None:
        state = self._states[self._current]
        try:
            signs = random_signs((num_signs,), state.tensors[0], torch.Generator(state.tensors[0].device))
            recorded = record(*self._recordable(batch, state), state, leaves, signs, self._max_operations)
            if recorded.num_operations > MAX_OPERATIONS:
                self._warn(f"SGDStep compiles a large step: {how_large(recorded.num_operations)}.")
            return CompiledStep(recorded, state.tensors, leaves, signs)
        except Exception as error:
            self._warn_eager(cause_of(error))
            return None

    def _recordable(self, batch: tuple, state: State) -> tuple[Callable, Callable]:
        # The step, and the loss alone, as functions of the model's tensors and those of the batch.
        def cut(tensors: list[Tensor]) -> list[Params]:
            rest = iter(tensors)
            return [{name: next(rest) for name in of} for of in (state.trainable, state.frozen, state.buffers)]

        def step(tensors: list[Tensor], leaves: list[Tensor], rate: Tensor, draw_signs: DrawSigns) -> Tensor:
            params, frozen, buffers = cut(tensors)
            given = dict(buffers)
            with swapped(self.model, frozen, {}):
                loss = self._step(self._objective(with_leaves(batch, leaves)), params, buffers, rate, draw_signs)
            write_assigned(given, buffers)
            return loss

        def loss_alone(tensors: list[Tensor], leaves: list[Tensor]) -> Tensor:
            params, frozen, buffers = cut(tensors)
            with swapped(self.model, params | frozen, buffers):
                return self._objective(with_leaves(batch, leaves)).run()

        return step, loss_alone

    def _eager(self, batch: tuple, draw_signs: DrawSigns) -> Tensor:
        trainable = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        _refuse_hooks(trainable.values())
        params = {name: p.detach() for name, p in trainable.items()}
        objective = self._objective(batch)
        check_objective(objective, params)
        return self._step(objective, params, None, self.learning_rate, draw_signs)

    def _objective(self, batch: tuple) -> ModelLoss:
        if len(batch) == 2:
            return BatchLoss(self.model, *batch, self.loss)
        if len(batch) != 1:
            raise TypeError(f"a step takes (inputs, targets) or one batch, got {len(batch)} arguments")
        if self.loss is F.cross_entropy:
            raise TypeError(
                "step(batch) needs a loss of the model and the batch: SGDStep(model, lambda model, batch: ..., ...). "
                "With the default loss call step(inputs, targets)."
            )
        return ClosureLoss(self.model, partial(self.loss, self.model, *batch), count_examples(batch))

    def _step(
        self,
        objective: ModelLoss,
        params: Params,
        buffers: Params | None,
        learning_rate: float | Tensor,
        draw_signs: DrawSigns,
    ) -> Tensor:
        kind = PERTURBATIONS[self.tangents]
        if objective.num_examples is None and kind.per_example:
            raise ValueError(
                f"{self.tangents!r} tangents need the number of examples, and the tensors of the batch differ in their "
                f"lengths: use 'rank-one' tangents"
            )
        perturbation = kind(params, self.num_tangents, objective.num_examples, draw_signs)
        loss, jvps, of_examples = evaluate(objective, params, perturbation, buffers)
        perturbation.gradients(jvps, of_examples).add_to_(params, -learning_rate)
        return loss

    def _warn_eager(self, reason: str) -> None:
        self._warn(f"SGDStep runs as with compiled=False, because {reason}.")

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            frame, level = sys._getframe(), 1
            while frame.f_back is not None and frame.f_globals["__name__"].partition(".")[0] in ("fwdlib", "torch"):
                frame, level = frame.f_back, level + 1
            warnings.warn(message, stacklevel=level)  # at the line that took the step


def _refuse_hooks(parameters: Iterable[Tensor]) -> None:
    if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in parameters):
        raise NotImplementedError(
            "a parameter has a hook (Tensor.register_hook), and SGDStep computes no gradient that it could be given. "
            "Use fwdlib.forward_grad_ and an optimizer."
        )
