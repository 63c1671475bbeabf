"""Each rule against torch.func.jvp in float64, with tangents in each of its arguments."""

import math
from functools import partial

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import resolve_name

from fwdlib.objectives import BatchLoss, params_of
from fwdlib.stacked import rules
from fwdlib.stacked.dual import RULES, Dual, Pass
from fwdlib.stacked.estimator import explain, stacked_jvp
from fwdlib.stacked.perturbations import Perturbation
from fwdlib.tangents import normal, random_signs

LABELS = torch.tensor([0, 2, 1, 2])
CASES = {}  # (function, which of its calls) -> shapes of the arguments, and the call


def case(functions, shapes, call=lambda f, *args: f(*args)):
    for function in functions:
        CASES[function, sum(f is function for f, _ in CASES)] = (shapes, call)


matrix, image = (4, 3), (2, 4, 6, 6)

case([F.linear], [(4, 3), (5, 3), (5,)])
case([F.linear], [(2, 4, 3), (5, 3)])
case([F.linear], [(3,), (5, 3), (5,)])
case([F.conv1d], [(2, 4, 7), (6, 2, 3), (6,)], lambda f, *a: f(*a, stride=2, padding=1, groups=2))
case([F.conv2d], [image, (6, 4, 3, 3), (6,)])
case([F.conv2d], [image, (6, 4, 3, 2)], lambda f, x, w: f(x, w, stride=(2, 1), padding=(1, 2), dilation=(1, 2)))
case([F.conv2d], [image, (4, 1, 3, 3), (4,)], lambda f, *a: f(*a, padding="same", groups=4))
case([F.conv3d], [(2, 2, 4, 4, 4), (3, 2, 2, 2, 2), (3,)], lambda f, *a: f(*a, padding="valid"))
case([F.embedding], [(5, 3)], lambda f, w: f(torch.tensor([[0, 4], [2, 2]]), w))

for shape in ((4, 3), (4, 3, 5)):
    case([F.batch_norm], [shape, (3,), (3,)], lambda f, x, w, b: f(x, None, None, w, b, True, 0.1, 1e-3))
case([torch.batch_norm], [(4, 3), (3,), (3,)], lambda f, x, w, b: f(x, w, b, None, None, True, 0.1, 1e-3, False))
case([F.batch_norm], [image], lambda f, x: f(x, torch.arange(4).double(), torch.arange(1, 5).double()))
case([F.layer_norm], [(4, 2, 3), (2, 3), (2, 3)], lambda f, x, w, b: f(x, (2, 3), w, b))
case([F.layer_norm, torch.layer_norm], [(4, 3)], lambda f, x: f(x, (3,)))
case([F.group_norm, torch.group_norm], [image, (4,), (4,)], lambda f, x, w, b: f(x, 2, w, b))

case([F.relu, torch.relu, Tensor.relu, F.gelu, F.silu, F.leaky_relu, F.elu, F.softplus, F.relu6], [matrix])
case([torch.tanh, F.tanh, Tensor.tanh, torch.sigmoid, F.sigmoid, Tensor.sigmoid, torch.special.expit], [matrix])
case([torch.exp, Tensor.exp, torch.square, Tensor.square, torch.abs, Tensor.abs, Tensor.__abs__], [matrix])
case([torch.sin, Tensor.sin, torch.cos, Tensor.cos, torch.neg, torch.negative, Tensor.neg, Tensor.__neg__], [matrix])
roots = [torch.log, Tensor.log, torch.sqrt, Tensor.sqrt, torch.rsqrt, Tensor.rsqrt]
case(roots, [matrix], lambda f, x: f(x.abs() + 0.5))
case([F.gelu], [matrix], lambda f, x: f(x, approximate="tanh"))
case([F.leaky_relu], [matrix], lambda f, x: f(x, 0.2))
case([F.elu], [matrix], lambda f, x: f(x, alpha=0.5))
case([F.softplus], [matrix], lambda f, x: f(20 * x, beta=2.0, threshold=3.0))
case([F.relu6], [matrix], lambda f, x: f(6 * x))
case([F.hardtanh], [matrix], lambda f, x: f(x, -0.5, 0.8))
for exponent in (0, 1, 2, 3.0, -1):
    case([torch.pow, Tensor.pow, Tensor.__pow__], [matrix], lambda f, x, e=exponent: f(x, e))
