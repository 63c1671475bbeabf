"""A training step of plain SGD with the stacked forward gradient, compiled to one graph where that is right."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from fwdlib import runtime
from fwdlib.checks import check_choice, check_count, check_positive
from fwdlib.objectives import BatchLoss, ClosureLoss, ModelLoss, check_objective
from fwdlib.stacked.batches import count_examples
from fwdlib.stacked.compiled import CompiledStep, Options, check_no_hooks, end, forward
from fwdlib.stacked.estimator import evaluate
from fwdlib.stacked.graph import cause_of, how_large
from fwdlib.stacked.guarded import FULL, Guarded, Refused
from fwdlib.stacked.perturbations import PERTURBATIONS
from fwdlib.tangents import random_signs

MAX_OPERATIONS = 1_000
"""Larger steps, which take more than half a minute to compile, are compiled only on request."""
MAX_REFUSED = 3
"""How many shapes of batches cannot be compiled, before the step compiles no more."""

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

    A compiled step does what the model's code would do. Torch's compiler traces this code, and guards all Python values
    that it reads, such as ``model.training`` or an attribute that you set between two steps: a change is compiled anew,
    for up to eight states of these values.

    What cannot be compiled runs as with ``compiled=False``, with the same numbers, after one warning that says why: a
    branch on the values of a tensor, ``.item()``, shapes that depend on values, a counter in Python, random numbers of
    Python or numpy, functions under ``functools.lru_cache``, a ``torch.autograd.Function``, logging, TorchScript, an
    autocast around the step, or a graph so large that it takes more than half a minute to compile. As under
    torch.compile, ``torch.compiler.is_compiling()`` is true in a compiled step.

    Args:
        model: the step updates its trainable parameters in place.
        loss: ``(logits, targets) -> scalar`` for ``step(inputs, targets)``; ``(model, batch) -> scalar`` for
            ``step(batch)``, where the batch is a tensor or any nest of dicts, lists and tuples.
        learning_rate: the learning rate of SGD; set the attribute of that name to change it.
        num_tangents: K.
        tangents: ``"rank-one"``, ``"per-example"`` or ``"activity"``.
        compiled: whether to compile; None to compile if there is a compiler and it takes less than half a minute.
        generator: the source of the signs; None for torch's global generator, from which a compiled step draws them
            before the model draws anything.

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
        self._graphs: Guarded | None = None
        self._seen: set[Hashable] = set()  # shapes of batches
        self._refused: set[Hashable] = set()  # those of them that cannot be compiled
        self._due: list[tuple[CompiledStep, Sequence[Tensor]]] = []
        self._warned: set[str] = set()

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; options of the step are checked."""
        super().__setattr__(name, _OPTIONS[name](name, value) if name in _OPTIONS else value)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy has: all but the graphs, which belong to this model."""
        return vars(self) | {"_graphs": None, "_due": []}

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
        if self.compiled and len(batch) in (1, 2):
            found = self._compiled(batch)
            if found is not None:
                return found
        return self._eager(batch)

    def _compiled(self, batch: tuple) -> Tensor | None:
        # The loss before a step by machine code, or None if there is none for it.
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda") or torch.is_inference_mode_enabled():
            return self._warn_eager("it is called under torch.autocast or torch.inference_mode")
        if self._graphs is None:
            self._graphs = Guarded(forward, self._compile, end)
        arguments = self.model, self.loss, batch, Options(self.tangents, self.num_tangents)
        try:
            found = self._graphs(*arguments)
            if found is not None:
                return self._finished(found)
        except Refused as refusal:
            return self._warn_eager(str(refusal))
        if (key := _shapes(batch)) in self._refused:
            return None
        if self._graphs.is_full:
            return self._warn_eager(FULL)
        if key not in self._seen:
            self._seen.add(key)
            return None
        try:
            found = self._graphs.trace(*arguments)
            return None if found is None else self._finished(found)
        except Exception as error:
            cause = error
        loss = self._eager(batch)  # which raises what is wrong with the model
        self._refused.add(key)
        self.compiled = len(self._refused) < MAX_REFUSED
        self._warn_eager(cause_of(cause))
        return loss

    def _compile(self, graph: GraphModule, examples: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
        step = CompiledStep(graph, examples, self._max_operations, self._note_size)

        def take(*tensors: Tensor) -> Sequence[Tensor]:
            if step.has_effects:
                with torch.no_grad():
                    return step(tensors, self.learning_rate, self.generator)
            self._due.append((step, tensors))
            return tensors[:1]

        return take

    def _finished(self, loss: Tensor) -> Tensor:
        # Take the step that a graph has left to do, if any: outside torch's frames, Python takes 30 microseconds less.
        if not self._due:
            return loss
        step, tensors = self._due.pop()
        return step(tensors, self.learning_rate, self.generator)[0]

    def _note_size(self, num_operations: int) -> None:
        if num_operations > MAX_OPERATIONS:
            self._warn(f"SGDStep compiles a large step: {how_large(num_operations)}.")

    def _eager(self, batch: tuple) -> Tensor:
        trainable = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        check_no_hooks(trainable.values())
        objective = self._objective(batch)
        check_objective(objective, trainable)
        kind, num_examples = PERTURBATIONS[self.tangents], objective.num_examples
        if num_examples is None and kind.per_example:
            raise ValueError(
                f"{self.tangents!r} tangents need the number of examples, and the tensors of the batch differ in their "
                f"lengths: use 'rank-one' tangents"
            )
        draw_signs = partial(random_signs, generator=self.generator)
        perturbation = kind(trainable, self.num_tangents, num_examples, draw_signs)
        loss, jvps, of_examples = evaluate(objective, trainable, perturbation, trainable)
        perturbation.gradients(jvps, of_examples).add_to_(trainable, -self.learning_rate)
        return loss

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

    def _warn_eager(self, reason: str) -> None:
        self._warn(f"SGDStep runs as with compiled=False, because {reason}.")

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            frame, level = sys._getframe(), 1
            while frame.f_back is not None and frame.f_globals["__name__"].partition(".")[0] in ("fwdlib", "torch"):
                frame, level = frame.f_back, level + 1
            warnings.warn(message, stacklevel=level)  # at the line that took the step


def _shapes(batch: tuple) -> Hashable:
    return tuple((x.shape, x.dtype, x.device, x.layout) for x in tree_leaves(batch) if isinstance(x, Tensor))
