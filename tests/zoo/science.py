"""Physics, generative models, graphs, solvers: models that differentiate, solve and sample inside."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchdiffeq import odeint, odeint_adjoint

from tests.zoo.case import NUM_CLASSES, Builder, Case, classifies, regresses


def tanh_net(*widths: int) -> nn.Sequential:
    layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


class Field(nn.Module):
    """A vector field that knows the time."""

    def __init__(self):
        super().__init__()
        self.net = tanh_net(6, 8, 5)

    def forward(self, t, z):
        return self.net(torch.cat([z, t.expand(len(z), 1)], 1))


class NeuralOde(nn.Module):
    def __init__(self, solve=odeint, **options):
        super().__init__()
        self.field, self.head, self.solve, self.options = Field(), nn.Linear(5, NUM_CLASSES), solve, options

    def forward(self, x):
        times = torch.linspace(0, 1, 3, dtype=x.dtype)
        return self.head(self.solve(self.field, x, times, **self.options)[-1])


class Pinn(nn.Module):
    """The residual of the heat equation, by autograd inside."""

    def __init__(self):
        super().__init__()
        self.net = tanh_net(2, 8, 8, 1)

    def forward(self, x):
        x = x.clone().requires_grad_()
        u = self.net(x)
        (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (ddu,) = torch.autograd.grad(du[:, 0].sum(), x, create_graph=True)
        return du[:, 1] - ddu[:, 0]


class PinnByFunc(Pinn):
    """The same residual by torch.func."""

    def forward(self, x):
        def u(point):
            return self.net(point)[0]

        slope, curvature = torch.func.grad(u), torch.func.hessian(u)
        return torch.func.vmap(lambda point: slope(point)[1] - curvature(point)[0, 0])(x)


class Forces(nn.Module):
    """The forces of an interatomic potential."""

    def __init__(self):
        super().__init__()
        self.net = tanh_net(1, 8, 1)

    def forward(self, x):
        x = x.detach().requires_grad_()
        i, j = torch.triu_indices(len(x), len(x), 1)
        energy = self.net((x[i] - x[j]).norm(dim=1, keepdim=True)).sum()
        return -torch.autograd.grad(energy, x, create_graph=True)[0]


class Coupling(nn.Module):
    """A normalizing flow of affine coupling layers and an LU-free linear layer."""

    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleList(tanh_net(2, 8, 4) for _ in range(2))
        self.mix = nn.Parameter(torch.eye(4) + 0.1 * torch.randn(4, 4))

    def forward(self, x):
        volume = torch.linalg.slogdet(self.mix)[1]
        for net in self.nets:
            kept, moved = x.chunk(2, 1)
            scale, shift = net(kept).chunk(2, 1)
            x = torch.cat([moved * scale.tanh().exp() + shift, kept], 1) @ self.mix
            volume = volume + scale.tanh().sum(1)
        normal = torch.distributions.Independent(torch.distributions.Normal(x.new_zeros(4), x.new_ones(4)), 1)
        return normal.log_prob(x) + volume


class Autoencoder(nn.Module):
    """A VAE: reparametrised samples, the divergence by torch.distributions."""

    def __init__(self):
        super().__init__()
        self.encode, self.decode = tanh_net(5, 8, 6), tanh_net(3, 8, 5)

    def forward(self, x):
        mean, scale = self.encode(x).chunk(2, 1)
        posterior = torch.distributions.Normal(mean, F.softplus(scale))
        prior = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
        error = (self.decode(posterior.rsample()) - x).square().sum(1)
        return error + torch.distributions.kl_divergence(posterior, prior).sum(1)


class Codebook(nn.Module):
    """VQ-VAE: the nearest code, a straight-through copy, and a moving average of the codes."""

    def __init__(self):
        super().__init__()
        self.encode, self.decode = tanh_net(5, 8, 3), tanh_net(3, 8, 5)
        self.register_buffer("codes", torch.randn(4, 3))

    def forward(self, x):
        z = self.encode(x)
        nearest = torch.cdist(z, self.codes).argmin(1)
        if self.training:
            with torch.no_grad():
                self.codes.index_copy_(0, nearest, 0.9 * self.codes[nearest] + 0.1 * z)
        q = self.codes[nearest]
        return (self.decode(z + (q - z).detach()) - x).square().sum(1) + 0.25 * (z - q).square().sum(1)


def generator() -> Case:
    """A generator's step against a frozen critic."""
    model = nn.ModuleDict({"generator": tanh_net(3, 8, 5), "critic": tanh_net(5, 8, 1)})
    model["critic"].requires_grad_(False)
    noise = torch.randn(6, 3)

    def loss(model: nn.ModuleDict) -> Tensor:
        return F.softplus(-model["critic"](model["generator"](noise))).mean()

    return Case(model, loss, 6)