case([torch.pow], [matrix], lambda f, x: f(0 * x, 0))
case([torch.abs], [matrix], lambda f, x: f(torch.fft.fft(x)))
softmaxes = [F.softmax, torch.softmax, Tensor.softmax, F.log_softmax, torch.log_softmax, Tensor.log_softmax]
for dim in (-1, 0):
    case(softmaxes, [matrix], lambda f, x, d=dim: f(x, dim=d))
case([F.dropout, torch.dropout], [matrix], lambda f, x: f(x, 0.4, True))
case([F.dropout, torch.dropout], [matrix], lambda f, x: f(x, 0.4, False))

sums = [torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, torch.sub, torch.subtract, Tensor.sub, Tensor.__sub__]
sums += [Tensor.__rsub__, torch.rsub]
products = [torch.mul, torch.multiply, Tensor.mul, Tensor.__mul__, Tensor.__rmul__]
ratios = [torch.div, torch.divide, torch.true_divide, Tensor.div, Tensor.__truediv__]
turned = list(dict.fromkeys([Tensor.__rtruediv__, Tensor.__rdiv__]))
for shapes in ([(4, 3), (4, 3)], [(4, 3), (3,)], [(3,), (4, 3)], [(4, 1), (1, 3)], [(), (4, 3)]):
    case(sums + products, shapes)
    case(ratios, shapes, lambda f, x, y: f(x, y.abs() + 0.5))
    case(turned, shapes, lambda f, x, y: f(x.abs() + 0.5, y))
case([*sums, *products, *ratios], [matrix], lambda f, x: f(x, 2.5))
case(turned, [matrix], lambda f, x: f(x.abs() + 0.5, 2.5))
case([torch.add, Tensor.add, torch.sub, torch.rsub], [matrix, matrix], lambda f, x, y: f(x, y, alpha=3))
case([torch.div], [matrix], lambda f, x: f(1, x.abs() + 0.5) if f is not torch.div else f(x, 3, rounding_mode=None))
matmuls = [torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__]
case([torch.mm, Tensor.mm, *matmuls], [(3, 3), (3, 3)])
case([torch.bmm, Tensor.bmm, *matmuls], [(2, 3, 3), (2, 3, 3)])
for shapes in ([(3, 3), (2, 3, 3)], [(2, 3, 3), (3, 3)], [(2, 1, 3, 3), (4, 3, 3)], [(3,), (3, 3)]):
    case(matmuls, shapes)
attend = F.scaled_dot_product_attention
case([attend], [(2, 3, 4)] * 3)
case([attend], [(2, 2, 3, 4)] * 3, lambda f, *a: f(*a, is_causal=True, scale=0.3))
case([attend], [*[(2, 3, 4)] * 3, (3, 3)])
case([attend], [(2, 3, 4)] * 3, lambda f, *a: f(*a, torch.tensor([[1, 0, 1], [1, 1, 0], [0, 1, 1]]) > 0))

case([torch.flatten, Tensor.flatten], [image])
case([torch.flatten, Tensor.flatten], [image], lambda f, x: f(x, 1, -2))
case([torch.flatten], [()])
case([torch.reshape, Tensor.reshape], [matrix], lambda f, x: f(x, (2, -1)))
case([Tensor.reshape, Tensor.view], [matrix], lambda f, x: f(x, -1, 2))
case([torch.reshape], [matrix], lambda f, x: f(x, shape=(12,)))
exchanges = [torch.transpose, torch.swapaxes, Tensor.transpose, Tensor.swapaxes]
case(exchanges, [(4, 3, 2)], lambda f, x: f(x, 0, 1) * f(x, -2, -3))
case([Tensor.t, torch.t, Tensor.T.__get__, Tensor.mT.__get__], [matrix])
case([torch.permute, Tensor.permute], [(4, 3, 2)], lambda f, x: f(x, (2, -3, 1)))
case([Tensor.permute], [(4, 3, 2)], lambda f, x: f(x, 0, 2, 1))
case([torch.permute], [(4, 3, 2)], lambda f, x: f(x, dims=(1, 0, 2)))
for dim in (0, 1, -1, -3):
    case([torch.unsqueeze, Tensor.unsqueeze], [matrix], lambda f, x, d=dim: f(x, d))
for dims in ((), (1,), (-1,), (0,), ((1, 3),)):
    case([torch.squeeze, Tensor.squeeze], [(4, 1, 3, 1)], lambda f, x, d=dims: f(x, *d))
