"""What has a derivative for the backward pass alone gets its forward derivative by means of it, in both engines."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from fwdlib.estimators import backprop_gradient, forward_gradient
from fwdlib.objectives import ClosureLoss, params_of

pytestmark = pytest.mark.filterwarnings("ignore:.*(beta state|is in beta|prototype|is deprecated):UserWarning")

BATCH = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
APPLY = Function.__dict__["apply"]
GRAPH = torch.sparse_coo_tensor(
    torch.tensor([[0, 1, 5], [1, 2, 0]]), torch.ones(3).double(), (6, 6), check_invariants=True
)


class Reversal(Function):
    """The gradient reversal of domain-adversarial training."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -3 * g


class Product(Function):
    """Two arguments, two results, one of which has no derivative."""

    @staticmethod
    def forward(ctx, x, scale, y):
        ctx.save_for_backward(x, y)
        ctx.scale = scale
        places = x.argmax(1)
        ctx.mark_non_differentiable(places)
        return scale * x * y, places

    @staticmethod
    def backward(ctx, g, _):
        x, y = ctx.saved_tensors
        return ctx.scale * g * y, None, ctx.scale * g * x


class Assign(Function):
    """Writes into an argument, as torchdiffeq's solvers do."""

    @staticmethod
    def forward(ctx, out, value):
        out[:, :2] = value
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(ctx, g):
        return g.index_fill(1, torch.tensor([0, 1]), 0), g[:, :2].clone()


class Once(Function):
    """A backward pass that cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()


class Solver(Function):
    """Differentiates by the parameters of a layer, which it knows by the layer, as an adjoint method does."""

    @staticmethod
    def forward(ctx, layer, x, *params):
        ctx.layer, ctx.params = layer, params
        ctx.save_for_backward(x)
        return layer(x).tanh()

    @staticmethod
    def backward(ctx, g):
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            return None, *torch.autograd.grad(ctx.layer(x).tanh(), (x, *ctx.params), g)


class Clipped(Reversal):
    @staticmethod
    def backward(ctx, g):
        return g.clamp(-1e-3, 1e-3)


class Guided(Reversal):
    @staticmethod
    def backward(ctx, g):
        return g.relu()


class Reversible(Function):
    """Leaves the gradients of its parameters in ``.grad``, as reversible layers do."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        ctx.save_for_backward(x)
        return layer(x)

    @staticmethod
    def backward(ctx, g):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(ctx.layer(x), g)
        return x.grad, None


def filled(model, h):
    out = h.new_zeros(6, 3)
    out = Assign.apply(out, h[:, 1:])
    return out * h


BODIES = {
    "one argument": lambda model, h: Reversal.apply(h),
    "several": lambda model, h: Product.apply(h, 2.0, model.weight.sum(1))[0],
    "a parameter twice": lambda model, h: h * Product.apply(model.weight, 2.0, model.weight)[0].sum(1),
    "writes into an argument": filled,
    "writes into an activation": lambda model, h: Assign.apply(h * 1, h[:, 1:]) + h,
    "once differentiable": lambda model, h: Once.apply(h[:, :2]),
    "parameters known by a module": lambda model, h: Solver.apply(model, BATCH, *model.parameters()) * h,
    "a reentrant checkpoint": lambda model, h: checkpoint(lambda x: model(x @ model.weight), h, use_reentrant=True),
    "under no_grad": lambda model, h: h * torch.no_grad()(Reversal.apply)(h),
    "cdist": lambda model, h: torch.cdist(h, h.flip(0)),
    "grid_sample": lambda model, h: F.grid_sample(
        BATCH.view(1, 1, 6, 5), h.tanh().view(1, 3, 3, 2), align_corners=False
    ),
    "ctc_loss": lambda model, h: F.ctc_loss(
        h.view(6, 1, 3).log_softmax(2), torch.tensor([[1, 2]]), torch.tensor([6]), torch.tensor([2])
    ),
    "multi_margin_loss": lambda model, h: F.multi_margin_loss(h, torch.arange(6) % 3, reduction="none"),
    "embedding_bag": lambda model, h: F.embedding_bag(torch.tensor([[0, 3], [1, 5]]), h, mode="mean"),
    "a sparse matrix": lambda model, h: torch.sparse.mm(GRAPH, h),
    "a sparse matrix, @": lambda model, h: GRAPH @ h,
    "a sparse matrix by rows": lambda model, h: GRAPH.to_sparse_csr() @ h,
    "fake quantisation": lambda model, h: torch.fake_quantize_per_tensor_affine(h, 0.1, 0, -5, 5),
    "scatter_reduce, prod": lambda model, h: h.scatter_reduce(0, torch.zeros(6, 3, dtype=torch.long), h, "prod"),
    "cholesky_inverse": lambda model, h: torch.cholesky_inverse((h.mT @ h).tril() + torch.eye(3)),
    "cholesky of a matrix that is not symmetric": lambda model, h: torch.linalg.cholesky(h[:3] + 5 * torch.eye(3)),
    "eigh, by name": lambda model, h: torch.linalg.eigh(input=h[:3], UPLO="U").eigenvectors.square(),
    "triangular_solve": lambda model, h: torch.triangular_solve(h[:3], h[:3] + 3 * torch.eye(3))[0],
    "max_unpool2d": lambda model, h: F.max_unpool2d(
        h.view(1, 2, 3, 3), torch.tensor([0, 0, 2] * 6).view(1, 2, 3, 3), 2
    ),
    "as_strided_scatter": lambda model, h: h.as_strided_scatter(h[:2, :2] * 2, (2, 2), (1, 1)),
    "index_reduce": lambda model, h: h.index_reduce(0, torch.tensor([0, 0, 1, 2, 3, 3]), h, "mean"),
}
REFUSED = {
    "clips": (lambda model, h: Clipped.apply(h), "not linear"),
    "rectifies": (lambda model, h: Guided.apply(h), "not linear"),
    "leaves gradients itself": (lambda model, h: Reversible.apply(h @ model.weight, model), "runs another one"),
    "many results": (lambda model, h: Once.apply(h.repeat(40, 1)), "cannot be differentiated"),
    "nested": (lambda model, h: torch.nested.as_nested_tensor([h, h[:2]]).to_padded_tensor(0.0), "nested"),
}


