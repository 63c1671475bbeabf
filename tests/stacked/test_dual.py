"""Duals: what they look like, and their rows."""

import pytest
import torch

from fwdlib.stacked.dual import METADATA, Dual, pad_rows, primals_of
from fwdlib.stacked.forward_pass import RULES


@pytest.fixture
def x():
    return Dual(torch.arange(24.0).reshape(2, 4, 3))


def test_dual_looks_like_its_primal(x):
    assert (x.shape, x.dtype, x.device, x.ndim) == ((4, 3), torch.float32, torch.device("cpu"), 2)
    assert (x.size(1), x.dim(), x.numel(), len(x)) == (3, 2, 12, 4)
    assert x.is_floating_point()
    assert x.requires_grad
    assert [x.is_complex(), x.is_cuda] == [False] * 2
    assert x.is_cpu
    assert repr(x) == "Dual(shape=(4, 3), num_tangents=1)"
    assert torch.equal(x.primal, x.stack[0])
    assert torch.equal(x.tangents, x.stack[1:])


def test_metadata_has_no_rules():
    assert not METADATA & RULES.keys()


def test_dual_is_refused_outside_its_pass(x):
    with pytest.raises(RuntimeError, match=r"torch\.exp was called on a dual tensor outside its pass"):
        torch.exp(x)


def test_pad_rows_adds_zero_tangents_and_primals_of_takes_them_away(x):
    assert torch.equal(pad_rows(x.stack, 3)[:2], x.stack)
    assert not pad_rows(x.stack, 3)[2].any()
    found = primals_of({"a": [x, 1], "b": (x,)})
    assert torch.equal(found["a"][0], x.primal)
    assert found["a"][1] == 1
    assert not isinstance(found["b"][0], Dual)