case([Tensor.expand], [(4, 1)], lambda f, x: f(x, 2, -1, 3))
case([Tensor.expand], [(4, 1)], lambda f, x: f(x, (4, 5)))
positions = torch.tensor([1, 1, 0])
for index in (0, slice(1, 3), (slice(None), 1), (..., None, 2), None, (), [0, 2], positions, (slice(None), positions)):
    case([Tensor.__getitem__], [matrix], lambda f, x, i=index: f(x, i))
for index in (slice(None, None, 2), (positions, positions), (1, slice(None), positions), positions > 0):
    case([Tensor.__getitem__], [(3, 4, 5)], lambda f, x, i=index: f(x, i))


def set_entries(f, x, value, index):
    y = (x * value.sum()).clone()
    f(y, index, value)
    return y


for index in (slice(1, 3), (slice(None, None, 2), slice(None)), torch.tensor([3, 0])):
    case([Tensor.__setitem__], [matrix, (2, 3)], lambda f, x, v, i=index: set_entries(f, x, v, i))
case([Tensor.__setitem__], [matrix, ()], lambda f, x, v: set_entries(f, x, v, (slice(None), 0)))
for dim in (0, 1, -1):
    joins = [torch.cat, torch.concat, torch.concatenate, torch.stack]
    case(joins, [matrix, matrix], lambda f, x, y, d=dim: f([x, y, torch.ones(4, 3).double()], d))
case([torch.chunk, Tensor.chunk], [matrix], lambda f, x: f(x, 2, dim=-1))
case([torch.split, Tensor.split], [matrix], lambda f, x: f(x, [1, 3], dim=0))
case([Tensor.clone, torch.clone, Tensor.contiguous], [matrix])
case([Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16], [matrix])
case([Tensor.to, Tensor.type], [matrix], lambda f, x: f(x, torch.float32))
case([Tensor.to], [image], lambda f, x: f(x, memory_format=torch.channels_last))
case([Tensor.type_as, Tensor.to], [matrix], lambda f, x: f(x, torch.zeros(1)))

for options in ({}, {"dim": -1}, {"dim": (0, 2), "keepdim": True}, {"dim": (0, 1, 2)}, {"dim": 0}):
    reductions = [torch.mean, Tensor.mean, torch.sum, Tensor.sum]
    case(reductions, [(4, 3, 2)], lambda f, x, o=options: f(x, **o))
case(reductions, [()])
pools = [F.max_pool1d, torch.max_pool1d, F.max_pool1d_with_indices]
case(pools, [(2, 4, 7)], lambda f, x: f(x, 3, stride=2, padding=1))
case([F.max_pool2d, torch.max_pool2d, F.max_pool2d_with_indices], [image], lambda f, x: f(x, 2))
case([F.avg_pool1d], [(2, 4, 7)], lambda f, x: f(x, 3, padding=1))
case([F.avg_pool2d], [image], lambda f, x: f(x, 2))
case([F.avg_pool3d], [(2, 2, 4, 4, 4)], lambda f, x: f(x, 2))
case([F.adaptive_avg_pool1d, torch.adaptive_avg_pool1d], [(2, 4, 7)], lambda f, x: f(x, 3))
case([F.adaptive_avg_pool2d], [image], lambda f, x: f(x, (1, 4)))
case([F.adaptive_avg_pool3d], [(2, 2, 4, 4, 4)], lambda f, x: f(x, 3))

for options in ({}, {"reduction": "sum"}, {"reduction": "none"}, {"ignore_index": 2}):
    case([F.cross_entropy, F.nll_loss], [matrix], lambda f, x, o=options: f(x, LABELS, **o))
weight = torch.tensor([1.0, 2.0, 3.0]).double()
case([F.cross_entropy, F.nll_loss], [matrix], lambda f, x: f(x, LABELS, weight))
case([F.cross_entropy], [(4, 3, 2)], lambda f, x: f(x, torch.stack([LABELS, LABELS.flip(0)], 1)))
for reduction in ("mean", "sum", "none"):
    case([F.mse_loss], [matrix, matrix], lambda f, x, y, r=reduction: f(x, y, reduction=r))

torch.backends.mha.set_fastpath_enabled(False)  # has no forward derivative, and forward mode would take it

# Calls to which the rule answers that it has none; the others must not fall back.
FALLS_BACK = {(torch.abs, 1), (F.embedding, 0), (Tensor.__getitem__, 10), (Tensor.__getitem__, 11)}
FALLS_BACK |= {(f, 5) for f in (torch.matmul, Tensor.matmul, Tensor.__rmatmul__)} | {(Tensor.__matmul__, 5)}


