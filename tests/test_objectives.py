import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fwdlib.objectives import BatchLoss, ClosureLoss, assign_gradients, params_of


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))


@pytest.fixture
def batch():
    draw = torch.Generator().manual_seed(0)
    return torch.randn(8, 4, generator=draw), torch.randint(0, 3, (8,), generator=draw)


def test_batch_loss_is_the_loss_of_the_model(model, batch):
    inputs, targets = batch
    assert torch.equal(BatchLoss(model, *batch)(params_of(model)), F.cross_entropy(model(inputs), targets))


def test_batch_loss_takes_another_loss(model, batch):
    inputs, _ = batch
    objective = BatchLoss(model, inputs, torch.zeros(8, 3), loss=F.mse_loss)
    assert torch.equal(objective(params_of(model)), (model(inputs) ** 2).mean())


def test_calling_it_leaves_the_buffers_alone(model, batch):
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    BatchLoss(model, *batch)(params_of(model))
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())


def test_with_buffers_returns_what_a_forward_pass_would_have_left(model, batch):
    _, buffers = BatchLoss(model, *batch).with_buffers(params_of(model))
    model(batch[0])
    assert all(torch.equal(buffers[name], buffer) for name, buffer in model.named_buffers())


def test_params_of_leaves_out_frozen_and_counts_shared_once():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model[2].bias.requires_grad_(False)
    assert list(params_of(model)) == ["0.weight", "2.weight"]


def test_params_of_shares_storage(model):
    params_of(model)["0.weight"].zero_()
    assert model[0].weight.abs().sum() == 0


def test_assign_gradients_serves_any_optimizer(model):
    grads = {name: torch.ones_like(p) for name, p in params_of(model).items()}
    before = model[3].bias.detach().clone()
    assign_gradients(model, grads)
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    assert torch.allclose(model[3].bias, before - 0.5)


def test_assign_gradients_says_what_is_wrong(model):
    with pytest.raises(KeyError, match=r"'nowhere', which is no parameter of the model; it has 0\.weight"):
        assign_gradients(model, {"nowhere": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"grads\['0\.bias'\] must have shape \(5,\), got \(4,\)"):
        assign_gradients(model, {"0.bias": torch.zeros(4)})


@pytest.mark.parametrize("wrong", [{"x": torch.ones(8, 4)}, [torch.ones(8, 4)], torch.ones(8, 4).numpy(), None])
def test_inputs_that_are_no_tensor_are_refused(model, wrong):
    with pytest.raises(TypeError, match=r"inputs must be a tensor, got .* use ClosureLoss"):
        BatchLoss(model, wrong, torch.zeros(8, dtype=torch.long))


@pytest.mark.parametrize("wrong", ["5", 5.0, -1, True])
def test_a_number_of_examples_that_is_none_is_refused(model, wrong):
    with pytest.raises(ValueError, match="num_examples must be a whole number"):
        ClosureLoss(model, lambda: torch.zeros(()), wrong)


def test_an_objective_knows_a_layer_that_the_model_got_later(model, batch):
    objective, copies = BatchLoss(model, *batch), {name: p.clone() for name, p in params_of(model).items()}
    objective.check_names(copies)
    model.append(nn.Linear(3, 3))
    copies = {name: p.clone() for name, p in params_of(model).items()}
    assert torch.equal(objective(copies), F.cross_entropy(model(batch[0]), batch[1]))
    with pytest.raises(ValueError, match=r"params has 'far', .*4\.bias"):
        objective({"far": torch.zeros(1)})


# losses by closure, and models that are left as they were


class Ema(nn.Module):
    """A model that assigns a buffer, in place of changing it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 3)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        h = self.first(x)
        with torch.no_grad():
            self.mean = 0.9 * self.mean + 0.1 * h.mean(0)
        return self.second(h - self.mean)


def test_a_closure_loss_is_the_loss_of_the_closure():
    model, inputs, targets = nn.Linear(4, 3), torch.randn(5, 4), torch.randint(0, 3, (5,))
    closed = ClosureLoss(model, lambda: F.cross_entropy(model(inputs), targets))
    params = {name: torch.randn_like(p) for name, p in params_of(model).items()}
    assert torch.equal(closed(params), BatchLoss(model, inputs, targets)(params))


def test_calling_an_objective_leaves_a_model_that_assigns_a_buffer_as_it_was():
    model = Ema()
    before = dict(model.named_buffers()), dict(model.named_parameters())
    objective = BatchLoss(model, torch.randn(6, 5), torch.randint(0, 3, (6,)))
    _, buffers = objective.with_buffers({name: p + 1 for name, p in params_of(model).items()})
    assert buffers["mean"].any()
    assert not model.mean.any()
    for now, then in zip((dict(model.named_buffers()), dict(model.named_parameters())), before, strict=True):
        assert all(now[name] is then[name] for name in then)


def test_a_shared_module_is_swapped_once():
    shared = nn.PReLU()
    model = nn.Sequential(nn.Linear(4, 4), shared, nn.Linear(4, 4), shared)
    objective = BatchLoss(model, torch.randn(5, 4), torch.randint(0, 4, (5,)))
    weight = shared.weight
    at_zero = objective({**params_of(model), "1.weight": torch.zeros(1)})
    assert shared.weight is weight
    with torch.no_grad():
        weight.zero_()
        assert torch.equal(objective.run(), at_zero)


def test_a_model_is_left_as_it_was_when_its_forward_raises():
    model = nn.Linear(4, 3)
    weight = model.weight
    with pytest.raises(RuntimeError):
        BatchLoss(model, torch.randn(5, 7), torch.zeros(5).long())(params_of(model))
    assert model.weight is weight