def critic() -> Case:
    """A critic's step with the gradient penalty of WGAN-GP."""
    x, fake = torch.randn(6, 5), torch.randn(6, 5)

    def loss(model: nn.Module) -> Tensor:
        middle = (0.3 * x + 0.7 * fake).requires_grad_()
        (slope,) = torch.autograd.grad(model(middle).sum(), middle, create_graph=True)
        return model(fake).mean() - model(x).mean() + 10 * (slope.norm(dim=1) - 1).square().mean()

    return Case(tanh_net(5, 8, 1), loss, 6)


class Denoiser(nn.Module):
    """A small U-Net that knows the noise level: convolutions down and up, attention in the middle."""

    def __init__(self):
        super().__init__()
        self.first, self.down = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 1)
        self.norm, self.level = nn.GroupNorm(2, 8), nn.Linear(4, 8)
        self.attention, self.up = nn.MultiheadAttention(8, 2, batch_first=True), nn.ConvTranspose2d(8, 8, 4, 2, 1)
        self.last = nn.Conv2d(16, 1, 3, padding=1, padding_mode="circular")

    def forward(self, x):
        level = torch.linspace(0, 1, len(x), dtype=x.dtype)
        noisy = torch.sqrt(1 - level.view(-1, 1, 1, 1)) * x + torch.sqrt(level.view(-1, 1, 1, 1)) * torch.randn_like(x)
        waves = level.unsqueeze(1) * torch.arange(1, 3)
        h = self.first(noisy)
        low = F.silu(self.norm(self.down(h))) + self.level(torch.cat([waves.sin(), waves.cos()], 1))[:, :, None, None]
        flat = low.flatten(2).transpose(1, 2)
        low = low + self.attention(flat, flat, flat, need_weights=False)[0].transpose(1, 2).reshape(low.shape)
        return self.last(torch.cat([h, self.up(low)], 1))


EDGES = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 2], [1, 2, 3, 4, 5, 0, 3, 5]])


class Messages(nn.Module):
    """A graph net: messages along edges, gathered by the named way."""

    def __init__(self, gather="index_add"):
        super().__init__()
        self.send, self.head, self.gather = nn.Linear(10, 6), nn.Linear(6, NUM_CLASSES), gather

    def forward(self, x):
        source, target = EDGES
        m = F.relu(self.send(torch.cat([x[source], x[target]], 1)))
        wide = target.unsqueeze(1).expand_as(m)
        if self.gather == "index_add":
            h = m.new_zeros(6, 6).index_add_(0, target, m)
        elif self.gather == "scatter_add":
            h = torch.zeros(6, 6, dtype=m.dtype).scatter_add_(0, wide, m)
        elif self.gather == "scatter_reduce":
            h = m.new_zeros(6, 6).scatter_reduce(0, wide, m, "amax", include_self=False)
        elif self.gather == "softmax":
            scores = m.sum(1).exp()
            total = scores.new_zeros(6).index_add(0, target, scores)
            h = m.new_zeros(6, 6).index_put((target,), m * (scores / total[target]).unsqueeze(1), accumulate=True)
        else:
            adjacency = torch.sparse_coo_tensor(EDGES.flip(0), torch.ones(8, dtype=m.dtype), (6, 6))
            h = torch.sparse.mm(adjacency, F.relu(self.send(torch.cat([x, x], 1))))
        return self.head(h)