def name_of(key):
    function, i = key
    return f"{resolve_name(function) or function.__name__}-{i}"


class Calls(nn.Module):
    """One call; the first arguments as ``kinds`` says: plain tensors, parameters or activations."""

    def __init__(self, function, shapes, call, kinds):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.args = nn.ParameterList(torch.randn(s, generator=draw, dtype=torch.float64) for s in shapes)
        self.call, self.kinds = partial(call, function), kinds

    def forward(self, inputs):
        kinds = [*self.kinds, *self.kinds[-1:] * len(self.args)]
        make = {"plain": lambda p: p.data, "parameter": lambda p: p, "activation": lambda p: p * 1.5}
        return self.call(*(make[kind](p) for p, kind in zip(self.args, kinds, strict=False)))


def total(outputs, _=None):
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    return sum(out.double().sin().sum() for out in outputs if out.is_floating_point())


def assert_agrees_with_jvp(model, inputs, targets=None, loss=total, num_tangents=3, seed=0):
    params = params_of(model)
    objective = BatchLoss(model, inputs, targets, loss)
    tangents = normal(params, num_tangents, torch.Generator().manual_seed(seed))
    torch.manual_seed(1)
    value, slopes = stacked_jvp(objective, params, tangents)
    expected = []
    for k in range(num_tangents):
        torch.manual_seed(1)  # the same mask for Dropout
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward derivative
            expected.append(torch.func.jvp(objective, (params,), ({n: v[k] for n, v in tangents.items()},)))
    torch.testing.assert_close(value, expected[0][0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(slopes, torch.stack([slope for _, slope in expected]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("key", CASES, ids=name_of)
@torch.no_grad()
def test_rule_agrees_with_forward_mode(key):
    several = ("activation", "parameter"), ("plain", "parameter")
    for kinds in (*several, ("activation",), ("parameter",)):
        for num_tangents in (1, 3) if kinds in several else (1,):
            assert_agrees_with_jvp(Calls(key[0], *CASES[key], kinds), torch.zeros(1), num_tangents=num_tangents)


@pytest.mark.parametrize("limit", [0, 10**9], ids=["one of each row", "one of all rows"])
@pytest.mark.parametrize("key", [key for key in CASES if "conv" in key[0].__name__], ids=name_of)
@torch.no_grad()
def test_convolution_agrees_with_forward_mode_either_way(key, limit, monkeypatch):
    monkeypatch.setattr(rules, "NARROW", limit)
    for kinds in (("activation", "parameter"), ("plain", "parameter"), ("activation",), ("parameter", "plain")):
        for num_tangents in (1, 3):
            assert_agrees_with_jvp(Calls(key[0], *CASES[key], kinds), torch.zeros(1), num_tangents=num_tangents)


POOLS = {
    "pairs": lambda x: F.max_pool1d(x.flatten(2), 2),
    "squares": lambda x: F.max_pool2d(x, 2),
    "overlapping": lambda x: F.max_pool2d(x, 3, stride=(1, 2)),
    "dilated": lambda x: F.max_pool2d(x, (2, 1), dilation=(3, 2)),
    "large": lambda x: F.max_pool2d(x, 4, stride=1),
    "padded": lambda x: F.max_pool2d(x, 2, padding=1),
    "ceil_mode": lambda x: F.max_pool2d(x, 4, ceil_mode=True),
}


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "channels_last"])
@torch.no_grad()
def test_maximum_pooling_is_the_same_where_it_is_traced(pool, memory_format):
    def rows(stack):
        param = torch.zeros(())
        with Pass(Perturbation({"p": param}, 2, 4, random_signs), {"p": param}):
            return POOLS[pool](Dual(stack)).stack

    # few values, so that maxima tie
    stack = torch.randint(4, (3, 2, 3, 6, 7), generator=torch.Generator().manual_seed(0)).double()
    stack[1:] += torch.rand_like(stack[1:])
    stack = stack.flatten(0, 1).contiguous(memory_format=memory_format).unflatten(0, (3, 2))
    expected = rows(stack)
    torch.testing.assert_close(make_fx(rows)(stack)(stack), expected, rtol=0, atol=0)


@torch.no_grad()
def test_nan_passes_a_traced_maximum():
    def pooled(stack):
        param = torch.zeros(())
        with Pass(Perturbation({"p": param}, 1, 1, random_signs), {"p": param}):
            return F.max_pool1d(Dual(stack), 2).stack

    stack = torch.tensor([[[[1, math.nan, math.nan, 1]]], [[[1.0, 2, 3, 4]]]])
    assert make_fx(pooled)(stack)(stack)[0].isnan().all()


def test_every_rule_has_a_case():
    ours = {function for function, rule in RULES.items() if rule.__module__ == "fwdlib.stacked.rules"}
    assert ours == {function for function, _ in CASES} | set(CONSTANTS)


@pytest.mark.parametrize("key", [key for key in CASES if key not in FALLS_BACK], ids=name_of)
@torch.no_grad()
def test_rule_answers(key):
    calls = explain(Calls(key[0], *CASES[key], ("activation", "parameter")), torch.zeros(1))
    assert (calls[calls["function"] == resolve_name(key[0])]["by"] == "rule").all()


# functions whose results are constants

alone = [torch.argmax, Tensor.argmax, torch.argmin, Tensor.argmin, torch.argsort, Tensor.argsort, torch.isnan]
alone += [torch.isinf, torch.isfinite, Tensor.isnan, Tensor.isinf, Tensor.isfinite, Tensor.detach, torch.detach]
alone += [Tensor.data.__get__, Tensor.tolist, Tensor.__repr__, torch.zeros_like, torch.ones_like, Tensor.stride]
comparisons = [torch.gt, torch.ge, torch.lt, torch.le, torch.eq, torch.ne]
comparisons += [Tensor.gt, Tensor.ge, Tensor.lt, Tensor.le, Tensor.eq, Tensor.ne]
comparisons += [Tensor.__gt__, Tensor.__ge__, Tensor.__lt__, Tensor.__le__, Tensor.__eq__, Tensor.__ne__]
numbers = [Tensor.item, Tensor.__bool__, Tensor.__float__, Tensor.__int__]
CONSTANTS = {f: lambda f, x: f(x) for f in alone}
CONSTANTS |= {f: lambda f, x: f(x, x.flip(0)) for f in comparisons}
CONSTANTS |= {f: lambda f, x: f(x.sum()) for f in numbers}
CONSTANTS |= {f: lambda f, x: f(x, (2, 3)) for f in (Tensor.new_zeros, Tensor.new_ones)}
CONSTANTS |= {f: lambda f, x: f(x, (2, 3)) * 0 for f in (Tensor.new_empty,)}
CONSTANTS |= {f: lambda f, x: f(x) * 0 for f in (torch.empty_like, torch.rand_like, torch.randn_like)}
CONSTANTS[torch.full_like] = lambda f, x: f(x, 2)
CONSTANTS[Tensor.new_full] = lambda f, x: f(x, (2,), 2)
CONSTANTS[Tensor.new_tensor] = lambda f, x: f(x, [2.0])
CONSTANTS[Tensor.__format__] = lambda f, x: f(x.sum(), ".3f")
CONSTANTS[Tensor.numpy] = lambda f, x: f(x).tolist()


@pytest.mark.parametrize("function", CONSTANTS, ids=lambda f: resolve_name(f) or f.__name__)
@torch.no_grad()
def test_constant_is_that_of_the_primal(function):
    param = torch.arange(12.0).reshape(4, 3) % 5
    with Pass(Perturbation({"p": param}, 2, 4, random_signs), {"p": param}):
        found = CONSTANTS[function](function, param * 1.5)
    expected = CONSTANTS[function](function, param * 1.5)
    assert not isinstance(found, Dual)
    assert torch.equal(found, expected) if isinstance(found, Tensor) else found == expected


# functions without a rule, and those that write in place


def in_place(f):
    def call(x):
        y = x * 1
        f(y)
        return y

    return call


def add_to_itself(x):
    y = x * 1
    y += x
    y *= x
    return y


def write_through_a_view(x):
    y = x * 1
    y.view(-1).add_(x.flatten())
    y[:, 0] += y[:, 1]
    y.t().mul_(2)
    return y


MODELS = {
    "softsign": F.softsign,
    "var": lambda x: x.var(1),
    "amax": lambda x: x.amax(0),
    "maximum and its place": lambda x: x.max(1),
    "topk": lambda x: x.topk(2).values,
    "cumsum": lambda x: x.cumsum(0),
    "einsum": lambda x: torch.einsum("ij,kj->ik", x, x),
    "fft": lambda x: torch.fft.fft(x).abs(),
    "unpacked": lambda x: sum(row * i for i, row in enumerate(x)),
    "vectors": lambda x: x[0] @ x[1],
    "where": lambda x: torch.where(x > 0, x, x.exp()),
    "norm": lambda x: F.normalize(x).norm(),
    "log sigmoid": F.logsigmoid,
    "relu_": in_place(lambda y: y.relu_()),
    "torch.relu_": in_place(torch.relu_),
    "F.relu inplace": in_place(lambda y: F.relu(y, inplace=True)),
    "F.hardswish inplace": in_place(lambda y: F.hardswish(y, inplace=True)),
    "ELU inplace": in_place(nn.ELU(inplace=True)),
    "zero_": in_place(lambda y: y.zero_()),
    "copy_": in_place(lambda y: y.copy_(y.sin())),
    "clamp_": in_place(lambda y: y.clamp_(-0.5, 0.5)),
    "masked_fill_": in_place(lambda y: y.masked_fill_(y > 0, 2)),
    "+= and *=": add_to_itself,
    "through views": write_through_a_view,
    "a copy stays": lambda x: (lambda y, z: (y.mul_(2), z))(x * 1, (x * 1).clone())[1],
    "input by name": lambda x: F.softmax(input=x, dim=1),
    "scalar tensors do not widen": lambda x: x.float() * torch.tensor(2.0, dtype=torch.float64),
    "a mean over everything": lambda x: x.mean(),
    "centred by a mean over everything": lambda x: (x - x.mean()).square(),
    "nothing of it": lambda x: x.detach() * 2,
    "sqrt of the number of features": lambda x: x / x.shape[-1] ** 0.5,
}


@pytest.mark.parametrize("num_tangents", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_functions_without_a_rule_and_in_place_ones_agree_with_forward_mode(name, num_tangents):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3).double()

        def forward(self, inputs):
            return MODELS[name](self.linear(inputs))

    torch.manual_seed(0)
    assert_agrees_with_jvp(Model(), torch.randn(4, 3, dtype=torch.float64), num_tangents=num_tangents)


# parameters outside of layers


class Patches(nn.Module):
    """A vision transformer in small: class token, positions, attention by hand, a learned scale, a head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(1, 4, 2, stride=2)
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.positions = nn.Parameter(torch.randn(5, 4))
        self.norm = nn.LayerNorm(4)
        self.qkv = nn.Linear(4, 12)
        self.scale = nn.Parameter(torch.tensor(0.3))
        self.head = nn.Linear(4, 3)

    def forward(self, inputs):
        x = self.embed(inputs).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions[: x.shape[1] + 1]
        q, k, v = self.qkv(self.norm(x)).reshape(len(x), -1, 3, 2, 2).permute(2, 0, 3, 1, 4)
        x = x + self.scale * F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(x[:, 0])


class Tied(nn.Module):
    """A language model whose last layer is its embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.hidden = nn.Linear(4, 4)
        self.again = nn.Linear(4, 4)
        self.again.weight = self.hidden.weight

    def forward(self, inputs):
        x = self.again(torch.tanh(self.hidden(self.embedding(inputs))))
        return F.linear(x, self.embedding.weight).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, inputs):
        x = self.linear(inputs)
        return self.attention(x, x, x, need_weights=False)[0] + self.attention(x, x, x)[0]


@pytest.mark.parametrize("num_tangents", [1, 3])
def test_parameters_outside_of_layers(num_tangents):
    torch.manual_seed(0)
    images, words = torch.randn(3, 1, 4, 4, dtype=torch.float64), torch.tensor([[0, 4, 1], [2, 2, 3]])
    agrees = partial(assert_agrees_with_jvp, loss=F.cross_entropy, num_tangents=num_tangents)
    agrees(Patches().double(), images, torch.tensor([0, 1, 2]))
    agrees(Tied().double(), words, words.flip(1))


@pytest.mark.parametrize("num_tangents", [1, 3])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_transformer_layers(num_tangents, norm_first, training):
    torch.manual_seed(0)
    # no dropout: torch fills a mask in the order of memory, which is another one after torch's own transposes
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0, batch_first=True, norm_first=norm_first)
    inputs = torch.randn(3, 5, 4, dtype=torch.float64)
    for model in (layer, Attention()):
        assert_agrees_with_jvp(model.double().train(training), inputs, num_tangents=num_tangents)