@torch.library.custom_op("fwdlib_tests::cube", mutates_args=())
def cube(x: torch.Tensor) -> torch.Tensor:
    return x**3


cube.register_autograd(
    lambda ctx, g: 3 * ctx.saved_tensors[0] ** 2 * g,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)
BODIES["a custom operator"] = lambda model, h: cube(h)
BODIES["a custom operator, by torch.ops"] = lambda model, h: torch.ops.fwdlib_tests.cube(h)
if hasattr(F, "linear_cross_entropy"):  # its backward pass runs once
    REFUSED["linear_cross_entropy in chunks"] = (
        lambda model, h: F.linear_cross_entropy(
            h, model.weight.mT, torch.arange(6) % 5, options=nn.LinearCrossEntropyOptions(batch_chunk_size=2)
        ),
        "cannot be differentiated",
    )
    BODIES["linear_cross_entropy"] = lambda model, h: F.linear_cross_entropy(h, model.weight.mT, torch.arange(6) % 5)


def case(body):
    torch.manual_seed(0)
    model = nn.Linear(5, 3).double()
    return model, lambda: body(model, model(BATCH)).square().mean()


@pytest.mark.parametrize("num_tangents", [1, 3])
@pytest.mark.parametrize("engine", ["torch", "stacked", "auto"])
@pytest.mark.parametrize("name", BODIES)
def test_the_derivative_is_that_of_the_backward_pass(name, engine, num_tangents):
    model, closure = case(BODIES[name])
    closure().backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    params, draw = params_of(model), torch.Generator().manual_seed(1)
    tangents = {n: torch.randn(num_tangents, *p.shape, generator=draw, dtype=p.dtype) for n, p in params.items()}
    options = {"num_tangents": num_tangents, "tangents": lambda *_: tangents, "engine": engine}
    estimate = forward_gradient(ClosureLoss(model, closure), params, **options)
    expected = sum((v * grads[n]).flatten(1).sum(1) for n, v in tangents.items())
    torch.testing.assert_close(estimate.jvps, expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(estimate.loss, closure().detach())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert Function.__dict__["apply"] is APPLY, "torch is not as it was"


@pytest.mark.parametrize("engine", ["torch", "stacked"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_such_derivative_is_refused(name, engine):
    body, words = REFUSED[name]
    model, closure = case(body)
    with pytest.raises(NotImplementedError, match=rf"{words}.*backprop_gradient|engine='torch'"):
        forward_gradient(ClosureLoss(model, closure), params_of(model), engine=engine)
    assert all(p.requires_grad for p in model.parameters())
    assert torch._C._is_fwd_grad_enabled()


def test_a_function_that_the_model_differentiates_backward_as_well_is_refused():
    def body(model, h):
        x = h.detach().requires_grad_()
        return torch.autograd.grad(Reversal.apply(x @ model.weight).sum(), x, create_graph=True)[0]

    model, closure = case(body)
    with pytest.raises(NotImplementedError, match="backprop_gradient"):
        forward_gradient(ClosureLoss(model, closure), params_of(model), engine="torch")


@pytest.mark.parametrize("num_tangents", [1, 2])
def test_a_plain_function_is_right_or_refused(num_tangents):
    places = torch.zeros(6, 5, dtype=torch.long)
    params = {"x": BATCH}
    for objective in (
        lambda p: p["x"].scatter_reduce(0, places, p["x"], "prod").square().sum(),
        lambda p: cube(p["x"]).sum(),
        lambda p: torch.cdist(p["x"], p["x"].flip(0)).square().sum(),
    ):
        exact = backprop_gradient(objective, params).grads["x"]
        v = torch.stack([BATCH, BATCH.flip(0)])[:num_tangents]
        try:
            estimate = forward_gradient(objective, params, num_tangents=num_tangents, tangents=lambda *_, v=v: {"x": v})
        except NotImplementedError as error:
            assert "backprop_gradient" in str(error)  # noqa: PT017
            assert num_tangents > 1, "one tangent needs no transform"
        else:
            torch.testing.assert_close(estimate.jvps, (v * exact).sum((1, 2)))
