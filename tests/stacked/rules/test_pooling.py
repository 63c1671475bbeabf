"""Maximum pooling has the same results where it is traced."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from fwdlib.stacked.dual import Dual
from fwdlib.stacked.forward_pass import Pass
from fwdlib.stacked.perturbations import Perturbation
from fwdlib.tangents import random_signs

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