@pytest.mark.parametrize("num_tangents", [1, 3])
@pytest.mark.parametrize("training", [True, False])
def test_norms_and_dropout_in_both_modes(num_tangents, training):
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout2d(0.4), nn.MaxPool2d(2)),
        *(nn.InstanceNorm2d(4, affine=True), nn.Flatten(), nn.Dropout(0.4, inplace=True), nn.Linear(16, 6)),
        *(nn.BatchNorm1d(6, affine=False), nn.LeakyReLU(), nn.PReLU(), nn.Linear(6, 3)),
    )
    model = model.double().train(training)
    for buffer in model.buffers():
        buffer += torch.rand_like(buffer.double()).to(buffer.dtype)
    assert_agrees_with_jvp(
        model, torch.randn(4, 2, 6, 6, dtype=torch.float64), LABELS, F.cross_entropy, num_tangents=num_tangents
    )


def test_a_row_of_the_table_at_padding_idx_has_no_tangent_as_it_has_no_gradient():
    table = nn.Embedding(4, 3, padding_idx=1).double()
    objective = BatchLoss(table, torch.tensor([[1, 2], [1, 0]]), None, total)
    tangents = normal(params_of(table), 2, torch.Generator().manual_seed(0))
    _, slopes = stacked_jvp(objective, params_of(table), tangents)
    total(table(objective.inputs)).backward()
    torch.testing.assert_close(slopes, (tangents["weight"] * table.weight.grad).sum((1, 2)))


