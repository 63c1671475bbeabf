"""What models do besides computing: norms of weights, switched-off gradients, hooks, scripts, checkpoints, state."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from tests.zoo.case import NUM_CLASSES, Builder, Case, classifies, regresses


def rows(batch: int = 6, width: int = 5) -> Tensor:
    return torch.randn(batch, width)


class Between(nn.Module):
    """Linear layers with a body ``(model, hidden) -> hidden`` of shape (6, 6) between them."""

    def __init__(self, body: Callable):
        super().__init__()
        self.first, self.inner, self.last, self.body = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, NUM_CLASSES), body
        self.count = 0
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        return self.last(self.body(self, self.first(x)))


def between(body: Callable, **options) -> Case:
    return classifies(Between(body), rows(), **options)


def stack(*layers: nn.Module) -> Case:
    return classifies(nn.Sequential(*layers, nn.Linear(6, NUM_CLASSES)), rows())


def target_network(model, h):
    with torch.no_grad():
        target = F.normalize(model.inner(h + 0.1), dim=1)
    return F.normalize(model.inner(h), dim=1) - target


def moving_average(model, h):
    if model.training:
        with torch.no_grad():
            model.mean.mul_(0.9).add_(0.1 * h.mean(0))
            model.steps += 1
    return h - model.mean


def assigned_average(model, h):
    if model.training:
        model.mean = (0.9 * model.mean + 0.1 * h.mean(0)).detach()
    return h - model.mean


def annealed(model, h):
    model.count += 1
    return h / model.count


def equilibrium(model, h):
    with torch.no_grad():
        z = torch.zeros_like(h)
        for _ in range(30):
            z = torch.tanh(0.3 * model.inner(z) + h)
    return torch.tanh(0.3 * model.inner(z) + h)


def straight_through(model, h):
    return h + (h.round() - h).detach()


def one_hot_sample(model, h):
    return F.gumbel_softmax(h, tau=0.7, hard=True)


def quantised(model, h):
    scale = h.detach().abs().amax() / 127
    return torch.fake_quantize_per_tensor_affine(h, scale, torch.zeros((), dtype=torch.int), -128, 127)


class Rounded(torch.autograd.Function):
    """A straight-through estimator with both formulas."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, g):
        return g

    @staticmethod
    def jvp(ctx, v):
        return v.clone()


