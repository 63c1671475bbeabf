"""How a model is cut into blocks, and that no derivative passes from one to another."""

from __future__ import annotations

import torch
from torch import nn

from fwdlib.methods.blocks import ErrorsOfBlocks, Network, blocks_of, shapes_of
from fwdlib.trainer.networks import LocalMixer, alexnet, fully_connected, shallow_cnn


def test_blocks_of_the_models_of_the_study():
    assert [len(block) for block in blocks_of(fully_connected())] == [4, 3, 1]
    assert [len(block) for block in blocks_of(shallow_cnn())] == [3, 3, 5, 1]
    assert len(blocks_of(alexnet())) == 8


def test_shapes_are_those_of_the_hidden_outputs_and_the_model_stays_as_it_was():
    model = shallow_cnn()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert shapes_of(model, torch.randn(2, 1, 28, 28)) == (10, [[(15, 24, 24)], [(40, 20, 20)], [(128,)]])
    assert model.training
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_inner_layers_are_sites_and_tapes_start_at_the_site_before():
    model, images = LocalMixer("M/8/16", 3, 32), torch.randn(2, 3, 32, 32)
    assert [len(of_block) for of_block in shapes_of(model, images)[1]] == [2, 3, 3, 3]
    outputs, tangents = Network(model).run(None, images, [None] * 11)
    assert tangents is None
    torch.testing.assert_close(outputs[-1], model(images))
    (grad,) = torch.autograd.grad(outputs[1].sum(), model.embedding[0][0].weight, allow_unused=True)
    assert grad is None
    torch.autograd.grad(outputs[1].sum(), model.embedding[1].weight)


def test_tangents_that_enter_at_all_sites_come_out_as_the_derivative_along_them():
    torch.manual_seed(0)
    model, images = LocalMixer("M/8/16", 3, 8).double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    shapes = [shape for of_block in shapes_of(model, images)[1] for shape in of_block]
    u = [torch.randn(1, 2, *shape, dtype=torch.float64) for shape in shapes]
    _, tangents = Network(model).run(None, images, u)
    layers = [module for block in model.blocks()[:-1] for module in (*block.layers(), block)]

    def shifted(t):
        handles = [
            layer.register_forward_hook(lambda _, __, output, i=i: output + t * u[i][0])
            for i, layer in enumerate(layers)
        ]
        try:
            return model(images)
        finally:
            for handle in handles:
                handle.remove()

    _, expected = torch.func.jvp(
        shifted, (torch.zeros((), dtype=torch.float64),), (torch.ones((), dtype=torch.float64),)
    )
    torch.testing.assert_close(tangents[0], expected, rtol=1e-9, atol=1e-11)


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