# random compositions

BLOCKS = {
    "linear": lambda: nn.Linear(4, 4),
    "affine": lambda: nn.LayerNorm(4),
    "batch norm": lambda: nn.BatchNorm1d(3),
    "group norm": lambda: nn.GroupNorm(3, 3),
    "convolution": lambda: nn.Conv1d(3, 3, 3, padding=1),
    "grouped convolution": lambda: nn.Conv1d(3, 3, 3, padding="same", groups=3),
    "relu": lambda: nn.ReLU(inplace=True),
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "softmax": lambda: nn.Softmax(-1),
    "softsign": nn.Softsign,
    "pool": lambda: nn.AvgPool1d(3, 1, 1),
    "max pool": lambda: nn.MaxPool1d(3, 1, 1),
    "dropout": lambda: nn.Dropout(0.3),
    "attention": lambda: nn.MultiheadAttention(4, 2, batch_first=True),
}
JOINS = {
    "plain": lambda x, y: y,
    "residual": lambda x, y: x + y,
    "gate": lambda x, y: x * torch.sigmoid(y),
    "cat": lambda x, y: torch.cat([x, y], -1)[..., 2:6],
    "ratio": lambda x, y: y / (1 + x.square()),
    "transposed": lambda x, y: y.transpose(1, 2).reshape(x.shape),
    "product": lambda x, y: x @ x.transpose(-1, -2) @ y,
    "in place": lambda x, y: y.add_(x, alpha=0.5),
}


