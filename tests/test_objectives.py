import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.optimize
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import nn

from fwdlib.objectives import (
    BatchLoss,
    ClosureLoss,
    as_objective,
    assign_gradients,
    beale,
    params_of,
    rosenbrock,
    sphere,
    styblinski_tang,
)


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


# test functions

MINIMA = {
    beale: ([3.0, 0.5], 0.0),
    rosenbrock: ([1.0] * 6, 0.0),
    sphere: ([0.0] * 4, 0.0),
    styblinski_tang: ([-2.903534027771177] * 5, -39.16616570377142 * 5),
}
FUNCTIONS = {function.__name__: function for function in MINIMA}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_minimum_is_where_it_is_said_to_be(name):
    point, value = MINIMA[FUNCTIONS[name]]
    point = torch.tensor(point, dtype=torch.float64)
    torch.testing.assert_close(FUNCTIONS[name](point), torch.tensor(value, dtype=torch.float64))
    torch.testing.assert_close(torch.func.grad(FUNCTIONS[name])(point), torch.zeros_like(point), rtol=0, atol=1e-10)
    assert torch.linalg.eigvalsh(torch.func.hessian(FUNCTIONS[name])(point)).min() > 0


@pytest.mark.parametrize("name", FUNCTIONS)
@given(values=st.lists(st.floats(-10, 10), min_size=2, max_size=2))
@settings(max_examples=50, deadline=None)
def test_nowhere_is_it_lower(name, values):
    value = FUNCTIONS[name](torch.tensor(values, dtype=torch.float64))
    assert value >= (2 * -39.16616570377142 if name == "styblinski_tang" else 0) - 1e-12


@given(values=st.lists(st.floats(-3, 3), min_size=2, max_size=9))
@settings(max_examples=30, deadline=None)
def test_rosenbrock_and_beale_are_those_of_scipy_and_of_the_books(values):
    point = torch.tensor(values, dtype=torch.float64)
    assert rosenbrock(point).item() == pytest.approx(scipy.optimize.rosen(values))
    assert torch.func.grad(rosenbrock)(point).numpy() == pytest.approx(scipy.optimize.rosen_der(np.array(values)))
    x, y = values[:2]
    books = sum((c - x * (1 - y ** (i + 1))) ** 2 for i, c in enumerate((1.5, 2.25, 2.625)))
    assert beale(point[:2]).item() == pytest.approx(books)


def test_rosenbrock_takes_other_constants():
    assert rosenbrock(torch.tensor([3.0, 9.0]), a=3.0, b=5.0) == 0
    assert rosenbrock(torch.tensor([2.0, 5.0]), a=3.0, b=5.0) == 5 * 1 + 1


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_go_through_vmap_row_by_row(name):
    points = torch.randn(7, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = torch.stack([FUNCTIONS[name](point) for point in points])
    torch.testing.assert_close(torch.func.vmap(FUNCTIONS[name])(points), rows)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_and_reverse_mode_agree_on_them(name):
    draw = torch.Generator().manual_seed(0)
    point, tangent = (torch.randn(2, dtype=torch.float64, generator=draw) for _ in range(2))
    objective = as_objective(FUNCTIONS[name])
    _, jvp = torch.func.jvp(objective, ({"x": point},), ({"x": tangent},))
    torch.testing.assert_close(jvp, torch.func.grad(objective)({"x": point})["x"] @ tangent)


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        ("beale", (3,), r"shape \(2,\), got \(3,\)"),
        ("beale", (1, 2), r"shape \(2,\), got \(1, 2\)"),
        ("rosenbrock", (1,), r"shape \(n,\) with n at least 2, got \(1,\)"),
        ("sphere", (), r"shape \(n,\) with n at least 1, got \(\)"),
        ("sphere", (0,), r"shape \(n,\) with n at least 1, got \(0,\)"),
        ("styblinski_tang", (2, 2), r"shape \(n,\) with n at least 1, got \(2, 2\)"),
    ],
)
def test_a_wrong_shape_is_named(name, shape, wanted):
    with pytest.raises(ValueError, match=f"{name} takes a point of {wanted}"):
        FUNCTIONS[name](torch.zeros(shape))


# losses by closure, and models that are left as they were


class Ema(nn.Module):
    """A model that assigns a buffer, in place of changing it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 3)
        self.register_buffer("mean", torch.zeros(4))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
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
