"""Functions without a rule: they run once, and what they return besides floating tensors stays as it is."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from tests.stacked.against_backprop import Net, assert_as_backprop, by_the_pass

CALLS = []


def overridable(function):
    """Make a function that the pass catches, as torch's own."""

    def call(x):
        if has_torch_function_unary(x):
            return handle_torch_function(call, (x,), x)
        CALLS.append(function)
        return function(x)

    call.__name__ = function.__name__
    return call


@overridable
def mixed(x):
    return x * 2, None, x.argmax(1), "text", {"deep": [x.sin(), (3, x > 0)]}


@overridable
def places(x):
    return x.argmax(1)


@overridable
def nothing(x):
    return None


@overridable
def noisy(x):
    return x * torch.rand_like(x), torch.randint(0, 3, (2,))


class Box:
    def __init__(self, x):
        self.x = x


@overridable
def boxed(x):
    return Box(x * 2)


def with_mixed(_, h):
    y, none, index, text, nest = mixed(h)
    assert (none, text, nest["deep"][1][0]) == (None, "text", 3)
    assert type(index) is type(nest["deep"][1][1]) is Tensor
    return y * (1 + index) + nest["deep"][0] * nest["deep"][1][1]


def with_nothing(_, h):
    assert nothing(h) is None
    return h * 2


def with_noise(_, h):
    y, number = noisy(h)
    return y * (1 + number.sum())


ATTENTION = nn.MultiheadAttention(6, 2, batch_first=True, dropout=0.1).double()
ENCODER = nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), 2, enable_nested_tensor=False)
ADAPTIVE = nn.AdaptiveLogSoftmaxWithLoss(6, 8, [2, 4], div_value=2).double()
LSTM = nn.LSTM(6, 6, num_layers=2, proj_size=3).double()
MASK = torch.tensor([[False, False, True], [False, False, False]])

BODIES = {
    "None, integers and text": with_mixed,
    "integers alone": lambda _, h: h * places(h),
    "nothing": with_nothing,
    "random numbers": with_noise,
    "the indices of a maximum": lambda _, h: h * h.max(1, keepdim=True).indices,
    "sort": lambda _, h: torch.mul(*h.sort(1)),
    "frexp": lambda _, h: h * torch.frexp(h).exponent,
    "bucketize": lambda _, h: h * torch.bucketize(h, torch.tensor([-1.0, 0.0, 1.0], dtype=h.dtype)),
    "multinomial": lambda _, h: h * torch.multinomial(h.softmax(1), 1),
    "bernoulli": lambda _, h: h * torch.bernoulli(h.sigmoid()),
    "gumbel_softmax": lambda _, h: F.gumbel_softmax(h, hard=True),
    "alpha_dropout": lambda _, h: F.alpha_dropout(h, 0.3, True),
    "equal": lambda _, h: h * (2 if torch.equal(h, h) and torch.allclose(h, h) else 3),
    "numbers": lambda _, h: h * h.sum().item() + len(h.tolist()) + bool(h[0, 0] > 0),
    "in": lambda _, h: h * (2 if 1.5 in h else 3),
    "slogdet": lambda _, h: h * torch.linalg.slogdet(h @ h.t() + torch.eye(6)).logabsdet,
    "attention": lambda _, h: ATTENTION.train()(h[None], h[None], h[None])[0][0],
    "attention in eval": lambda _, h: ATTENTION.eval()(h[None], h[None], h[None], need_weights=False)[0][0],
    "an encoder in eval": lambda _, h: ENCODER.double().eval()(h.view(2, 3, 6), src_key_padding_mask=MASK).view(6, 6),
    "grouped attention": lambda _, h: F.scaled_dot_product_attention(
        h.view(1, 2, 3, 6), h.view(1, 2, 3, 6)[:, :1], h.view(1, 2, 3, 6)[:, :1], enable_gqa=True
    ).reshape(6, 6),
    "LSTM": lambda _, h: LSTM(h)[0].repeat(1, 2),
    "roll of one number": lambda _, h: h * h.sum().roll(1),
    "flip of one number": lambda _, h: h * h.mean().flip(0),
    "one number in a vector": lambda _, h: h.new_zeros(6).index_fill(0, torch.tensor([0, 2]), h.sum()) * h,
    "a row by a number": lambda _, h: h * h.index_select(0, torch.tensor(2)),
    "random numbers for one number": lambda _, h: h * F.alpha_dropout(h.sum(), 0.5, True) * torch.rand(6),
    "adaptive softmax": lambda _, h: h * ADAPTIVE(h, torch.tensor([0, 5, 5, 2, 1, 7])).loss,
    "random numbers in place": lambda _, h: F.rrelu_(h * 1, 0.1, 0.4, True) * torch.rand(6),
    "torch.ops.aten": lambda model, h: torch.ops.aten.linear(h, model.c.weight, model.c.bias),
}