class Composition(nn.Module):
    def __init__(self, blocks, joins):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.blocks, self.joins = nn.ModuleList(BLOCKS[name]() for name in blocks), joins
        self.last = nn.Linear(12, 3)

    def forward(self, inputs):
        x = self.first(inputs)
        for block, join in zip(self.blocks, self.joins, strict=True):
            y = x.clone()
            y = block(y, y, y)[0] if isinstance(block, nn.MultiheadAttention) else block(y)
            x = JOINS[join](x, y)
        return self.last(x.flatten(1))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    pairs=st.lists(st.tuples(st.sampled_from(list(BLOCKS)), st.sampled_from(list(JOINS))), max_size=5),
    training=st.booleans(),
    num_tangents=st.integers(1, 3),
    loss=st.sampled_from([F.cross_entropy, F.mse_loss, F.l1_loss]),
    seed=st.integers(0, 2**31 - 1),
)
def test_random_compositions_agree_with_forward_mode(pairs, training, num_tangents, loss, seed):
    torch.manual_seed(seed)
    model = Composition([block for block, _ in pairs], [join for _, join in pairs]).double().train(training)
    targets = LABELS if loss is F.cross_entropy else torch.randn(4, 3, dtype=torch.float64)
    inputs = torch.randn(4, 3, 4, dtype=torch.float64)
    assert_agrees_with_jvp(model, inputs, targets, loss, num_tangents, seed)
