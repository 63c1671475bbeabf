"""A training step of plain SGD with the stacked forward gradient, compiled to one graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fwdlib import runtime
from fwdlib.checks import check_choice, check_count, check_positive
from fwdlib.objectives import BatchLoss, params_of
from fwdlib.stacked.estimator import check_objective, evaluate
from fwdlib.stacked.perturbations import PERTURBATIONS, DrawSigns
from fwdlib.tangents import Params, random_signs


class SGDStep:
    """A step of plain SGD with the stacked forward gradient, compiled to one graph if there is a C++ compiler.

    Small models gain most, because their calls of torch cost more than the arithmetic. The first call for each shape of
    batch traces and compiles the step, which takes seconds to a minute. Only the signs are drawn outside the graph.

    Args:
        model: the step updates its parameters in place: those that exist and are trainable when the step is made.
        loss: ``(logits, targets) -> scalar``.
        learning_rate: the learning rate of SGD; set the attribute of that name to change it.
        num_tangents: K.
        tangents: ``"rank-one"``, ``"per-example"`` or ``"activity"``.
        compiled: whether to compile; None to compile if there is a compiler.
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
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
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
        self.num_tangents = check_count("num_tangents", num_tangents)
        self.tangents = check_choice("tangents", tangents, PERTURBATIONS)
        self.generator = generator
        self.compiled = runtime.has_compiler() if compiled is None else compiled
        if self.compiled and not runtime.has_compiler():
            raise RuntimeError(
                "compiled=True needs a C++ compiler, and none was found. Install g++ or clang++, name a compiler in "
                "the environment variable CXX, or pass compiled=False."
            )
        self._params, self._buffers = params_of(model), dict(model.named_buffers())
        self._modules = list(model.modules())
        self._graphs: dict[tuple, tuple[Callable, int]] = {}

    @torch.no_grad()
    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Take one step and return the loss before it, a scalar.

        Raises:
            ValueError: as :func:`fwdlib.stacked.estimator.stacked_gradient`.
        """
        params, buffers = self._params, self._buffers
        draw_signs = partial(random_signs, generator=self.generator)
        if not self.compiled:
            check_objective(BatchLoss(self.model, inputs, targets, self.loss), params)
            return self._step(params, {}, inputs, targets, self.learning_rate, draw_signs)
        modes = tuple([module.training for module in self._modules])
        key = (inputs.shape, inputs.dtype, inputs.device, targets.shape, targets.dtype, modes)
        if key not in self._graphs:
            check_objective(BatchLoss(self.model, inputs, targets, self.loss), params)
            self._graphs[key] = self._compile(params, buffers, inputs, targets)
        graph, num_signs = self._graphs[key]
        like = next(iter(params.values()))
        rate = torch.as_tensor(self.learning_rate, dtype=like.dtype, device=like.device)
        return graph(params, buffers, inputs, targets, rate, draw_signs((num_signs,), like))

    def _step(
        self,
        params: Params,
        buffers: Params,
        inputs: Tensor,
        targets: Tensor,
        learning_rate: float | Tensor,
        draw_signs: DrawSigns,
    ) -> Tensor:
        perturbation = PERTURBATIONS[self.tangents](params, self.num_tangents, len(inputs), draw_signs)
        objective = BatchLoss(self.model, inputs, targets, self.loss)
        loss, jvps, of_examples = evaluate(objective, params, perturbation, buffers)
        perturbation.gradients(jvps, of_examples).add_to_(params, -learning_rate)
        return loss

    def _compile(self, params: Params, buffers: Params, inputs: Tensor, targets: Tensor) -> tuple[Callable, int]:
        from torch.fx.experimental.proxy_tensor import make_fx

        # Tracing runs the step, so it works on copies and leaves the model untrained. A first run counts the signs.
        params, buffers = ({name: value.clone() for name, value in of.items()} for of in (params, buffers))
        like = next(iter(params.values()))
        rate = torch.as_tensor(self.learning_rate, dtype=like.dtype, device=like.device)
        count = _CountedSigns()
        self._step(params, buffers, inputs, targets, rate, count)

        def step(
            params: Params, buffers: Params, inputs: Tensor, targets: Tensor, rate: Tensor, signs: Tensor
        ) -> Tensor:
            return self._step(params, buffers, inputs, targets, rate, _GivenSigns(signs))

        signs = random_signs((count.total,), like)
        graph = make_fx(step)(params, buffers, inputs, targets, rate, signs)
        mode = "reduce-overhead" if inputs.is_cuda else None  # CUDA graphs
        return torch.compile(graph, mode=mode, dynamic=False), count.total


class _CountedSigns:
    def __init__(self) -> None:
        self.total = 0

    def __call__(self, shape: Sequence[int], like: Tensor) -> Tensor:
        self.total += math.prod(shape)
        return random_signs(shape, like)


class _GivenSigns:
    def __init__(self, signs: Tensor) -> None:
        self.signs = signs
        self.used = 0

    def __call__(self, shape: Sequence[int], like: Tensor) -> Tensor:
        start, self.used = self.used, self.used + math.prod(shape)
        return self.signs[start : self.used].reshape(shape).to(like.dtype)
