"""For each rule its calls, and the comparison of a call with torch.func.jvp in float64."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import resolve_name

from fwdlib.objectives import BatchLoss, params_of
from fwdlib.stacked.estimator import stacked_jvp
from fwdlib.tangents import normal

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
case([torch.embedding], [(5, 3)], lambda f, w: f(w, torch.tensor([[0, 4], [2, 2]])))
case([F.batch_norm], [image], lambda f, x: f(x, torch.arange(4).double(), torch.arange(1, 5).double()))
case([F.layer_norm], [(4, 2, 3), (2, 3), (2, 3)], lambda f, x, w, b: f(x, (2, 3), w, b))
case([F.layer_norm, torch.layer_norm], [(4, 3)], lambda f, x: f(x, (3,)))
case([F.group_norm, torch.group_norm], [image, (4,), (4,)], lambda f, x, w, b: f(x, 2, w, b))

case([F.relu, torch.relu, Tensor.relu, F.gelu, F.silu, F.leaky_relu, F.elu, F.softplus, F.relu6], [matrix])
case([F.hardswish, F.hardsigmoid], [matrix], lambda f, x: f(4 * x))
case([torch.tanh, F.tanh, Tensor.tanh, torch.sigmoid, F.sigmoid, Tensor.sigmoid, torch.special.expit], [matrix])
case([torch.exp, Tensor.exp, torch.square, Tensor.square, torch.abs, Tensor.abs, Tensor.__abs__], [matrix])
case([torch.sin, Tensor.sin, torch.cos, Tensor.cos, torch.neg, torch.negative, Tensor.neg, Tensor.__neg__], [matrix])
complexes = [torch.tanh, F.tanh, Tensor.tanh, torch.sigmoid, F.sigmoid, Tensor.sigmoid]
case(complexes, [matrix, matrix], lambda f, x, y: torch.view_as_real(f(torch.complex(x, y))))
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
for train in (True, False):
    case([torch.native_dropout], [matrix], lambda f, x, t=train: f(x, 0.4, t))

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
for equation, *shapes in (
    ("bi,ij->bj", (4, 3), (3, 2)),
    ("bi,bj->bij", (4, 3), (4, 2)),
    ("b i, j i -> j b", (4, 3), (2, 3)),
    ("bihd,bjhd->bhij", (2, 3, 2, 4), (2, 5, 2, 4)),
    ("ii,i,->i", (3, 3), (3,), ()),
    ("...i,ij->...j", (2, 4, 3), (3, 2)),
    ("i...,...->...", (2, 4, 3), (1, 3)),
    ("AB,Bb,bC->AC", (2, 3), (3, 4), (4, 2)),
):
    case([torch.einsum], shapes, lambda f, *operands, e=equation: f(e, *operands))
case([torch.einsum], [(3, 3), (3, 2)], lambda f, *operands: f("ij,jk->ik", list(operands)))
case([torch.einsum], [(3, 2)], lambda f, x: f("ij->ji", x))
case([torch.einsum], [(3, 2), (2, 3)], lambda f, x, y: f("ij,jk", x, y))
case([torch.einsum], [(3, 2), (2, 3)], lambda f, x, y: f(x, [0, 1], y, [1, 2], [0, 2]))
attend = F.scaled_dot_product_attention
case([attend], [(2, 3, 4)] * 3)
case([attend], [(2, 2, 3, 4)] * 3, lambda f, *a: f(*a, is_causal=True, scale=0.3))
case([attend], [*[(2, 3, 4)] * 3, (3, 3)])
case([attend], [(2, 3, 4)] * 3, lambda f, *a: f(*a, torch.tensor([[1, 0, 1], [1, 1, 0], [0, 1, 1]]) > 0))

packed = [(12, 4), (12,), (4, 4), (4,)]
case(
    [F.multi_head_attention_forward],
    [*[(3, 2, 4)] * 3, *packed],
    lambda f, q, k, v, w, b, *o: f(q, k, v, 4, 2, w, b, None, None, False, 0.0, *o, need_weights=False)[0],
)
case([F.conv2d], [image, (6, 4, 1, 1), (6,)])
case([F.conv2d], [(3, 4, 2, 1), (6, 4, 1, 1), (6,)])

case([torch.flatten, Tensor.flatten], [image])
case([torch.flatten, Tensor.flatten], [image], lambda f, x: f(x, 1, -2))
case([torch.flatten], [()])
case([torch.unflatten, Tensor.unflatten], [matrix], lambda f, x: f(x, -1, (3, -1)))
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
case([torch.unbind, Tensor.unbind], [matrix], lambda f, x: f(x, dim=-1))
case([torch.split, Tensor.split], [matrix], lambda f, x: f(x, [1, 3], dim=0))
case([Tensor.clone, torch.clone, Tensor.contiguous], [matrix])
case([Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16], [matrix])
case([Tensor.to, Tensor.type], [matrix], lambda f, x: f(x, torch.float32))
for memory_format in (torch.channels_last, torch.contiguous_format):
    formatted = [Tensor.to, Tensor.float, torch.clone, Tensor.clone, Tensor.contiguous]
    case(formatted, [image], lambda f, x, m=memory_format: f(x.transpose(2, 3), memory_format=m))
complexes = [Tensor.cdouble, Tensor.cfloat, Tensor.chalf]
case(complexes, [image], lambda f, x: torch.view_as_real(f(x, memory_format=torch.channels_last).to(torch.complex128)))
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
    options = {"reduction": reduction, "label_smoothing": 0.2}
    pairs = torch.stack([LABELS, LABELS.flip(0)], 1)
    case([F.cross_entropy], [(4, 3, 2)], lambda f, x, o=options, t=pairs: f(x, t, ignore_index=1, **o))
    shares = torch.arange(12.0).view(4, 3) / 10
    case([F.cross_entropy], [matrix], lambda f, x, o=options, t=shares: f(x, t, **o))
for reduction in ("mean", "sum", "none"):
    case([F.mse_loss], [matrix, matrix], lambda f, x, y, r=reduction: f(x, y, reduction=r))

torch.backends.mha.set_fastpath_enabled(False)  # it has no forward derivative, and torch would use it in forward mode

# The calls whose rule returns NotImplemented. No other call may fall back on torch.func.jvp.
FALLS_BACK = {(torch.abs, 1), (Tensor.__getitem__, 10), (Tensor.__getitem__, 11)}
FALLS_BACK |= {(torch.einsum, i) for i in (9, 10, 11)}
FALLS_BACK |= {(f, 5) for f in (torch.matmul, Tensor.matmul, Tensor.__rmatmul__)} | {(Tensor.__matmul__, 5)}


def name_of(key):
    function, i = key
    return f"{resolve_name(function) or function.__name__}-{i}"


class Calls(nn.Module):
    """A model that makes one call. ``kinds`` of its arguments: plain tensors, parameters or activations."""

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
        torch.manual_seed(1)  # so that Dropout draws the same mask
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward derivative
            expected.append(torch.func.jvp(objective, (params,), ({n: v[k] for n, v in tangents.items()},)))
    torch.testing.assert_close(value, expected[0][0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(slopes, torch.stack([slope for _, slope in expected]), rtol=1e-10, atol=1e-12)
