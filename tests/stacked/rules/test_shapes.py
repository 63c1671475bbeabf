"""The layout of a tensor in memory is torch's, on which strides and views of the memory depend."""

import pytest
import torch

from tests.stacked.against_backprop import Net, assert_as_backprop

LAYOUTS = {
    "contiguous": lambda h: h.t().contiguous(),
    "contiguous, expanded": lambda h: h[0].expand(6, 6).contiguous(),
    "a copy": lambda h: h.t().clone(),
    "a contiguous copy": lambda h: h.t().clone(memory_format=torch.contiguous_format),
    "a copy of a slice": lambda h: h.t()[1:].clone(),
    "channels last": lambda h: h.view(1, 3, 3, 4).contiguous(memory_format=torch.channels_last),
    "a copy with channels last": lambda h: h.view(1, 3, 3, 4).clone(memory_format=torch.channels_last),
    "converted to channels last": lambda h: h.view(1, 3, 3, 4).to(memory_format=torch.channels_last),
    "converted by name": lambda h: h.view(1, 3, 3, 4).double(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("num_tangents", [1, 3])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_is_torchs(name, num_tangents):
    def body(_, h):
        y = LAYOUTS[name](h)
        return h * (y.as_strided((6,), (1,)) + sum(y.stride()))

    assert_as_backprop(lambda: Net(body), num_tangents)


def test_layout_is_asked_of_the_primal():
    def body(model, h):
        drawn = torch.distributions.Exponential(h.exp()).sample()
        return h * (2 if h.t().is_contiguous() else 3) * (2 if h.is_contiguous() else 5) + 0 * drawn

    assert_as_backprop(lambda: Net(body))
