"""Functions in place of torch's: the same values, and backprop's derivatives, in both engines."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fwdlib.estimators import backprop_gradient
from fwdlib.forward.derivatives import derivatives_along
from fwdlib.objectives import ClosureLoss, params_of
from fwdlib.tangents import normal

INDICES = torch.tensor([[1, 2, 1], [2, 0, 3], [2, 2, 2]])
FLAT, OFFSETS = INDICES.flatten(), torch.tensor([0, 2, 2, 7])
WEIGHTS = torch.linspace(-1, 2, 9).double()
LOOK_UPS = {
    "plain": lambda w: F.embedding(INDICES, w),
    "padding": lambda w: F.embedding(INDICES, w, padding_idx=2),
    "padding from the end": lambda w: F.embedding(INDICES, w, -2),
    "by frequency": lambda w: F.embedding(INDICES, w, scale_grad_by_freq=True),
    "by name": lambda w: F.embedding(weight=w, input=INDICES, padding_idx=1, scale_grad_by_freq=True),
    "renormalised": lambda w: F.embedding(INDICES, w, max_norm=0.7, norm_type=1.0),
    "torch's own": lambda w: torch.embedding(w, INDICES, 2),
    "torch's own, with no padding": lambda w: torch.embedding(w, INDICES, -2),
    "a bag": lambda w: F.embedding_bag(INDICES, w),
    "bags by offsets": lambda w: F.embedding_bag(FLAT, w, OFFSETS),
    "bags with a last offset": lambda w: F.embedding_bag(FLAT, w, OFFSETS, include_last_offset=True, mode="sum"),
    "the sum of a bag": lambda w: F.embedding_bag(INDICES, w, mode="sum"),
    "the greatest of a bag": lambda w: F.embedding_bag(INDICES, w, mode="max"),
    "the greatest of bags": lambda w: F.embedding_bag(FLAT, w, OFFSETS, mode="max"),
    "a bag with padding": lambda w: F.embedding_bag(INDICES, w, padding_idx=2),
    "bags with padding": lambda w: F.embedding_bag(FLAT, w, OFFSETS, padding_idx=-2, mode="sum"),
    "weights": lambda w: F.embedding_bag(INDICES, w, mode="sum", per_sample_weights=WEIGHTS.view(3, 3)),
    "weights and padding": lambda w: F.embedding_bag(
        FLAT, w, OFFSETS, mode="sum", per_sample_weights=WEIGHTS, padding_idx=1
    ),
    "trained weights": lambda w: F.embedding_bag(FLAT, w, OFFSETS, mode="sum", per_sample_weights=w.flatten()[:9]),
    "renormalised bags": lambda w: F.embedding_bag(INDICES, w, None, 0.7, 1.0),
}
STEEP = {
    # zeros by a mask, in whose gradient the infinite slope does not show
    "log": lambda x: x.relu().log().sigmoid(),
    "log10": lambda x: torch.log10(input=x.relu()).sigmoid(),
    "sqrt": lambda x: torch.sqrt(x.relu()),
    "sqrt_": lambda x: (x.relu() + 0).sqrt_(),
    "rsqrt": lambda x: x.relu().rsqrt().clamp(max=9),
    "a root": lambda x: x.relu() ** 0.5,
    "a root that is trained": lambda x: torch.pow(x.relu(), exponent=x.abs()),
    "a root of one number": lambda x: x.relu()[0].prod() ** 0.5 + x,
    "padding": lambda x: F.pad(x.abs(), (0, 2)).sqrt(),
    "acos": lambda x: torch.acos((x * 9).clamp(-1, 1)),
    "atanh": lambda x: x.mul(9).clamp(-1, 1).atanh().sigmoid(),
    "xlogy": lambda x: torch.xlogy(x.relu(), x.relu()),
    "entr": lambda x: torch.special.entr(x.relu()),
    "hypot": lambda x: torch.hypot(x.relu(), other=x.relu()),
    "lp_pool1d": lambda x: F.lp_pool1d(x.relu(), 2, 2),
    "half precision": lambda x: x.relu().float().sqrt().double(),
}
INF, TARGETS = float("inf"), torch.tensor([[0.0, 1, 0.3], [1, 0, 0.6], [0, 1, 1], [1, 0, 0]]).double()
UNDEFINED = {
    "the mean of nothing": lambda x: x[x > 99].mean().nan_to_num(0.5) + x,
    "the mean of nothing, in place": lambda x: torch.nan_to_num_(x[x > 99].mean()) + x,
    "softmax with nothing left": lambda x: torch.nan_to_num(x.masked_fill(x < 9, -INF).softmax(1)) + x,
    "infinity": lambda x: x.masked_fill(x > 0.5, INF).nan_to_num(1.0, 2.0, 3.0) + x,
    "logsumexp of nothing": lambda x: torch.stack([x, x.masked_fill(x < 9, -INF)]).logsumexp(2).sigmoid(),
    "logcumsumexp of nothing": lambda x: torch.logcumsumexp(x.masked_fill(x < 0.2, -INF), 1).sigmoid(),
    "BCE where it is sure": lambda x: F.binary_cross_entropy(x.clamp(0, 1), TARGETS, TARGETS, reduction="none") / 1e12,
    "BCE with targets": lambda x: F.binary_cross_entropy(
        x.mul(20).clamp(-30, 30).sigmoid(), x.sigmoid(), reduction="sum"
    ),
    "Gaussian NLL": lambda x: F.gaussian_nll_loss(x, TARGETS, x.exp(), full=True, eps=1.1),
    "Gaussian NLL, one variance": lambda x: F.gaussian_nll_loss(x, TARGETS, x[:, 0].exp(), reduction="none", eps=1.1),
    "normal numbers that are broadcast": lambda x: seeded(lambda: torch.normal(x[:1], std=x.exp())) * x,
    "a result that is initialised": lambda x: nn.init.constant_(x * 1, 2.0) ** 2 * x,
    "a result that is initialised at random": lambda x: seeded(lambda: nn.init.kaiming_uniform_(x * 1)) ** 2 * x,
}
TIES = {
    "equal rows of a bag": lambda x: F.embedding_bag(INDICES, equal(x), mode="max"),
    "equal rows of bags with padding": lambda x: F.embedding_bag(FLAT, equal(x), OFFSETS, mode="max", padding_idx=1),
    "quantile": lambda x: torch.quantile(equal(x), 0.5),
    "quantile along an axis": lambda x: equal(x).quantile(0.3, dim=0, interpolation="higher"),
    "nanquantile": lambda x: torch.nanquantile(equal(x), 0.5, 0),
}
FACTOR, MATRIX = torch.tensor(2 + 1j, dtype=torch.complex128), torch.tensor([[3, 1 + 1j], [1 - 1j, 4]]).cdouble()
COMPLEX = {
    "a real exponent": lambda x: torch.view_as_real((2 + 1j) ** x),
    "a real exponent of a tensor": lambda x: torch.view_as_real(torch.pow(FACTOR, exponent=x)),
    "a real base": lambda x: torch.view_as_real(x.abs() ** (2 + 1j) + x.exp() ** FACTOR),
    "a real number is subtracted": lambda x: torch.view_as_real((2 + 1j) - x + torch.rsub(x, FACTOR, alpha=2)),
    "polar": lambda x: torch.view_as_real(torch.polar(x.abs() - x[0, 0].abs().detach(), angle=x)),
    "Cholesky": lambda x: torch.view_as_real(torch.linalg.cholesky(MATRIX + 1j * x[:2, :2] * x[2:, 1:])),
    "tanh": lambda x: torch.view_as_real(torch.tanh(torch.complex(x, x.cos()))),
}
ODD = STEEP | UNDEFINED | TIES | COMPLEX


def equal(x):
    return x - x.detach() + 1


def seeded(draw):
    torch.manual_seed(0)
    return draw()


class LookUp(nn.Module):
    def __init__(self, look_up, is_result):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(4, 3, generator=draw, dtype=torch.float64))
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        self.look_up, self.is_result = look_up, is_result

    def forward(self):
        return (self.look_up(self.table * self.scale if self.is_result else self.table) * self.scale).sin().sum()


@pytest.mark.parametrize("num_tangents", [1, 3])
@pytest.mark.parametrize("engine", ["torch", "stacked"])
@pytest.mark.parametrize("is_result", [False, True], ids=["parameter", "activation"])
@pytest.mark.parametrize("name", LOOK_UPS)
def test_derivatives_are_those_of_backprop(name, is_result, engine, num_tangents):
    if is_result and name == "renormalised bags":
        pytest.skip("torch refuses to renormalise what requires a gradient")
    assert_as_backprop(LOOK_UPS[name], is_result, engine, num_tangents)


@pytest.mark.parametrize("num_tangents", [1, 3])
@pytest.mark.parametrize("engine", ["torch", "stacked"])
@pytest.mark.parametrize("name", ODD)
def test_derivatives_are_those_of_backprop_at_odd_places(name, engine, num_tangents):
    assert_as_backprop(ODD[name], True, engine, num_tangents)


@pytest.mark.parametrize("name", STEEP)
def test_several_tangents_go_through_one_pass_of_a_plain_function(name):
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    tangents = torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (grad,) = torch.autograd.grad(STEEP[name](x * 1).sum(), x)
    found = derivatives_along(lambda p: STEEP[name](p["x"] * 1).sum(), {"x": x}, {"x": tangents}, engine="torch")
    torch.testing.assert_close(found.jvps, (tangents * grad).flatten(1).sum(1))


def test_an_infinite_derivative_stays_infinite():
    found = derivatives_along(lambda p: p["x"].sqrt().sum(), {"x": torch.zeros(2)}, {"x": torch.ones(1, 2)})
    assert found.jvps.isinf().all()


def assert_as_backprop(function, is_result, engine, num_tangents):
    model, copy = (LookUp(function, is_result) for _ in range(2))
    tangents = normal(params_of(model), num_tangents, torch.Generator().manual_seed(1))
    expected = backprop_gradient(ClosureLoss(copy, copy), params_of(copy))
    objective = ClosureLoss(model, model)
    if engine == "torch":
        loss, jvps, *_ = derivatives_along(objective, params_of(model), tangents, engine="torch")
    else:
        stacked = pytest.importorskip("fwdlib.stacked.estimator")
        loss, jvps = stacked.stacked_jvp(objective, params_of(model), tangents)
    torch.testing.assert_close(loss, expected.loss)
    torch.testing.assert_close(
        jvps, sum((tangents[n] * g).reshape(num_tangents, -1).sum(1) for n, g in expected.grads.items())
    )
    torch.testing.assert_close(model.state_dict(), copy.state_dict())