@pytest.mark.parametrize("num_tangents", [1, 3])
@pytest.mark.parametrize("name", BODIES)
def test_it_is_as_in_backprop_and_runs_once(name, num_tangents):
    CALLS.clear()
    by_the_pass(lambda: Net(BODIES[name]), num_tangents)
    assert len(CALLS) <= 1
    assert_as_backprop(lambda: Net(BODIES[name]), num_tangents)


def test_settings_of_fused_kernels_are_put_back():
    before = torch._C._get_mkldnn_enabled(), torch.backends.cuda.flash_sdp_enabled()

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(5, 4)

        def forward(self, x):
            return self.rnn(x)[0]

    from fwdlib.objectives import BatchLoss, params_of
    from fwdlib.stacked.estimator import stacked_gradient

    model = Recurrent()
    estimate = stacked_gradient(BatchLoss(model, torch.randn(3, 5), None, lambda y, _: y.mean()), params_of(model))
    assert estimate.loss.isfinite()
    assert (torch._C._get_mkldnn_enabled(), torch.backends.cuda.flash_sdp_enabled()) == before


@torch.library.custom_op("fwdlib_test::thrice", mutates_args=())
def thrice(x: Tensor) -> Tensor:
    return x * 3


thrice.register_autograd(lambda ctx, g: g * 3)


@torch.library.custom_op("fwdlib_test::double_", mutates_args={"x"})
def double_(x: Tensor) -> None:
    x.mul_(2)


@torch.library.custom_op("fwdlib_test::set_", mutates_args={"x"})
def set_(x: Tensor, y: Tensor) -> None:
    x.copy_(y)


def set_and_use(_, h):
    x = torch.ones(6, 6, dtype=h.dtype)
    set_(x, h)
    return h * x


REFUSED = {
    "another type": (lambda _, h: boxed(h).x, r"boxed returned a Box.*register_rule"),
    "no derivative": (
        lambda _, h: h * torch.igamma(h.exp(), h.exp()),
        r"igamma has a derivative for the backward pass.*not implemented",
    ),
    "a custom operator in place": (lambda _, h: (lambda y: (double_(y), y)[1])(h * 1), r"double_\.default writes"),
    "a custom operator into a plain tensor": (set_and_use, r"set_\.default writes into its arguments"),
    "a function of functions": (
        lambda _, h: torch.cond(h.sum() > 0, torch.sin, torch.cos, (h,)),
        "cond takes functions",
    ),
}


def test_a_custom_operator_has_the_derivative_of_its_backward_pass():
    assert_as_backprop(lambda: Net(lambda model, h: thrice(h) + h * thrice(model.w)))


@pytest.mark.parametrize("num_tangents", [1, 2])
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_refused_by_name(name, num_tangents):
    body, message = REFUSED[name]
    with pytest.raises(NotImplementedError, match=message):
        by_the_pass(lambda: Net(body), num_tangents)


def test_a_plain_tensor_goes_through_a_custom_operator():
    def body(_, h):
        x = torch.ones(6, 6, dtype=h.dtype)
        double_(x)
        return h * x

    assert_as_backprop(lambda: Net(body))
