"""Calls with odd arguments: value, type, shape and tangents are torch's, and what torch refuses is refused."""

import functools
import warnings

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: F401
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

from fwdlib.stacked.dual import Dual
from fwdlib.stacked.forward_pass import Pass
from fwdlib.stacked.perturbations import Perturbation
from fwdlib.tangents import random_signs


def draw(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64).to(dtype)


def in_pass(call, x, tangents):
    with torch.no_grad(), Pass(Perturbation({"p": torch.zeros(())}, len(tangents), 4, random_signs), {}):
        return tree_leaves(call(Dual(torch.cat([x.unsqueeze(0), tangents]))))


def in_torch(call, x, tangents):
    with torch.no_grad():
        torch.manual_seed(0)
        values = tree_leaves(call(x.clone()))

    def real(x):
        torch.manual_seed(0)
        return tuple(y for y in tree_leaves(call(x)) if is_real(y))

    with sdpa_kernel(SDPBackend.MATH):
        return values, [torch.func.jvp(real, (x,), (v,))[1] for v in tangents] if any(map(is_real, values)) else []


def is_real(y):
    return isinstance(y, Tensor) and (y.is_floating_point() or y.is_complex())


def assert_as_torch(call, x, precise=None):
    """Compare; ``precise`` is the call whose derivatives in float64 are right, where torch's own are rough."""
    tangents = torch.stack([draw(*x.shape, dtype=x.dtype).roll(1), 0.5 - draw(*x.shape, dtype=x.dtype)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            expected, slopes = in_torch(call, x, tangents)
            if precise is not None:
                slopes = in_torch(precise, x.double(), tangents.double())[1]
        except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as error:
            if str(error) == "Found dtype Float but expected Double":
                pytest.skip("torch 2.11 cannot differentiate its own loss of two dtypes")
            with pytest.raises((RuntimeError, TypeError, ValueError, IndexError, AssertionError)):
                in_pass(call, x, tangents)
            return
        torch.manual_seed(0)
        found = in_pass(call, x, tangents)
    assert len(found) == len(expected)
    close = functools.partial(torch.testing.assert_close, equal_nan=True)
    real = 0
    for mine, theirs in zip(found, expected, strict=True):
        if not isinstance(theirs, Tensor):
            assert mine == theirs
            continue
        is_rough = precise is not None or theirs.dtype in (torch.float16, torch.bfloat16)
        bounds = {"rtol": 2e-2, "atol": 2e-2} if is_rough else {}
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        close(mine.primal if isinstance(mine, Dual) else mine, theirs, **bounds)
        if is_real(theirs):
            rows = mine.tangents if isinstance(mine, Dual) else torch.zeros(2, *theirs.shape, dtype=theirs.dtype)
            expected_rows = torch.stack([slope[real] for slope in slopes])
            if precise is not None:
                size = expected_rows.abs().max().clamp(min=1e-2).double()
                rows, expected_rows = rows.double() / size, expected_rows.double() / size
            close(rows, expected_rows, **bounds)
            real += 1


x, cube = draw(4, 3), draw(4, 2, 3)
labels, table = torch.tensor([0, 2, 1, 2]), torch.tensor([[0, 4], [2, 2]])
weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
keep = torch.tensor([[0, 0, 0], [1, 0, 1], [1, 1, 1]]).bool()
heads = lambda x: x.reshape(1, 4, 3, 1)  # noqa: E731
plain = nn.BatchNorm1d(3, affine=False, track_running_stats=False).double().eval()
stats = torch.arange(4).double(), torch.arange(1, 5).double()

NAMES = """
x.mean(axis=1, keepdims=True); x.sum(axis=(0, -1)); x.sum(dim=[]); x.sum(()); x.mean(keepdim=True, dim=None)
torch.sum(x, keepdim=True, dim=(0, 1)); torch.mean(input=x, dim=0); torch.sum(x=x, axis=0); torch.mean(a=x)
x.sum(np.int64(1)); x.sum(dtype=torch.float32); x.mean(0, dtype=torch.float16); x.sum(dtype=torch.int64)
x.sum(1, True); x.sum(0, 1); x.sum(0, 0, 0); x.sum(dim=-3); x.sum((0, 0)); x.mean(2); x.sum(dtype=torch.complex128)
torch.cat([x[:, :2], x[:, 2:]], axis=1); torch.cat(tensors=[x, x], dim=-1); torch.cat([torch.tensor([]), x], -1)
torch.cat([x, torch.tensor([])]); torch.cat([torch.tensor([]), torch.tensor([])]) + x; torch.cat([x[:0], x])
torch.cat(x); torch.cat((x, torch.ones(4, 3, dtype=torch.int64))); torch.cat([x, torch.ones(4, 3)])
torch.cat([x, x], 2); torch.cat([x, x[0]]); torch.cat([x.float(), torch.ones(4, 3).double()])
torch.cat([x.float(), torch.ones(4, 3) * 1j]); torch.concat([x, x], np.int64(1)); torch.cat([x[:, 0][:0], x[:, 0]])
torch.cat([x.half(), torch.tensor([])], 1); torch.cat([x, torch.zeros(4, 0)], 1); torch.cat([], 0)
torch.stack([x, x], axis=1); torch.stack(tensors=(x, x), dim=-1); torch.stack([x, x], -4)
torch.stack([x[0, 0], torch.tensor(1)]); torch.stack([x.float(), torch.ones(4, 3).double()])
torch.softmax(x, axis=1); torch.softmax(x, 1, torch.float32); torch.log_softmax(x, dim=-1, dtype=torch.float32)
x.softmax(-1, torch.float32); F.softmax(x, dim=1, dtype=torch.float16); F.softmax(x)
F.softmax(x, 1, 3, torch.float32); torch.softmax(x, -3); torch.softmax(x.sum(), 0); F.log_softmax(x, -1, 5)
x.log_softmax(0); torch.mm(x, mat2=x.t()); torch.mm(mat2=x.t(), input=x); torch.mm(x[None], x.t()[None])
torch.bmm(x[None], mat2=x.t()[None]); torch.bmm(x, x); torch.matmul(x, other=x.t()); torch.matmul(x, x2=x.t())
x @ x[0]; x[0] @ x.t(); torch.mm(x, x); x.matmul(x.t()[None]); x @ np.ones((3, 2))
torch.dropout(x, p=0.5, train=True); torch.dropout(x, 0.5, False); F.dropout(x, 1.0); F.dropout(x, 2.0, False)
F.dropout(x, 0.3, True, False); F.dropout(x.reshape(2, 3, 2), 0.3); F.alpha_dropout(x, 0.3, True)
F.dropout1d(x[None], 0.3); F.feature_alpha_dropout(x[None], 0.5, True); x.view(size=(6, 2)); x.reshape(shape=(-1,))
torch.reshape(x, (2, -1)); torch.reshape(input=x, shape=[12]); x.view(3, np.int64(4)); x.view(-1, -1)
x.view(torch.int64); x.view(dtype=torch.float64); x.reshape(np.int64(12)); x.view(5, -1); x[:0].reshape(-1, 3)
x[:0].view(0, 7); x.reshape(torch.tensor(12)); x.sum().view(()); x.sum().reshape(1, 1); x.sum().view(-1)
x.reshape([]); x.view(*x.shape); x.view([4, 3], [3]); x.view(torch.Size([12])); torch.unsqueeze(x, axis=1)
x.unsqueeze(-3); x.unsqueeze(3); x.unsqueeze(-4); x.unsqueeze(np.int64(0)); x.sum().unsqueeze(0)
x.unsqueeze(dim=-1); x[:1].squeeze(axis=0); x[:1].squeeze((0, 1)); x[:1].squeeze(dim=-2); x.squeeze(2)
x.sum().squeeze(0); x.sum().squeeze(); x[:1].squeeze(-3); x[:1].squeeze([0]); x.expand(size=(2, 4, 3))
x.expand(2, -1, -1); x.expand(-1, 4, 3); x.expand(4); x.sum().expand(2); x.sum().expand([])
x.expand(torch.Size([2, 4, 3])); x.transpose(dim0=0, dim1=-1); torch.swapaxes(x, axis0=0, axis1=1)
torch.transpose(x, -3, 0); x.transpose(0, 2); x.sum().transpose(0, 0); torch.swapdims(x, 0, 1)
x.permute(dims=(1, 0)); torch.permute(x, (1, -2)); x.permute(0); x.permute(0, 0); x.permute(2, 0)
x.sum().permute(()); x.permute([1, 0]); x.permute(*[np.int64(1), 0]); x.flatten(start_dim=-2); x.flatten(end_dim=0)
x.flatten(1, 0); x.flatten(-3); x.sum().flatten(0, 0); x.sum().flatten(1); x.sum().mT; x[0].T; x[None].mT; x[0].t()
x.chunk(chunks=2, dim=-1); torch.chunk(x, 3, axis=0); x.chunk(2, -3); x.split([1, 2], 1)
torch.split(x, split_size_or_sections=2, dim=-1); x.split(split_size=3)
torch.split(tensor=x, split_size_or_sections=[1, 3]); x.split(2, dim=2); x.split([1, 1]); x.chunk(5); x[:0].chunk(2)
x.split(np.int64(2)); x.split((2, 2)); x.unflatten(0, (2, 2)); torch.unflatten(x, dim=-1, sizes=[3, -1])
x.unflatten(1, [np.int64(1), 3]); x.unflatten(0, (2, 3)); x.unflatten(2, (1, 1)); x.sum().unflatten(0, (1,))
x[:0].unflatten(0, (0, 2)); x[:0].unflatten(1, (-1, 1)); x.unflatten(0, ()); x.unflatten(-3, (1,))
"""

INDICES = """
x[True]; x[False]; x[np.int64(1)]; x[np.array([0, 1])]; x[[True, False, True, True]]; x[[0, 1], [1, 2]]
x[[[0, 1], [1, 2]]]; x[torch.tensor(1)]; x[:, torch.tensor([True, False, True])]; x[x > 0]; x[..., -1]
x[None, ..., None]; x[...]; x[()]; x[1:, [0]]; x[[]]; x[range(2)]; x[torch.tensor([0, 1], dtype=torch.uint8)]
x[1, None, torch.tensor([0])]; x[torch.tensor([[0], [1]])]; x[0, 0, 0]; x[..., ..., 0]; x[4]; x[-4]
x[np.bool_(True)]; x[:, None, [2, 0]]; x[np.int64(1):np.int64(3)]; x[torch.tensor(1):]
x[torch.tensor([True, False, True, False]), 1]; x["a"]; x[1.5]; x[::2, ::-1]; x[[0, 1], :, None]
x[torch.zeros(0, dtype=torch.int64)]; x[[1, 2], ..., [0, 1]]; x[x[0]]; x[:, True]; x[None, [1]]; x[[0, None]]
x.sum()[None]; x.sum()[...]; x.sum()[()]; x.sum()[True]; x.sum()[0]; x[torch.tensor(True)]
x[torch.tensor([1, -1]), :]; x[5:]; x[[np.int64(0), 1]]; weights[x.argmax(1)] * x[:, 0]
torch.eye(3).double()[labels] * x; x[labels == 2]; x[:, :][labels]; x[slice(None), 1:][..., 0]
"""

NUMBERS = """
x * 2; 2 * x; x * True; x * np.float32(2); x * np.float64(2); np.float64(2) * x; x + np.int64(1); torch.add(2, x)
torch.sub(2, x); torch.mul(2, x); torch.div(2, x); 1 / x; x / 3; x - True; True - x; torch.rsub(x, 2, alpha=3)
torch.add(x, 2, alpha=3); torch.add(x, x, alpha=0.5); torch.sub(x, x[0], alpha=2); torch.add(input=x, other=x)
torch.mul(x1=x, x2=x); x.add(other=x); torch.add(x, x, out=None); x.div(2, rounding_mode="floor")
x.div(other=x, rounding_mode=None); torch.div(x, x + 3, rounding_mode="trunc"); x // 2; x % 2; x * 1j; 1j / x
x + 1j; x - 2j; x ** True; x ** np.int64(2); 2 ** x; x ** x; x ** 0.0; x ** -1; (0 * x) ** 1
torch.pow(x, exponent=2); torch.pow(input=x, exponent=torch.tensor(2)); x * torch.tensor(2)
x * torch.tensor(2.0, dtype=torch.float32); x + torch.ones(3); x * torch.arange(3); x - torch.arange(3)
torch.arange(3) - x; torch.arange(3) / x; torch.arange(3) > x; x + (x > 0); x - (x > 0); (x > 0) * x
x * torch.ones(2, 1, 1); x.float() * weights; x.float() + weights; weights - x.float(); x.float() / weights
weights / x.float(); x.half() * torch.ones(3); x.half() + torch.tensor(1.0); x.bfloat16() * x.half()
x.sum() * torch.ones(3); x.sum().half() * weights; x.sum() + x.float(); x.float() * x.sum(); x.sum().float() / x
x.half() - x.sum(); x.sum().half() * torch.tensor(2.0); x.sum().float() + torch.tensor([1, 2])
x.sum().half() * x.sum(); x * None; x + [1]; x + "a"; x * [1.0]; x == None; torch.arange(3) @ x.t()
x.float() @ weights; abs(x); torch.abs(input=x); -x; torch.neg(x, out=None); x.sqrt(); x.log(); torch.sin(a=x)
torch.exp(x, x); torch.sin(x, out=None); x.clone(memory_format=torch.preserve_format); x.expand(2, 4, 3) * 2 + x
x.t() * x.t(); x.reshape(2, 3, 2, 1).contiguous(memory_format=torch.channels_last) * 2
x.to(dtype=torch.float16, copy=True); x.to("cpu"); x.to("cpu", torch.float32); x.to(torch.int32)
x.type(torch.FloatTensor); x.type("torch.HalfTensor"); x.type(); x.type(dtype=torch.int64); x.long(); x.int() * x
x.bool(); x.to(torch.complex128).abs(); x.to(other=x.float()); x.to()
"""

LAYERS = """
F.gelu(x, approximate="tanh"); F.gelu(x, approximate="no"); F.softplus(x, 2); F.softplus(x, threshold=0.1, beta=3)
F.leaky_relu(x, negative_slope=-0.1); F.elu(x, 2.0); F.hardtanh(x, -0.1, 0.2); F.relu6(x * 9); F.silu(x)
F.elu(input=x, alpha=-1.0); torch.relu(x=x); F.hardtanh(x, min_val=0.0); F.relu(x, False)
F.leaky_relu(x, 0.1, False); F.cross_entropy(x, labels, label_smoothing=0.1)
F.cross_entropy(x, x.detach().softmax(1)); F.cross_entropy(x, x.softmax(1))
F.cross_entropy(x, labels, weights, reduction="none"); F.cross_entropy(x, labels, ignore_index=2)
F.cross_entropy(x[0], labels[0])
F.cross_entropy(x, labels, reduction="bad"); F.cross_entropy(x, labels, weights, None, 2, None, "sum")
F.cross_entropy(x, labels, size_average=False); F.cross_entropy(x, labels, reduce=False)
F.cross_entropy(x, target=labels, weight=weights)
F.cross_entropy(x, labels, weights, label_smoothing=0.2, ignore_index=1)
F.cross_entropy(x[:3], x.detach()[0]); F.cross_entropy(x, x.detach().long(), label_smoothing=0.1)
F.cross_entropy(x, x.detach(), ignore_index=1); F.cross_entropy(x, labels + 9, label_smoothing=0.1)
F.cross_entropy(x, labels * 0 + 5, ignore_index=5, label_smoothing=0.1, reduction="sum")
F.cross_entropy(x, labels.to(torch.uint8), label_smoothing=0.1); F.cross_entropy(x, labels, label_smoothing=2)
F.cross_entropy(x.float(), x.detach(), label_smoothing=0.1); F.cross_entropy(x, x.detach().float())
F.cross_entropy(cube * x.sum(), labels[:, None].expand(4, 3) % 2); F.cross_entropy(x, labels[:3])
F.cross_entropy(x, labels, x[0] ** 2); F.nll_loss(x, labels, weights, ignore_index=-100)
F.nll_loss(x[0], labels[0]); F.nll_loss(x, labels, reduction="sum"); F.nll_loss(x, labels.float())
F.mse_loss(x, x.detach() * 0, reduction="sum"); F.mse_loss(x, labels[:, None])
F.mse_loss(x, x * 2, reduction="bad"); F.mse_loss(x, x * 0, weight=x.detach() ** 2)
F.mse_loss(torch.ones(4, 3).double(), x); F.mse_loss(x.float(), x)
F.mse_loss(input=x, target=x * 2, reduction="none"); F.mse_loss(x, x * 2, None, None, "sum"); F.layer_norm(x, [3])
F.layer_norm(x, (3,), None, weights); F.layer_norm(x, (4,)); F.layer_norm(x, (4, 3), eps=0.1)
torch.layer_norm(x, [3], weights, None, 1e-5, False); F.layer_norm(x, (3,), weights, x[0]); F.layer_norm(x, ())
F.group_norm(x, 3); F.group_norm(x, 2); F.group_norm(x, 1, weights); F.group_norm(x[:1], 3)
torch.group_norm(x, 3, None, weights, cudnn_enabled=False); F.group_norm(x[0], 1)
F.batch_norm(x, None, None, training=True); F.batch_norm(x, weights, weights, weights, None, False, 0.1, 1e-3)
F.batch_norm(x, None, None); F.batch_norm(x, weights * 0, weights * 0 + 1, training=True, momentum=0.3)
F.batch_norm(x.t(), *stats, x[:, 0], x[:, 1]); F.batch_norm(x[:1], None, None, training=True)
F.batch_norm(x[0], None, None, training=True); F.batch_norm(x, weights, weights, bias=x[0]); plain(x)
nn.InstanceNorm1d(3).double()(cube.transpose(1, 2) * x.sum()); F.max_pool1d(x, 2)
F.max_pool1d(x[None], 2, return_indices=True); F.max_pool1d_with_indices(x[None], 2, 1)
F.max_pool1d(x, 2, stride=1, padding=1, dilation=2, ceil_mode=True); torch.max_pool1d(x[None], (2,), ())
torch.max_pool1d(x[None], kernel_size=2, stride=[1]); F.max_pool2d(x[None], (2, 1), return_indices=True)
F.max_pool2d(x[None, None], 2, 1, 1, ceil_mode=True); F.max_pool2d(x, 2); F.max_pool1d(x[None], np.int64(2))
torch.max_pool2d(x[None], 3, 2, 1); F.max_pool2d_with_indices(x[None], kernel_size=2)
torch.max_pool1d_with_indices(x[None], 2); F.adaptive_max_pool1d(x, 2); F.max_pool3d(x[None, None], (1, 2, 1))
F.avg_pool1d(x, 2, ceil_mode=True); F.avg_pool1d(x[None], 3, 1, 1, count_include_pad=False); F.avg_pool1d(x[0], 2)
F.avg_pool2d(x[None], 2, divisor_override=3); F.avg_pool2d(x[None], (2, 1), (1, 2), (1, 0), True, False, 5)
F.avg_pool3d(x[None, None], (1, 2, 2)); F.adaptive_avg_pool1d(x, 2); F.adaptive_avg_pool2d(x[None], (None, 2))
F.adaptive_avg_pool2d(x[None], 1); F.adaptive_avg_pool3d(x[None, None], (1, None, 2)); F.avg_pool2d(x, 2)
F.lp_pool1d(x, 2.0, 2); F.linear(x, x); F.linear(x, weight=weights[None], bias=None); F.linear(x[0], x)
F.linear(x, weights); F.linear(x[:0], x); F.linear(x, x, x[:, 0]); F.linear(x, torch.ones(2, 4).double())
F.linear(x[:, :0], x[:, :0]); F.linear(x, x, weights[:1]); F.embedding(table % 4, x)
F.embedding(table % 4, x, padding_idx=9); F.embedding(torch.tensor(2), x); torch.embedding(x, labels)
F.embedding(table, x); F.embedding(labels.int(), x); F.embedding(labels[:0], x)
F.conv1d(x[None], draw(2, 4, 2), padding="same"); F.conv1d(x, draw(2, 4, 2))
F.conv1d(x[None], draw(2, 4, 1), None, (1,), "valid"); F.conv1d(x[None], draw(2, 4, 3), padding="same", stride=2)
F.conv1d(x[None], draw(2, 4, 3), padding="full")
F.conv1d(x[None], draw(4, 1, 3), groups=4, padding=(2,), dilation=2)
F.conv1d(x[None], draw(4, 4, 3), bias=x[:, 0], padding=np.int64(1)); F.conv1d(draw(2, 4, 5), x[None, :, :])
F.conv1d(x[None], draw(2, 3, 1)); F.conv1d(x[:0][None], draw(2, 0, 1))
F.conv2d(x[None, None], draw(2, 1, 3, 3), torch.ones(2).double(), padding=1)
F.conv2d(x[None], draw(2, 1, 3, 3), padding="same")
F.conv2d(input=x[None, None], weight=draw(2, 1, 3, 1), stride=[2, 1], padding=[0, 1])
F.conv_transpose1d(x[None], draw(4, 2, 2)); F.scaled_dot_product_attention(cube, cube * x.sum(), cube, scale=-0.7)
F.scaled_dot_product_attention(x, x, x); F.scaled_dot_product_attention(x[:3], x[:3], x[:3], attn_mask=keep)
F.scaled_dot_product_attention(x[:3], x[:3], x[:3], keep)
F.scaled_dot_product_attention(x[:3], x[:3], x[:3], torch.zeros(3, 3).double().masked_fill(~keep, -torch.inf))
F.scaled_dot_product_attention(x[:3], x[:3], x[:3], keep, is_causal=True)
F.scaled_dot_product_attention(x[:2], x, x, is_causal=True)
F.scaled_dot_product_attention(x, x[:2], x[:2], is_causal=True)
F.scaled_dot_product_attention(x[:3], x[:3], x[:3], keep.long())
F.scaled_dot_product_attention(query=x[:3], key=x[:3], value=x[:3], attn_mask=x[:3])
F.scaled_dot_product_attention(heads(x), heads(x)[:, :2], heads(x)[:, 2:], enable_gqa=True)
F.scaled_dot_product_attention(x[0], x[0], x[0]); F.scaled_dot_product_attention(x, x, x, x @ x.t(), scale=0.0)
torch.where(x > 0, x, 0); torch.argmax(x, axis=1); x.argsort(descending=True)
torch.full_like(x, 3, dtype=torch.int64); x.new_zeros(2, 3, dtype=torch.float16); torch.gt(x, other=0)
torch.eq(input=x, other=x); x.ne(x + 1); torch.isnan(input=x)
"""


def calls(text):
    return [call for line in text.strip().splitlines() for call in line.split("; ")]


def call_of(source):
    code = compile(source.strip(), source, "eval")
    return lambda value: eval(code, globals() | {"x": value})


@pytest.mark.parametrize("source", calls(NAMES) + calls(INDICES) + calls(NUMBERS) + calls(LAYERS))
def test_call_is_torchs(source):
    assert_as_torch(call_of(source), x.abs() + 0.1 if "log()" in source or "sqrt" in source or "j" in source else x)


HALF = """
h / 1e5 * 6e4; h * 1e-4 * 1e4; (h * 1e-3) * 1e5; h + 7e4; 1e5 - h
h * 1e-2 * torch.tensor(1e5) * 1e-3; (h * 1e-5).mul(1e5)
1e5 / (h * 0 + 1e3); (h * 0 + 300).mean(); h.square().mean((0, 1)); (h * 1e3).sum().float()
F.layer_norm(h * 400, (3,)); F.group_norm(h * 400, 1)
F.batch_norm(h, stats[0][:3].to(h.dtype), stats[1][:3].to(h.dtype)); F.batch_norm(h, None, None, training=True)
F.batch_norm(h, stats[0][:3].to(wide(h)), stats[1][:3].to(wide(h)), eps=1e-7); F.softmax(h * 4, 1); F.log_softmax(h, 1)
torch.softmax(h, 1, torch.float32); F.gelu(h); h ** 2; h.sqrt(); torch.log(h); h * weights
F.cross_entropy(h.float(), labels); F.mse_loss(h, h * 2); F.scaled_dot_product_attention(h[:3], h[:3], h[:3], keep)
F.linear(h, h); h @ h.t(); h.mean(dtype=torch.float32); h + torch.arange(3); h.sum() * torch.ones(3)
"""


def wide(x):
    return torch.promote_types(x.dtype, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("source", calls(HALF))
def test_call_is_torchs_in_low_precision(source, dtype):
    h = (x.abs() + 0.1).to(dtype)
    call = call_of(f"(lambda h: {source})(x)")
    assert_as_torch(call, h, call)


AUTOCAST = """
F.linear(c, c, c[:, 0] * 2); F.conv1d(c[None], draw(2, 4, 2).to(c.dtype), torch.ones(2).to(c.dtype))
F.conv1d(c[None], draw(2, 4, 2).to(c.dtype)) * 2; F.layer_norm(c @ c.t(), (4,)); F.cross_entropy(c @ c.t(), labels)
F.mse_loss(c @ c.t(), c @ c.t() * 2); F.nll_loss(F.log_softmax(c @ c.t(), 1), labels); (c @ c.t()).sum()
(c @ c.t()) ** 2; F.scaled_dot_product_attention(c, c, c); c @ c.t() + c[:, :1]; torch.softmax(c @ c.t(), 1)
F.group_norm((c @ c.t())[None], 2); F.batch_norm(c @ c.t(), None, None, training=True); torch.cat([c @ c.t(), c], 1)
F.avg_pool1d((c @ c.t())[None], 2); torch.where(c > 0, c, 0) @ c.t(); F.gelu(c @ c.t()); F.dropout(c @ c.t(), 0.5)
"""


@pytest.mark.parametrize("source", calls(AUTOCAST))
def test_call_is_torchs_under_autocast(source):
    def call(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return call_of(f"(lambda c: {source})(x)")(x)

    assert_as_torch(call, x.float(), call_of(f"(lambda c: {source})(x)"))


def test_a_complex_power_of_a_real_number():
    found = in_pass(lambda x: x**2j, x.abs(), torch.ones(1, 4, 3).double())[0]
    torch.testing.assert_close(found.tangents[0], 2j * x.abs() ** (2j - 1))


AXES = st.one_of(st.integers(-4, 4), st.none(), st.lists(st.integers(-3, 2), max_size=3).map(tuple))
ENTRIES = st.one_of(
    st.integers(-3, 3),
    st.builds(slice, *[st.none() | st.integers(-3, 4)] * 2, st.none() | st.integers(1, 3)),
    st.sampled_from([None, Ellipsis, True, False, [0, 1], [True, False], np.int64(1)]),
    st.lists(st.integers(-2, 1), max_size=3),
    st.lists(st.integers(-2, 1), min_size=1, max_size=3).map(torch.tensor),
)
SHAPES = st.sampled_from([(), (3,), (4, 3), (2, 1, 3), (1, 1), (0, 2), (2, 2, 2)])
OPERANDS = st.one_of(
    st.sampled_from([2, -3.5, True, 1e5, np.float32(2), np.int64(3), 2 + 1j, torch.tensor(3), torch.tensor(1.5)]),
    st.builds(
        lambda shape, dtype: (draw(*shape) * 3).to(dtype),
        SHAPES,
        st.sampled_from([torch.float64, torch.float32, torch.float16, torch.int64, torch.bool]),
    ),
)
BINARY = [torch.add, torch.sub, torch.mul, torch.div, torch.rsub, Tensor.__rtruediv__, torch.matmul, torch.pow]


@st.composite
def odd_calls(generate):
    kind = generate(st.sampled_from(["reduce", "index", "binary", "axis", "join"]))
    if kind == "reduce":
        function = generate(st.sampled_from([torch.sum, torch.mean, Tensor.sum, Tensor.mean]))
        names = generate(st.sampled_from([("dim", "keepdim"), ("axis", "keepdims"), ("dim", "keepdims")]))
        options = dict(zip(names, (generate(AXES), generate(st.booleans())), strict=True))
        return lambda x: function(x, **options)
    if kind == "index":
        index = tuple(generate(st.lists(ENTRIES, max_size=4)))
        index = index[0] if len(index) == 1 else index
        return lambda x: x[index]
    if kind == "binary":
        function, other = generate(st.sampled_from(BINARY)), generate(OPERANDS)
        if function is torch.pow and isinstance(other, complex):
            other = 2  # torch's own derivative drops the imaginary part
        turns = generate(st.booleans()) and isinstance(other, Tensor)
        with_tangents = generate(st.booleans()) and isinstance(other, Tensor)
        operand = (lambda x: (x.sum() * 0 + 1) * other) if with_tangents else lambda x: other
        if function is torch.pow and with_tangents:  # 0 times a slope that is not finite is nan in torch, and 0 here
            return lambda x: torch.pow(*[y.abs() + 0.5 for y in (operand(x), x)][:: 1 if turns else -1])
        return lambda x: function(operand(x), x) if turns else function(x, operand(x))
    if kind == "join":
        function = generate(st.sampled_from([torch.cat, torch.stack]))
        dim, others = generate(st.integers(-4, 3)), generate(st.lists(OPERANDS, max_size=2))
        return lambda x: function([*others, x, x], dim)
    function = generate(
        st.sampled_from(
            [
                *(torch.unsqueeze, torch.squeeze, torch.softmax, torch.log_softmax, Tensor.flatten, Tensor.expand),
                *(Tensor.transpose, Tensor.permute, Tensor.view, Tensor.chunk, torch.split),
            ]
        )
    )
    arguments = generate(st.lists(st.integers(-4, 4) | st.integers(-3, 3).map(np.int64), max_size=3))
    return lambda x: function(x, *arguments)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(odd_calls(), SHAPES, st.sampled_from([torch.float64, torch.float32]))
def test_any_call_is_torchs(call, shape, dtype):
    assert_as_torch(call, (draw(*shape).abs() + 0.5).to(dtype))
