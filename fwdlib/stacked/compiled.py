"""A step of plain SGD with the stacked forward gradient as machine code, made from the graph of its forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_map

from fwdlib.objectives import check_scalar
from fwdlib.stacked.batches import count_examples
from fwdlib.stacked.dual import Dual
from fwdlib.stacked.estimator import run, split
from fwdlib.stacked.gradients import Gradients
from fwdlib.stacked.graph import (
    CountedSigns,
    GivenSigns,
    compiled,
    record,
    run_without_values,
    share_memory,
)
from fwdlib.stacked.guarded import Refused, call_in
from fwdlib.stacked.perturbations import PERTURBATIONS, DrawSigns
from fwdlib.tangents import AnyGenerator, random_signs


class Options(NamedTuple):
    """What a step depends on besides the model, the loss and the batch."""

    tangents: str
    num_tangents: int


def forward(model: nn.Module, loss: Callable, batch: tuple, options: Options) -> Tensor:
    """Compute the loss of a batch: what torch traces, of which :func:`end` is the last call."""
    if len(batch) == 2:
        inputs, targets = batch
        found, num_examples = loss(model(inputs), targets), inputs.shape[0] if inputs.dim() else None
    else:
        found, num_examples = loss(model, *batch), count_examples(batch)
    return end(found, *options, num_examples, *[p for _, p in model.named_parameters() if p.requires_grad])


def end(loss: Tensor, tangents: str, num_tangents: int, num_examples: int | None, *params: Tensor) -> Tensor:
    """Stand at the end of a traced forward pass, and tell what is the loss and what are the parameters.

    Raises:
        ValueError: if the loss is not a scalar.
    """
    check_scalar(loss)
    if _ended:
        _ended[-1].append(loss)
    return loss.detach()


_ended: list[list[Tensor]] = []  # the losses of the passes that run


class CompiledStep:
    """A step as machine code: the forward pass with tangents, and the update.

    Args:
        graph: of :func:`forward`, in torch's functions.
        examples: the tensors that it reads now: parameters, buffers, those of the batch, others.
        max_operations: the largest number of operations; None for no limit.
        note_size: is told the number of operations before the step is compiled.

    Raises:
        Refused: if the step cannot be compiled.
    """

    def __init__(
        self,
        graph: GraphModule,
        examples: Sequence[Tensor],
        max_operations: int | None,
        note_size: Callable[[int], None],
    ) -> None:
        arguments, places = call_in(graph, end)
        _, self._tangents, self._num_tangents, self._num_examples, *params = arguments
        if self._num_examples == 0:
            raise Refused("the batch is empty")
        self._places = [places[p] for p in params]
        self._forward = graph
        self._memory: list[int] = []
        self.has_effects = len(graph.graph.output_node().args[0]) > 1
        """Whether the forward pass has other results than the loss, which the model keeps."""
        self._check_memory(examples)
        like = examples[self._places[0]]
        self._signs = like.detach().new_empty(0)
        # as exact as Python's number; an accelerator of Apple has no float64
        self._rate = like.new_ones((), dtype=torch.float32 if like.device.type == "mps" else torch.float64)
        with torch.no_grad():
            count = CountedSigns(torch.Generator(like.device))
            run_without_values(lambda *tensors: self._differentiate(tensors, count), examples)
            self._num_signs = count.total
            arguments = [*examples, self._rate, self._draw(torch.Generator(like.device))]
            recorded = record(self._step, arguments, max_operations)
            note_size(recorded.num_operations)
            self._constants = recorded.constants
            self._program = compiled(recorded, arguments, fixed=True)
        del self._forward

    def __call__(self, tensors: Sequence[Tensor], learning_rate: float, generator: AnyGenerator) -> Sequence[Tensor]:
        """Take a step: change the parameters, and return what the graph of the forward pass returns; without grad mode.

        Raises:
            NotImplementedError: if a parameter has hooks.
            Refused: if a parameter has come to overlap with another tensor.
        """
        check_no_hooks(tensors[i] for i in self._places)
        self._check_memory(tensors)
        return self._program(*tensors, self._rate.new_tensor(learning_rate), self._draw(generator), *self._constants)

    def _draw(self, generator: AnyGenerator) -> Tensor:
        return random_signs((self._num_signs,), self._signs, generator)

    def _check_memory(self, tensors: Sequence[Tensor]) -> None:
        # Machine code may write into a parameter before it reads another tensor.
        memory = [tensors[i].data_ptr() for i in self._places]
        if memory != self._memory:
            if share_memory(tensors):
                raise Refused("two of the model's tensors, or one and the batch, share memory")
            self._memory = memory

    def _step(self, *arguments: Tensor) -> Any:
        *tensors, rate, signs = arguments
        found, gradients = self._differentiate(tensors, GivenSigns(signs))
        gradients.add_to_({str(i): tensors[i] for i in self._places}, -rate)
        return tree_map(lambda y: y.primal.detach() if isinstance(y, Dual) else y, found)

    def _differentiate(self, tensors: Sequence[Tensor], draw_signs: DrawSigns) -> tuple[Any, Gradients]:
        # What the forward pass returns, and an estimate of the gradient.
        params = {str(i): tensors[i] for i in self._places}
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        given = [leaves.get(str(i), x) for i, x in enumerate(tensors)]
        perturbation = PERTURBATIONS[self._tangents](params, self._num_tangents, self._num_examples, draw_signs)
        _ended.append([])
        try:
            found = run(nn.Module(), lambda: self._forward(*given), perturbation, leaves)
            (loss,) = _ended[-1]
        finally:
            _ended.pop()
        if not isinstance(loss, Dual):
            raise Refused("the loss is a constant or a parameter itself")
        _, jvps, of_examples = split(loss, perturbation)
        return found, perturbation.gradients(jvps, of_examples)


def check_no_hooks(parameters: Iterable[Tensor]) -> None:
    """Refuse hooks of parameters, for which there is no gradient.

    Raises:
        NotImplementedError: if one has hooks.
    """
    if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in parameters):
        raise NotImplementedError(
            "a parameter has a hook (Tensor.register_hook), and SGDStep computes no gradient that it could be given. "
            "Use fwdlib.forward_grad_ and an optimizer."
        )
