"""What the zoo checks of a case: every engine against ``loss.backward()`` along the same tangents, in float64.

An engine is right, or it refuses the model with a reason and a way out. Anything else fails.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from scipy import stats
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fwdlib.estimators import ENGINES, GradientEstimate, forward_gradient
from fwdlib.forward.rewind import Rewind
from fwdlib.objectives import ClosureLoss, params_of
from fwdlib.tangents import Params, random_signs, rank_one_factors
from tests.zoo.case import Builder, Case, seed_all

TOLERANCE = 1e-9
NUM_TANGENTS = 1, 3
NUM_DRAWS = 16
FIVE_SIGMA = stats.t.isf(stats.norm.sf(5), NUM_DRAWS - 1)  # of the mean of so few, in its standard errors
LARGE = 500_000
"""Number of parameters above which the tangents of examples are not tried: a minute for a model."""
WAY_OUT = re.compile(r"\b(use|write|pass|call|give|register|leave|set)\b", re.IGNORECASE)


class InDouble(TorchFunctionMode):
    """Reads float64 wherever a model asks for float32, so that the comparison can be exact."""

    def __torch_function__(self, func: Callable, types: Iterable, args: tuple = (), kwargs: dict | None = None) -> Any:
        def widened(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        func = Tensor.double if func is Tensor.float else func
        return func(*map(widened, args), **{key: widened(value) for key, value in (kwargs or {}).items()})


def built(build: Builder, *, training: bool) -> Case:
    """Return a new case, the same at each call."""
    seed_all(0)
    with InDouble():
        case = build()
    case.model.double().train(training)
    seed_all(2)
    return case


def closure_of(case: Case) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        with InDouble() if case.in_double else nullcontext():
            return case.loss(case.model)

    return closure


def by_backprop(case: Case) -> tuple[Tensor, Params, Params]:
    """Return the loss, the buffers after the forward pass (checkpoints run it once more in the backward pass), and the
    gradient."""
    loss = closure_of(case)()
    buffers = values(case.model.named_buffers())
    loss.backward()
    named = {name: p for name, p in case.model.named_parameters() if p.requires_grad}
    return loss.detach(), buffers, {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named.items()}


def along(grads: Params, tangents: Params) -> Tensor:
    return sum((v * grads[name]).reshape(len(v), -1).sum(1) for name, v in tangents.items())


def assert_near(found: Tensor, expected: Tensor, scale: float, what: str) -> None:
    error = (found - expected).abs().max().item()
    assert error <= TOLERANCE * scale, f"wrong {what}: {found.tolist()} where backprop has {expected.tolist()}"


def identities(model: nn.Module) -> list:
    """Return what an estimate must not change: which tensors a model holds, and their settings."""
    found: list = [(name, id(p), p.requires_grad, p.grad is None) for name, p in model.named_parameters()]
    found += [(name, module.training) for name, module in model.named_modules()]
    return found + [(name, id(b)) for name, b in model.named_buffers()]


def values(tensors: Iterable[tuple[str, Tensor]]) -> Params:
    return {name: x.detach().clone() for name, x in tensors}


def assert_same(found: Params, expected: Params, what: str) -> None:
    assert found.keys() == expected.keys(), f"other {what}: {sorted(found)}, not {sorted(expected)}"
    for name, x in found.items():
        same = torch.allclose(x.double(), expected[name].double(), rtol=TOLERANCE, atol=1e-12, equal_nan=True)
        assert same, f"{what} {name!r} is not as an ordinary pass leaves it"


class Reference:
    """A case as backprop sees it: the loss, the gradient, and the model after one step.

    Args:
        build: makes the case.
        training: the mode.
    """

    def __init__(self, build: Builder, *, training: bool) -> None:
        self.build, self.training = build, training
        self.case = built(build, training=training)
        self.before = identities(self.case.model)
        self.loss, self.buffers, self.grads = by_backprop(self.case)
        self.squares = sum(g.square().sum().item() for g in self.grads.values())
        assert math.isfinite(self.squares), "backprop's own gradient is not finite"
        assert self.squares > 0, "backprop's own gradient is zero"
        self.moved = [new[1] != old[1] for new, old in zip(identities(self.case.model), self.before, strict=True)]

    def scale(self, tangents: Params) -> float:
        """Return the size of the terms that a jvp along the tangents sums."""
        return sum((v * self.grads[name]).square().sum().item() for name, v in tangents.items()) ** 0.5

    def estimate(self, **options: Any) -> GradientEstimate:
        """Return a forward gradient of a new copy, and assert that the model is as backprop leaves it.

        Args:
            options: of :func:`fwdlib.forward_gradient`.
        """
        case = built(self.build, training=self.training)
        before, held = identities(case.model), values(case.model.named_parameters())
        objective = ClosureLoss(case.model, closure_of(case), case.num_examples)
        try:
            estimate = forward_gradient(objective, params_of(case.model), **options)
            assert_same(values(case.model.named_buffers()), self.buffers, "the buffer")
        finally:
            after = identities(case.model)
            assert torch.is_grad_enabled(), "grad mode is off"
            assert torch._C._is_fwd_grad_enabled(), "forward mode is off"
        changed = [new != old for new, old in zip(after, before, strict=True)]
        wrong = [old[0] for old, new, usual in zip(before, changed, self.moved, strict=True) if new and not usual]
        assert not wrong, f"the model was changed at {wrong}"
        assert_same(values(case.model.named_parameters()), held, "the parameter")
        assert_near(estimate.loss, self.loss, max(1, self.loss.abs().item()), "loss")
        return estimate


def outcome(check: Callable[[], None]) -> str:
    """Run a check and return "right", or "refused: " and the words.

    Args:
        check: raises NotImplementedError where the library refuses.
    """
    try:
        check()
    except NotImplementedError as error:
        words = " ".join(str(error).split())
        assert WAY_OUT.search(words), f"refused without a way out: {words}"
        return f"refused: {words}"
    return "right"


def check_jvps(reference: Reference, engine: str) -> None:
    """Compare the jvps along fixed normal tangents, and the gradient made from them, with backprop's."""
    for k in NUM_TANGENTS:
        draw = torch.Generator().manual_seed(1)
        tangents = {
            name: torch.randn(k, *g.shape, generator=draw, dtype=g.dtype) for name, g in reference.grads.items()
        }
        estimate = reference.estimate(engine=engine, num_tangents=k, tangents=lambda *_, given=tangents: given)
        assert_near(estimate.jvps, along(reference.grads, tangents), reference.scale(tangents), f"jvp, K = {k}")