class Reversed(torch.autograd.Function):
    """The gradient reversal of domain-adversarial training, which has no jvp."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -g


def sharpness(model, h):
    """A gradient penalty, by autograd."""
    x = h.detach().requires_grad_()
    (g,) = torch.autograd.grad(model.inner(x).tanh().sum(), x, create_graph=True)
    return h + g


def inner_step(model, h):
    """A step of MAML by torch.func."""
    params = dict(model.inner.named_parameters())
    step = grad(lambda p: functional_call(model.inner, p, (h,)).square().mean())(params)
    return functional_call(model.inner, {name: p - 0.1 * step[name] for name, p in params.items()}, (h,))


def inner_step_by_autograd(model, h):
    weight = model.inner.weight
    (step,) = torch.autograd.grad(F.linear(h, weight).square().mean(), weight, create_graph=True)
    return F.linear(h, weight - 0.1 * step)


def directional(model, h):
    return jvp(lambda x: model.inner(x).tanh(), (h,), (torch.ones_like(h),))[1]


def per_example(model, h):
    return vmap(lambda row: model.inner(row).softmax(0) * row)(h)


def edited(model, h):
    """Writes into views, as masks of contrastive losses do."""
    h = h * 1
    h.diagonal().fill_(0.5)
    h[:, 1:3].mul_(2)
    h.select(0, 1).add_(h[0])
    return h.T.contiguous().clamp_(-1, 1)


def in_threes(model, h):
    out = torch.empty_like(h)
    for i in range(0, 6, 3):
        out[i : i + 3] = model.inner(h[i : i + 3])
    return out


def in_bfloat(model, h):
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        return model.inner(h)


def hooked() -> Case:
    model = Between(lambda model, h: model.inner(h))
    model.inner.register_forward_hook(lambda module, args, output: output * 2 + args[0])
    model.inner.register_forward_pre_hook(lambda module, args: (args[0].tanh(),))
    return classifies(model, rows())


def shared() -> Case:
    act = nn.PReLU()
    layer = nn.Linear(6, 6)
    return stack(nn.Linear(5, 6), act, layer, act, layer)


def pruned() -> Case:
    layer = nn.Linear(5, 6)
    prune.l1_unstructured(layer, "weight", 0.3)
    return stack(layer)


class Symmetric(nn.Module):
    def forward(self, x):
        return x.triu() + x.triu(1).mT


def symmetric() -> Case:
    layer = nn.Linear(6, 6)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return stack(nn.Linear(5, 6), layer)


def lazy() -> Case:
    layer = nn.LazyLinear(6)
    layer(rows())
    return stack(layer)


def frozen() -> Case:
    case = stack(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 6))
    case.model[0].requires_grad_(False)
    return case


def compiled_part() -> Case:
    return stack(nn.Linear(5, 6), torch.compile(nn.Sequential(nn.Linear(6, 6), nn.GELU()), backend="eager"))


def whole_script() -> Case:
    return classifies(torch.jit.script(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, NUM_CLASSES))), rows())


def script_part() -> Case:
    return stack(torch.jit.script(nn.Sequential(nn.Linear(5, 6), nn.Tanh())))


def traced_part() -> Case:
    return stack(torch.jit.trace(nn.Sequential(nn.Linear(5, 6), nn.Tanh()), rows()))


def parallel() -> Case:
    return classifies(nn.DataParallel(nn.Linear(5, NUM_CLASSES)), rows())


def averaged_weights() -> Case:
    """A model beside the moving average of its weights, as semi-supervised training has it."""
    student = nn.Linear(5, NUM_CLASSES)
    model = nn.ModuleDict({"student": student, "teacher": torch.optim.swa_utils.AveragedModel(student)})
    model["teacher"].requires_grad_(False)
    x = rows()

    def loss(model: nn.ModuleDict) -> Tensor:
        return F.mse_loss(model["student"](x).softmax(1), model["teacher"](x + 0.1).softmax(1))

    nn.init.normal_(model["teacher"].module.weight)
    return Case(model, loss, 6)


def quantisation_aware() -> Case:
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, NUM_CLASSES))
    observer = torch.ao.quantization.MovingAverageMinMaxObserver
    model.insert(1, torch.ao.quantization.FakeQuantize(observer, quant_min=0, quant_max=255))
    return classifies(model, rows())


MODELS: dict[str, Builder] = {
    "MLP": lambda: stack(nn.Linear(5, 8), nn.LayerNorm(8), nn.GELU(), nn.Dropout(0.2), nn.Linear(8, 6), nn.Mish()),
    "activations": lambda: stack(
        nn.Linear(5, 6),
        *(nn.CELU(), nn.SELU(), nn.Hardswish(), nn.Softshrink(0.1), nn.LogSigmoid(), nn.Softplus(), nn.GLU()),
        *(nn.Linear(3, 6), nn.RReLU(), nn.Threshold(-1, 0.3), nn.Hardtanh(-2, 2), nn.Tanhshrink(), nn.Softmin(1)),
    ),
    "norms": lambda: stack(
        nn.Linear(5, 6), nn.RMSNorm(6), nn.GroupNorm(2, 6), nn.Unflatten(1, (2, 3)), nn.InstanceNorm1d(2), nn.Flatten()
    ),
    "BatchNorm without momentum": lambda: stack(nn.Linear(5, 6), nn.BatchNorm1d(6, momentum=None), nn.Tanh()),
    "weight_norm": lambda: stack(parametrizations.weight_norm(nn.Linear(5, 6)), nn.Tanh()),
    "weight_norm of inputs": lambda: stack(parametrizations.weight_norm(nn.Linear(5, 6), dim=1), nn.Tanh()),
    "weight_norm of the whole": lambda: stack(parametrizations.weight_norm(nn.Linear(5, 6), dim=None), nn.Tanh()),
    "weight_norm, last axis": lambda: stack(parametrizations.weight_norm(nn.Linear(5, 6), dim=-1), nn.Tanh()),
    "weight_norm, old": lambda: stack(nn.utils.weight_norm(nn.Linear(5, 6)), nn.Tanh()),
    "spectral_norm": lambda: stack(parametrizations.spectral_norm(nn.Linear(5, 6)), nn.Tanh()),
    "spectral_norm, old": lambda: stack(nn.utils.spectral_norm(nn.Linear(5, 6)), nn.Tanh()),
    "orthogonal weights": lambda: stack(nn.Linear(5, 6), parametrizations.orthogonal(nn.Linear(6, 6)), nn.Tanh()),
    "orthogonal weights, Cayley": lambda: stack(
        nn.Linear(5, 6), parametrizations.orthogonal(nn.Linear(6, 6), orthogonal_map="cayley")
    ),
    "symmetric weights": symmetric,
    "pruned weights": pruned,
    "lazy layer": lazy,
    "shared layers": shared,
    "frozen layer": frozen,
    "target network under no_grad": partial(between, target_network),
    "moving average in a buffer": partial(between, moving_average),
    "moving average assigned to a buffer": partial(between, assigned_average),
    "weights averaged": averaged_weights,
    "counter in Python": partial(between, annealed),
    "deep equilibrium": partial(between, equilibrium),
    "straight-through by detach": partial(between, straight_through),
    "straight-through by a function": partial(between, lambda model, h: Rounded.apply(h)),
    "gradient reversal": partial(between, lambda model, h: Reversed.apply(h)),
    "Gumbel softmax, hard": partial(between, one_hot_sample),
    "fake quantisation": partial(between, quantised),
    "quantisation-aware training": quantisation_aware,
    "gradient penalty": partial(between, sharpness),
    "MAML by torch.func": partial(between, inner_step),
    "MAML by autograd": partial(between, inner_step_by_autograd),
    "torch.func.jvp inside": partial(between, directional),
    "torch.func.vmap inside": partial(between, per_example),
    "in-place writes into views": partial(between, edited),
    "output filled piece by piece": partial(between, in_threes),
    "autocast switched off inside": partial(between, in_bfloat),
    "checkpoint": partial(between, lambda model, h: checkpoint(model.inner, h, use_reentrant=False)),
    "checkpoint, reentrant": partial(between, lambda model, h: checkpoint(model.inner, h, use_reentrant=True)),
    "checkpoint of a sequence": partial(
        between,
        lambda model, h: checkpoint_sequential(nn.Sequential(model.inner, nn.Tanh()), 2, h, use_reentrant=False),
    ),
    "hooks": hooked,
    "DataParallel": parallel,
    "a compiled part": compiled_part,
    "TorchScript, whole": whole_script,
    "TorchScript, part": script_part,
    "TorchScript, traced": traced_part,
    "bilinear and cosine": lambda: regresses(nn.Bilinear(5, 5, 3), rows(), rows()),
}
