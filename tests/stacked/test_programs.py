"""Random programs of a plain function: odd arguments, views, writes into them. Each engine is right or refuses."""

from __future__ import annotations

import re
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings

from fwdlib.estimators import backprop_gradient, forward_gradient

DOUBLE = torch.float64
WAY_OUT = re.compile(r"\b(use|write|pass|call|give|let|set)\b", re.IGNORECASE)

# Each line makes a tensor from two others and a small number, or writes into one of them and returns it.
ELEMENTWISE = {
    "tanh": lambda x, y, n: x.tanh(),
    "gelu": lambda x, y, n: F.gelu(x, approximate="tanh" if n % 2 else "none"),
    "softplus": lambda x, y, n: F.softplus(x, beta=1 + n, threshold=2),
    "power": lambda x, y, n: x**n,
    "a number to a power": lambda x, y, n: 1.5**x,
    "clamp": lambda x, y, n: x.clamp(min=-0.5, max=None if n % 2 else 0.5),
    "hypot": lambda x, y, n: torch.hypot(x, y + 2),
    "where": lambda x, y, n: torch.where(x > y, x, 0.0 if n % 2 else y),
    "lerp": lambda x, y, n: torch.lerp(x, y, 0.1 * n),
    "addcmul": lambda x, y, n: torch.addcmul(x, y, x, value=n),
    "maximum": lambda x, y, n: torch.maximum(x, y) if n % 2 else torch.fmin(y, x),
    "divide": lambda x, y, n: torch.div(x, y.square() + 1) if n else 2 / (1 + x.square()),
    "rsub": lambda x, y, n: torch.rsub(x, y, alpha=n) if n else 3 - x,
    "alpha": lambda x, y, n: torch.add(x, y, alpha=0.5) - torch.sub(y, x, alpha=n),
    "complex": lambda x, y, n: torch.complex(x, y).abs() if n % 2 else torch.view_as_real(torch.complex(x, y)).sum(-1),
}
SHAPES = {
    "transpose": lambda x, y, n: x.mT if n % 2 else x.transpose(dim0=0, dim1=-1),
    "roll": lambda x, y, n: x.roll(n, -1),
    "flip": lambda x, y, n: x.flip([n % 2]),
    "expand": lambda x, y, n: x[:1].expand(3, 3) if n % 2 else x[:, n % 3 : n % 3 + 1].expand(size=(-1, 3)),
    "slices": lambda x, y, n: torch.cat([x[n % 3 :], y[: n % 3]], axis=0),
    "cat with nothing": lambda x, y, n: torch.cat([torch.tensor([]), x, x[:0]], dim=0),
    "stack": lambda x, y, n: torch.stack([x[n % 3], y[0], x[:, 1]], dim=n % 2),
    "chunks": lambda x, y, n: torch.cat([*x.split([1, 2], dim=n % 2)][::-1], n % 2),
    "unfold": lambda x, y, n: x.flatten().unfold(0, 3, 3),
    "diagonal": lambda x, y, n: torch.diag_embed(x.diagonal()) + y,
    "pad": lambda x, y, n: F.pad(x, (1, -1), value=float(n)),
    "take": lambda x, y, n: x[[0, n % 3, 0]] if n % 2 else x[:, torch.tensor([2, 0, n % 3])],
    "mask": lambda x, y, n: torch.masked_select(x, x > x.min()).sum() + y,
    "gather": lambda x, y, n: x.gather(n % 2, torch.tensor([[0, 1, 2], [2, 2, 1], [0, 0, n % 3]])),
    "view as": lambda x, y, n: x.contiguous().view(9).reshape(3, -1),
}
REDUCTIONS = {
    "sum": lambda x, y, n: x.sum(axis=n % 2, keepdims=True) + y,
    "mean of both": lambda x, y, n: x.mean(dim=(0, -1)) * y,
    "max": lambda x, y, n: x.max(dim=n % 2, keepdim=True).values - y,
    "logsumexp": lambda x, y, n: torch.logsumexp(x, dim=(0, 1) if n % 2 else 0) + y,
    "norm": lambda x, y, n: torch.linalg.vector_norm(x + 2, ord=1 + n % 3, dim=n % 2, keepdim=True) * y,
    "cumsum": lambda x, y, n: x.cumsum(n % 2) * 0.3,
    "softmax": lambda x, y, n: torch.softmax(x, n % 2) if n % 3 else F.log_softmax(x, dim=-1),
    "sort": lambda x, y, n: x.sort(dim=n % 2, descending=True)[0],
    "var": lambda x, y, n: x.var(dim=-1, correction=n % 2, keepdim=True) + y,
    "prod": lambda x, y, n: x.prod(dim=n % 2, keepdim=True) + y,
}
PRODUCTS = {
    "matmul": lambda x, y, n: x @ y / 3 if n % 2 else torch.matmul(x, y[n % 3]) + y,
    "einsum": lambda x, y, n: torch.einsum("ij,kj->ki", x, y) / 3,
    "linear": lambda x, y, n: F.linear(x, weight=y, bias=y[0] if n % 2 else None) / 3,
    "bmm": lambda x, y, n: torch.bmm(x[None], y.t()[None])[0] / 3,
    "addmm": lambda x, y, n: torch.addmm(x, y, x, beta=0.5, alpha=0.1 * n),
    "baddbmm": lambda x, y, n: torch.baddbmm(x[None], y[None], x[None], beta=n % 2, alpha=0.2)[0],
    "outer": lambda x, y, n: torch.outer(x[0], y[:, n % 3]),
    "convolution": lambda x, y, n: F.conv1d(x[None], y.reshape(3, 3, 1), padding=0)[0] / 3,
    "layer norm": lambda x, y, n: F.layer_norm(x, (3,), y[0], y[1]),
    "attention": lambda x, y, n: F.scaled_dot_product_attention(x[None], y[None], x[None], is_causal=bool(n % 2))[0],
    "solve": lambda x, y, n: torch.linalg.solve(x @ x.T + 3 * torch.eye(3, dtype=DOUBLE), y),
    "loss": lambda x, y, n: F.cross_entropy(x, torch.tensor([0, 2, 1]), reduction="none")[:, None] + y,
}
CUTS = {
    "detach": lambda x, y, n: x.detach() * y,
    "no grad": lambda x, y, n: _without_grad(x) + y,
    "no grad, another layout": lambda x, y, n: _without_grad(x.mT if n % 2 else x) * y,
    "numbers": lambda x, y, n: x * float(n) + torch.arange(3),
}


