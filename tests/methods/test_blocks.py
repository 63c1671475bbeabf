"""How a model is cut into blocks, and that no derivative passes from one to another."""

from __future__ import annotations

import torch
from torch import nn

from fwdlib.methods.blocks import ErrorsOfBlocks, Network, blocks_of, shapes_of
from fwdlib.trainer.networks import alexnet, fully_connected, shallow_cnn


def test_blocks_of_the_models_of_the_study():
    assert [len(block) for block in blocks_of(fully_connected())] == [4, 3, 1]
    assert [len(block) for block in blocks_of(shallow_cnn())] == [3, 3, 5, 1]
    assert len(blocks_of(alexnet())) == 8


def test_shapes_are_those_of_the_hidden_outputs_and_the_model_stays_as_it_was():
    model = shallow_cnn()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert shapes_of(model, torch.randn(2, 1, 28, 28)) == (10, [(15, 24, 24), (40, 20, 20), (128,)])
    assert model.training
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_a_network_finds_its_tensors_where_they_are_even_after_they_were_replaced():
    model = fully_connected(4, 1, 8, 3)
    network = Network(model)
    assert network.tensors().keys() == {*dict(model.named_parameters()), *dict(model.named_buffers())}
    model[1].weight = nn.Parameter(torch.zeros(8, 4))
    assert network.tensors()["1.weight"] is model[1].weight


def test_blocks_get_the_errors_that_they_are_handed_and_the_logits_their_own():
    logits, hidden = torch.randn(2, 3, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    handed = ErrorsOfBlocks.apply(lambda error: [error.sum() * torch.ones(2, 4)], logits, hidden)
    assert torch.equal(handed, logits)
    of_logits, of_hidden = torch.autograd.grad((handed * torch.arange(3.0)).sum(), [logits, hidden])
    assert torch.equal(of_logits, torch.arange(3.0).expand(2, 3))
    assert torch.equal(of_hidden, torch.full((2, 4), 6.0))
