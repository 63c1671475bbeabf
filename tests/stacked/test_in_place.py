"""Which functions write in place, by torch's schemas."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fwdlib.stacked.in_place import in_place


@pytest.mark.parametrize(
    ("function", "counterpart"),
    [
        (Tensor.add_, Tensor.add),
        (Tensor.__iadd__, Tensor.__add__),
        (Tensor.pow_, Tensor.pow),
        (torch.relu_, Tensor.relu),
        (Tensor.index_put_, Tensor.index_put),
        (torch.ops.aten.mul_, Tensor.mul),
        (torch.ops.aten.mul_.Tensor, Tensor.mul),
        (F.elu_, torch.ops.aten.elu),  # F.elu takes other arguments
        (Tensor.normal_, None),  # torch.normal is another function
        (Tensor.bernoulli_, None),  # Tensor.bernoulli takes its probabilities from the tensor
        (Tensor.random_, None),  # torch.random is a module
        (torch.dropout_, None),
        (Tensor.copy_, None),
    ],
)
def test_the_counterpart_computes_the_same(function, counterpart):
    found = in_place(function)
    assert found.counterpart is counterpart
    assert found.is_known
    assert not found.moves


@pytest.mark.parametrize(
    "function", [Tensor.add, torch.relu, Tensor.__index__, Tensor.__int__, Tensor.__invert__, Tensor.share_memory_, len]
)
def test_others_write_nothing(function):
    assert in_place(function) is None


@pytest.mark.parametrize("function", [Tensor.squeeze_, Tensor.t_, Tensor.resize_, Tensor.set_, Tensor.as_strided_])
def test_changes_of_shape_or_memory_are_marked(function):
    assert in_place(function).moves