def check_rank_one(reference: Reference, engine: str) -> None:
    """Compare rank-one tangents, of which the stacked engine keeps factors alone, with the same written out."""
    draw = torch.Generator().manual_seed(3)
    estimate = reference.estimate(engine=engine, num_tangents=2, generator=draw)
    draw_signs = partial(random_signs, generator=draw.manual_seed(3))
    factors = rank_one_factors(reference.grads, 2, draw_signs)
    tangents = {name: factor.dense() for name, factor in factors.items()}
    jvps = along(reference.grads, tangents)
    assert_near(estimate.jvps, jvps, reference.scale(tangents), "jvp of rank-one tangents")
    for name, v in tangents.items():
        found, exact = estimate.grads[name], reference.grads[name]
        expected = torch.tensordot(jvps, v, dims=1) / 2
        # a parameter that the loss does not use, or such a row of a table, may get zeros
        unused = ((found == 0) & (exact == 0)).reshape(*found.shape[:1], -1).all(-1)
        expected[unused] = 0
        assert_near(found, expected, reference.scale(tangents), f"gradient of {name!r}")


def check_unbiased(reference: Reference, tangents: str) -> None:
    """Compare the mean of estimates with backprop's gradient, along the gradient and along a fixed random vector."""
    draw = torch.Generator().manual_seed(4)
    signs = {name: torch.randn(g.shape, generator=draw, dtype=g.dtype) for name, g in reference.grads.items()}
    case, found = built(reference.build, training=reference.training), []
    objective = ClosureLoss(case.model, closure_of(case), case.num_examples)
    rewind = Rewind(case.model)
    for _ in range(NUM_DRAWS):
        rewind()
        options = {"engine": "stacked", "num_tangents": 2, "tangents": tangents, "generator": draw}
        grads = dict(forward_gradient(objective, params_of(case.model), **options).grads)
        found.append([sum((g * u[n]).sum().item() for n, g in grads.items()) for u in (reference.grads, signs)])
    sample = torch.tensor(found, dtype=torch.float64)
    exact = [sum((g * u[n]).sum() for n, g in reference.grads.items()) for u in (reference.grads, signs)]
    error = (sample.mean(0) - torch.stack(exact)) / (sample.std(0) / NUM_DRAWS**0.5 + 1e-12 * reference.squares)
    assert error.abs().max() < FIVE_SIGMA, f"{tangents} tangents are biased: {error.tolist()} standard errors"


def ratio_of_times(reference: Reference, repeats: int = 3) -> float:
    """Return the time of an estimate with one tangent, the default, over that of forward pass and backward pass."""
    case = built(reference.build, training=reference.training)
    closure, params = closure_of(case), params_of(case.model)
    objective = ClosureLoss(case.model, closure)
    runs = (lambda: dict(forward_gradient(objective, params).grads)), (lambda: closure().backward())
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats + 1):
        for run, taken in zip(runs, times, strict=True):
            begin = time.perf_counter()
            run()
            taken.append(time.perf_counter() - begin)
    return min(times[0][1:]) / min(times[1][1:])


def verdicts(build: Builder, *, training: bool) -> dict[str, str]:
    """Return "right" or "refused: ..." by engine, after all checks of a case in one mode.

    Args:
        build: makes the case.
        training: the mode.
    """
    reference, found = Reference(build, training=training), {}
    for engine in ENGINES:

        def check(engine: str = engine) -> None:
            check_jvps(reference, engine)
            check_rank_one(reference, engine)

        found[engine] = outcome(check)
    size = sum(g.numel() for g in reference.grads.values())
    if found["stacked"] == "right" and training and size < LARGE:
        for tangents in ("per-example", "activity"):
            check_unbiased(reference, tangents)
    return found
