"""Duals: what they look like, and their rows."""

import copy

import pytest
import torch

from fwdlib.stacked.dual import METADATA, Dual, Passes, pad_rows, primals_of
from fwdlib.stacked.forward_pass import RULES


@pytest.fixture
def x():
    return Dual(torch.arange(24.0).reshape(2, 4, 3))


def test_dual_looks_like_its_primal(x):
    assert (x.shape, x.dtype, x.device, x.ndim) == ((4, 3), torch.float32, torch.device("cpu"), 2)
    assert (x.size(1), x.dim(), x.numel(), len(x)) == (3, 2, 12, 4)
    assert x.is_floating_point()
    assert [x.is_complex(), x.is_cuda] == [False] * 2
    assert x.is_cpu
    assert torch.equal(x.primal, x.stack[0])
    assert torch.equal(x.tangents, x.stack[1:])


def test_metadata_has_no_rules():
    assert not METADATA & RULES.keys()


def test_dual_of_a_pass_that_goes_on_in_another_thread_is_refused():
    number = Passes.begin()
    try:
        x = Dual(torch.zeros(2, 4, 3))
        assert repr(x) == "Dual(shape=(4, 3), num_tangents=1)"
        with pytest.raises(RuntimeError, match=r"torch\.exp was called on a tensor with tangents outside its pass"):
            torch.exp(x)
    finally:
        Passes.end(number)


def test_after_its_pass_a_dual_is_its_primal(x):
    for found in (torch.exp(x), x.detach() + 0, 1 * x, x.exp().clone()):
        assert type(found) is torch.Tensor
        assert not found.requires_grad
    assert torch.equal(torch.exp(x), x.primal.exp())
    assert x.argmax(1).tolist() == [2] * 4
    assert x.sum().item() == float(x.sum()) == x.primal.sum()
    assert torch.equal(x.data, x.primal)
    assert (x.numpy() == x.primal.numpy()).all()
    assert repr(x) == repr(x.primal)
    assert type(copy.deepcopy(x)) is torch.Tensor
    assert not x.requires_grad
    assert torch.as_tensor(x).shape == x.shape
    assert torch.equal(torch.func.vmap(torch.sin)(x), x.primal.sin())


def test_pad_rows_adds_zero_tangents_and_primals_of_takes_them_away(x):
    assert torch.equal(pad_rows(x.stack, 3)[:2], x.stack)
    assert not pad_rows(x.stack, 3)[2].any()
    found = primals_of({"a": [x, 1], "b": (x,)})
    assert torch.equal(found["a"][0], x.primal)
    assert found["a"][1] == 1
    assert not isinstance(found["b"][0], Dual)