def _without_grad(x: Any) -> Any:
    with torch.no_grad():
        return x.exp()


def _set(x: Any, index: Any, value: Any) -> Any:
    x[index] = value
    return x


def _filled(x: Any, y: Any, n: int) -> Any:
    new = torch.zeros(3, 3, dtype=DOUBLE)
    new[:, n % 3] = x[0]
    new.diagonal().add_(y[1])
    return new


# Writes go into copies: torch refuses them into parameters, and backprop into what it still needs.
WRITES = {
    "add_": lambda x, y, n: x.clone().add_(y, alpha=n),
    "mul_ of a view": lambda x, y, n: _through_view(x, lambda v: v[n % 3].mul_(y[0])),
    "copy_ of a column": lambda x, y, n: _through_view(x, lambda v: v[:, n % 3].copy_(y[0])),
    "write twice": lambda x, y, n: _through_view(x, lambda v: v.t()[0].fill_(n).add_(y[1])),
    "setitem": lambda x, y, n: _set(x.clone(), (slice(None), n % 3), y[:, 0]),
    "setitem by mask": lambda x, y, n: _set(x.clone(), x > 0, float(n)),
    "setitem by list": lambda x, y, n: _set(x.clone(), [0, 2], y[n % 3]),
    "index_add_": lambda x, y, n: x.clone().index_add_(0, torch.tensor([0, n % 3]), y[:2]),
    "index_put_": lambda x, y, n: x.clone().index_put_((torch.tensor([0, 0]),), y[:2], accumulate=True),
    "scatter_add": lambda x, y, n: x.scatter_add(n % 2, torch.tensor([[0, 0, 2]]), y[:1]),
    "masked_fill_": lambda x, y, n: x.clone().masked_fill_(y > 0, n),
    "zero_ of a view": lambda x, y, n: _through_view(x, lambda v: v.view(9)[n % 9 :].zero_()),
    "clamp_": lambda x, y, n: x.clone().clamp_(min=-1).sub_(y),
    "filled": _filled,
    "relu in place": lambda x, y, n: F.relu(x.clone(), inplace=True) + y,
    "swap": lambda x, y, n: _set(x.clone(), [0, 1], x[[1, 0]]),
}


def _through_view(x: Any, write: Any) -> Any:
    copy = x.clone()
    write(copy)
    return copy


LINES = {**ELEMENTWISE, **SHAPES, **REDUCTIONS, **PRODUCTS, **CUTS, **WRITES}


def program(lines):
    """A function of two matrices: each line may use the parameters and the results before it."""

    def run(params):
        values = [params["a"], params["b"]]
        for name, first, second, n in lines:
            made = LINES[name](values[first % len(values)], values[second % len(values)], n)
            values.append(made / (1 + made.detach().abs().max()))  # so that nothing grows
        return sum(value.sum() * (1 + i) for i, value in enumerate(values))

    return run


def check(lines, seed=0):
    draw = torch.Generator().manual_seed(seed)
    params = {name: torch.randn(3, 3, generator=draw, dtype=DOUBLE) for name in "ab"}
    function = program(lines)
    try:
        exact = backprop_gradient(function, params)
    except RuntimeError as error:
        if "modified by an inplace operation" in str(error) or "view size is not compatible" in str(error):
            return  # backprop has nothing to compare with
        raise
    if not all(g.isfinite().all() and g.abs().max() < 1e6 for g in exact.grads.values()):
        return
    for engine in ("stacked", "torch", "auto"):
        found, refusal = estimated(function, params, engine)
        if found is None:
            assert WAY_OUT.search(refusal), f"refused without a way out: {refusal}"
            assert engine != "auto" or "forward derivative" in refusal, refusal
        else:
            torch.testing.assert_close(found.loss, exact.loss, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(dict(found.grads), exact.grads, rtol=1e-7, atol=1e-8, msg=f"{engine}: {lines}")


def estimated(function, params, engine):
    try:
        return forward_gradient(function, params, tangents="unit", engine=engine), None
    except NotImplementedError as error:
        return None, str(error)


@pytest.mark.parametrize("name", LINES)
def test_each_line(name):
    for n in range(4):
        check([(name, 0, 1, n), ("tanh", 1, 0, 0), (name, 2, 3, n + 5)])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(LINES)), st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)),
        min_size=1,
        max_size=7,
    ),
    st.integers(0, 2**31),
)
@example([("transpose", 2, 7, 7), ("max", 9, 9, 2), ("no grad", 8, 6, 6), ("zero_ of a view", 9, 6, 7)], 788541)
@example([("power", 6, 4, 0), ("add_", 8, 5, 0), ("add_", 2, 8, 7)], 773095)
@example([("filled", 0, 1, 0), ("write twice", 2, 0, 3), ("setitem by mask", 3, 1, 2)], 0)
def test_random_programs(lines, seed):
    check(lines, seed)