class Fourier(nn.Module):
    """A Fourier neural operator in one dimension: complex weights as real pairs."""

    def __init__(self):
        super().__init__()
        self.up, self.head = nn.Conv1d(1, 4, 1), nn.Conv1d(4, 1, 1)
        self.weight = nn.Parameter(torch.randn(4, 4, 3, 2))

    def forward(self, x):
        h = self.up(x)
        waves = torch.fft.rfft(h)
        out = torch.zeros(*waves.shape, dtype=waves.dtype)
        out[..., :3] = torch.einsum("bik,iok->bok", waves[..., :3], torch.view_as_complex(self.weight))
        return self.head(F.gelu(torch.fft.irfft(out, n=x.shape[-1]) + h))


class Hamiltonian(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = tanh_net(4, 8, 1)

    def forward(self, x):
        dh = torch.func.vmap(torch.func.grad(lambda z: self.net(z)[0]))(x)
        return torch.cat([dh[:, 2:], -dh[:, :2]], 1)


class Process(nn.Module):
    """A Gaussian process: Cholesky and triangular solves."""

    def __init__(self):
        super().__init__()
        self.scale, self.noise, self.features = (
            nn.Parameter(torch.zeros(())),
            nn.Parameter(torch.zeros(())),
            nn.Linear(5, 3),
        )

    def forward(self, x):
        z = self.features(x)
        kernel = torch.exp(self.scale - torch.cdist(z, z).square()) + self.noise.exp() * torch.eye(len(x))
        law = torch.distributions.MultivariateNormal(torch.zeros(len(x), dtype=x.dtype), kernel)
        return -law.log_prob(x[:, 0])


class Decomposed(nn.Module):
    """Linear algebra inside: eigenvalues, singular values, a matrix exponential, least squares."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 5))

    def forward(self, x):
        w = self.weight
        values, vectors = torch.linalg.eigh(w + w.mT)
        solved = torch.linalg.solve(w @ w.mT + torch.eye(5), x.mT).mT
        rotated = x @ torch.linalg.matrix_exp(w - w.mT) @ vectors.square()
        return rotated + values.tanh() + solved + torch.linalg.svdvals(w).sum() + torch.linalg.qr(w)[1].diagonal().abs()


class Sinkhorn(nn.Module):
    """Optimal transport, iterated in the log domain."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(5, 3)

    def forward(self, x):
        cost = torch.cdist(self.net(x), self.net(x.flip(0) + 0.2), p=2) + 0.1
        log_plan = -cost / 0.5
        for _ in range(5):
            log_plan = log_plan - log_plan.logsumexp(1, keepdim=True)
            log_plan = log_plan - log_plan.logsumexp(0, keepdim=True)
        return (log_plan.exp() * cost).sum(1)


class Sets(nn.Module):
    """Deep sets and a sort: order statistics of learnt features."""

    def __init__(self):
        super().__init__()
        self.net, self.head = nn.Linear(5, 6), nn.Linear(18, NUM_CLASSES)

    def forward(self, x):
        h = self.net(x).unflatten(0, (2, -1))
        ranked = h.sort(1).values
        top = h.topk(2, dim=1).values.mean(1)
        return self.head(torch.cat([ranked[:, 1], top, h.cummax(1).values[:, 1] + h.std(1) + h.median(1).values], 1))


class Field3d(nn.Module):
    """A radiance field: waves of positions, opacities along a ray, a cumulative product."""

    def __init__(self):
        super().__init__()
        self.net = tanh_net(12, 8, 4)

    def forward(self, x):
        points = x[:, None, :3] + torch.linspace(0, 1, 4).view(1, 4, 1) * x[:, None, 2:]
        waves = torch.cat([points.sin(), points.cos(), (2 * points).sin(), (2 * points).cos()], -1)
        colour, density = self.net(waves).split([3, 1], -1)
        opacity = 1 - torch.exp(-F.softplus(density))
        passed = torch.cumprod(torch.cat([torch.ones_like(opacity[:, :1]), 1 - opacity[:, :-1]], 1), 1)
        return (passed * opacity * colour.sigmoid()).sum(1)


class Transformed(nn.Module):
    """A spatial transformer: an affine grid, sampled."""

    def __init__(self):
        super().__init__()
        self.locate, self.head = nn.Linear(64, 6), nn.Linear(64, NUM_CLASSES)

    def forward(self, x):
        theta = self.locate(x.flatten(1)).view(-1, 2, 3) * 0.1 + torch.eye(2, 3)
        grid = F.affine_grid(theta, x.shape, align_corners=False)
        return self.head(F.grid_sample(x, grid, align_corners=False).flatten(1))


class Scales(nn.Module):
    """Interpolations, a pixel shuffle, folding, pooling of all kinds."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Conv2d(1, 4, 3, padding=1, padding_mode="reflect"), nn.Linear(16, NUM_CLASSES)

    def forward(self, x):
        h = F.pixel_shuffle(self.first(x), 2)
        h = F.interpolate(h, scale_factor=0.5, mode="bilinear") + F.avg_pool2d(h, 2) + F.max_pool2d(h, 2)
        h = F.fold(F.unfold(h, 3, padding=1), (8, 8), 3, padding=1) + F.lp_pool2d(h.abs() + 0.1, 2, 1)
        h = F.interpolate(h, size=(5, 5), mode="bicubic", antialias=True) + F.interpolate(h, size=5)
        return self.head(F.adaptive_max_pool2d(F.local_response_norm(h, 3), 4).flatten(1))


class Policy(nn.Module):
    """REINFORCE and an entropy bonus, with sampled actions."""

    def __init__(self):
        super().__init__()
        self.net = tanh_net(5, 8, 4)

    def forward(self, x):
        policy = torch.distributions.Categorical(logits=self.net(x)[:, :3])
        action = policy.sample()
        return -policy.log_prob(action) * x[:, 0] - 0.1 * policy.entropy()


def rows(batch: int = 6, width: int = 5) -> Tensor:
    return torch.randn(batch, width)


def pixels() -> Tensor:
    return torch.randn(3, 1, 8, 8)


MODELS: dict[str, Builder] = {
    "neural ODE, dopri5": lambda: classifies(NeuralOde(rtol=1e-3, atol=1e-3), rows()),
    "neural ODE, rk4": lambda: classifies(NeuralOde(method="rk4", options={"step_size": 0.25}), rows()),
    "neural ODE, adjoint": lambda: classifies(NeuralOde(odeint_adjoint, method="rk4"), rows()),
    "PINN by autograd": lambda: regresses(Pinn(), rows(width=2)),
    "PINN by torch.func": lambda: regresses(PinnByFunc(), rows(width=2)),
    "interatomic forces": lambda: regresses(Forces(), rows(width=3)),
    "Hamiltonian net": lambda: regresses(Hamiltonian(), rows(width=4)),
    "normalizing flow": lambda: regresses(Coupling(), rows(width=4)),
    "VAE": lambda: regresses(Autoencoder(), rows()),
    "VQ-VAE": lambda: regresses(Codebook(), rows()),
    "GAN, generator": generator,
    "WGAN-GP, critic": critic,
    "diffusion U-Net": lambda: regresses(Denoiser(), pixels()),
    **{
        f"graph net, {way}": partial(lambda way: classifies(Messages(way), rows()), way)
        for way in ("index_add", "scatter_add", "scatter_reduce", "softmax", "sparse")
    },
    "Fourier neural operator": lambda: regresses(Fourier(), torch.randn(3, 1, 8)),
    "Gaussian process": lambda: regresses(Process(), rows()),
    "linear algebra": lambda: regresses(Decomposed(), rows()),
    "optimal transport": lambda: regresses(Sinkhorn(), rows()),
    "deep sets and sorting": lambda: classifies(Sets(), rows(8)),
    "radiance field": lambda: regresses(Field3d(), rows()),
    "spatial transformer": lambda: classifies(Transformed(), pixels()),
    "scales and pools": lambda: classifies(Scales(), pixels()),
    "policy gradient": lambda: regresses(Policy(), rows()),
}
