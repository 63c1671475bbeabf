"""Losses: those of torch with their reductions and odd options, and those that people write themselves."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import Case

WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 0.1], dtype=torch.float64)
CLASSES = torch.tensor([0, 1, 3, 2, 1, 0])
SIGNS = torch.tensor([1, -1, 1, 1, -1, -1])
SOFT = torch.tensor([[0.7, 0.1, 0.1, 0.1]], dtype=torch.float64).repeat(6, 1).cumsum(1).softmax(1)
HARD = torch.arange(24).reshape(6, 4).double() % 2
LABELS = torch.tensor([[1, 3, -1, 0], [0, -1, 1, 1], [2, 1, 0, 3], [-1, 0, 0, 0], [3, -1, 2, 1], [1, 2, 3, 0]])

Loss = Callable[[Tensor], Tensor]


def by_reduction(loss: Callable[..., Tensor], name: str) -> dict[str, Loss]:
    """Return a loss with each reduction; for "none" weighted by hand, as users do."""

    def weighted(z: Tensor) -> Tensor:
        pieces = loss(z, reduction="none")
        return (pieces * torch.linspace(0.5, 2, pieces.numel()).reshape(pieces.shape)).sum()

    return {
        f"{name}, mean": lambda z: loss(z, reduction="mean"),
        f"{name}, sum": lambda z: loss(z, reduction="sum"),
        f"{name}, none": weighted,
    }


def ctc(z: Tensor, reduction: str = "mean", **options) -> Tensor:
    steps = z.reshape(6, 2, 2).repeat(1, 1, 2).log_softmax(2)
    targets = torch.tensor([[1, 2], [3, 3]])
    return F.ctc_loss(steps, targets, torch.tensor([6, 5]), torch.tensor([2, 2]), reduction=reduction, **options)


def pairs(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return z[:2], z[2:4], z[4:]


def info_nce(z: Tensor) -> Tensor:
    """SimCLR: the diagonal is masked in place."""
    z = F.normalize(z, dim=1)
    similar = z @ z.T / 0.5
    similar.fill_diagonal_(float("-inf"))
    return F.cross_entropy(similar, torch.tensor([3, 4, 5, 0, 1, 2]))


def supervised_contrast(z: Tensor) -> Tensor:
    z = F.normalize(z, dim=1)
    others = ~torch.eye(6, dtype=torch.bool)
    same = (CLASSES.unsqueeze(0) == CLASSES.unsqueeze(1)) & others
    logs = (z @ z.T / 0.3).masked_fill(~others, -1e9).log_softmax(1)
    return -(logs * same).sum() / same.sum()


def clip_loss(z: Tensor) -> Tensor:
    scores = F.normalize(z[:3], dim=1) @ F.normalize(z[3:], dim=1).T * 10
    return (F.cross_entropy(scores, torch.arange(3)) + F.cross_entropy(scores.T, torch.arange(3))) / 2


def barlow_twins(z: Tensor) -> Tensor:
    a, b = ((x - x.mean(0)) / x.std(0) for x in (z[:3], z[3:]))
    c = a.T @ b / 3
    return (c.diagonal() - 1).square().sum() + 0.01 * (c - torch.diag(c.diagonal())).square().sum()


def vic_reg(z: Tensor) -> Tensor:
    centred = z - z.mean(0)
    covariance = centred.T @ centred / 5
    spread = F.relu(1.5 - torch.sqrt(z.var(0) + 1e-4)).mean()
    return spread + covariance.fill_diagonal_(0).square().sum() + F.mse_loss(z[:3], z[3:])


def focal(z: Tensor) -> Tensor:
    logs = F.cross_entropy(z, CLASSES, reduction="none")
    return ((1 - torch.exp(-logs)) ** 2 * logs).mean()


def dice(z: Tensor) -> Tensor:
    p, y = z.softmax(1), F.one_hot(CLASSES, 4)
    return 1 - ((2 * (p * y).sum(0) + 1) / (p.sum(0) + y.sum(0) + 1)).mean()


def tversky(z: Tensor) -> Tensor:
    p = z.sigmoid()
    hits, false, missed = (p * HARD).sum(), (p * (1 - HARD)).sum(), ((1 - p) * HARD).sum()
    return (1 - hits / (hits + 0.3 * false + 0.7 * missed)) ** 0.75


def lovasz(z: Tensor) -> Tensor:
    """The Lovász hinge: a sort and a cumulative sum."""
    z, y = z.flatten(), HARD.flatten()
    errors, order = torch.sort(1 - z * (2 * y - 1), descending=True)
    y = y[order]
    rest = y.sum() - y.cumsum(0)
    jaccard = 1 - rest / (rest + (1 - y).cumsum(0) + y.sum() - rest)
    jaccard = torch.cat([jaccard[:1], jaccard[1:] - jaccard[:-1]])
    return F.relu(errors) @ jaccard


def distillation(z: Tensor) -> Tensor:
    teacher = z.detach().roll(1, 0)
    return F.kl_div((z / 2).log_softmax(1), (teacher / 2).log_softmax(1), log_target=True, reduction="batchmean") * 4


def clipped_policy(z: Tensor) -> Tensor:
    """PPO: a ratio, clipped, and the smaller of two."""
    logs = torch.distributions.Categorical(logits=z).log_prob(CLASSES)
    ratio, gain = torch.exp(logs - logs.detach() * 0.7), torch.linspace(-1, 1, 6)
    return -torch.min(ratio * gain, ratio.clamp(0.8, 1.2) * gain).mean()


def preference(z: Tensor) -> Tensor:
    """DPO: sums of log-probabilities by gather, a logistic loss of their difference."""
    logs = z.log_softmax(1).gather(1, CLASSES.unsqueeze(1)).squeeze(1)
    return -F.logsigmoid(0.5 * (logs[:3] - logs[3:])).mean()


def quantiles(z: Tensor) -> Tensor:
    error = HARD - z
    levels = torch.tensor([0.1, 0.4, 0.6, 0.9])
    return torch.maximum(levels * error, (levels - 1) * error).mean()


def cox(z: Tensor) -> Tensor:
    """The partial likelihood of survival times."""
    risk = z[:, 0]
    return -(risk - risk.logcumsumexp(0))[::2].mean()


def arc_face(z: Tensor) -> Tensor:
    cosine = F.normalize(z, dim=1) @ F.normalize(torch.eye(4) + 0.1, dim=0)
    angle = torch.acos(cosine.clamp(-0.99, 0.99)) + 0.2 * F.one_hot(CLASSES, 4)
    return F.cross_entropy(8 * angle.cos(), CLASSES)


def moments(z: Tensor) -> Tensor:
    """MMD with a Gaussian kernel."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-torch.cdist(a, b).square() / 2).mean()

    return kernel(z[:3], z[:3]) + kernel(z[3:], z[3:]) - 2 * kernel(z[:3], z[3:])


def mixture(z: Tensor) -> Tensor:
    """A mixture density, by torch.distributions."""
    parts = torch.distributions.Normal(z[:, :2], F.softplus(z[:, 2:]) + 0.1)
    choice = torch.distributions.Categorical(logits=z[:, :2])
    return -torch.distributions.MixtureSameFamily(choice, parts).log_prob(HARD[:, 0]).mean()


LOSSES: dict[str, Loss] = {
    **by_reduction(lambda z, **o: F.cross_entropy(z, CLASSES, **o), "cross_entropy"),
    "cross_entropy, weights": lambda z: F.cross_entropy(z, CLASSES, WEIGHTS),
    "cross_entropy, ignore_index": lambda z: F.cross_entropy(z, CLASSES, ignore_index=1),
    "cross_entropy, label_smoothing": lambda z: F.cross_entropy(
        z, CLASSES, WEIGHTS, label_smoothing=0.2, ignore_index=1
    ),
    "cross_entropy, soft targets": lambda z: F.cross_entropy(z, SOFT, WEIGHTS, label_smoothing=0.1),
    "cross_entropy, pixels": lambda z: F.cross_entropy(
        z.reshape(2, 4, 3, 1), CLASSES.reshape(2, 3, 1), reduction="sum"
    ),
    **by_reduction(lambda z, **o: F.nll_loss(z.log_softmax(1), CLASSES, WEIGHTS, ignore_index=3, **o), "nll_loss"),
    **by_reduction(lambda z, **o: F.binary_cross_entropy(z.sigmoid(), HARD, **o), "binary_cross_entropy"),
    **by_reduction(
        lambda z, **o: F.binary_cross_entropy_with_logits(z, HARD, pos_weight=WEIGHTS, **o),
        "binary_cross_entropy_with_logits",
    ),
    **by_reduction(lambda z, **o: F.mse_loss(z, HARD, **o), "mse_loss"),
    "mse_loss, weights": lambda z: F.mse_loss(z, HARD, weight=SOFT),
    **by_reduction(lambda z, **o: F.l1_loss(z, HARD, **o), "l1_loss"),
    **by_reduction(lambda z, **o: F.smooth_l1_loss(z, HARD, beta=0.3, **o), "smooth_l1_loss"),
    "smooth_l1_loss, beta of 0": lambda z: F.smooth_l1_loss(z, HARD, beta=0.0),
    **by_reduction(lambda z, **o: F.huber_loss(z, HARD, delta=0.4, **o), "huber_loss"),
    **by_reduction(lambda z, **o: F.kl_div(z.log_softmax(1), SOFT, **o), "kl_div"),
    "kl_div, batchmean": lambda z: F.kl_div(z.log_softmax(1), SOFT.log(), reduction="batchmean", log_target=True),
    **by_reduction(lambda z, **o: F.poisson_nll_loss(z, HARD, full=True, **o), "poisson_nll_loss"),
    "poisson_nll_loss, rates": lambda z: F.poisson_nll_loss(z.exp(), HARD, log_input=False),
    **by_reduction(lambda z, **o: F.gaussian_nll_loss(z, HARD, F.softplus(z.flip(1)), **o), "gaussian_nll_loss"),
    "gaussian_nll_loss, full": lambda z: F.gaussian_nll_loss(z, HARD, z[:, :1].exp(), full=True),
    **by_reduction(lambda z, **o: F.hinge_embedding_loss(z, 2 * HARD - 1, margin=0.5, **o), "hinge_embedding_loss"),
    **by_reduction(
        lambda z, **o: F.cosine_embedding_loss(z, z.flip(0) * SOFT, SIGNS, margin=0.2, **o), "cosine_embedding_loss"
    ),
    **by_reduction(
        lambda z, **o: F.margin_ranking_loss(z[:, 0], z[:, 1], SIGNS, margin=0.3, **o), "margin_ranking_loss"
    ),
    **by_reduction(lambda z, **o: F.triplet_margin_loss(*pairs(z), swap=True, **o), "triplet_margin_loss"),
    "triplet_margin_loss, own distance": lambda z: F.triplet_margin_with_distance_loss(
        *pairs(z), distance_function=lambda a, b: 1 - F.cosine_similarity(a, b)
    ),
    **by_reduction(lambda z, **o: F.soft_margin_loss(z, 2 * HARD - 1, **o), "soft_margin_loss"),
    **by_reduction(lambda z, **o: F.multilabel_soft_margin_loss(z, HARD, WEIGHTS, **o), "multilabel_soft_margin_loss"),
    **by_reduction(lambda z, **o: F.multilabel_margin_loss(z, LABELS, **o), "multilabel_margin_loss"),
    **by_reduction(lambda z, **o: F.multi_margin_loss(z, CLASSES, weight=WEIGHTS, p=2, **o), "multi_margin_loss"),
    **by_reduction(ctc, "ctc_loss"),
    "ctc_loss, zero_infinity": lambda z: ctc(z, blank=0, zero_infinity=True),
    "InfoNCE": info_nce,
    "supervised contrast": supervised_contrast,
    "CLIP's": clip_loss,
    "Barlow twins": barlow_twins,
    "VICReg": vic_reg,
    "focal": focal,
    "dice": dice,
    "Tversky, focal": tversky,
    "Lovász hinge": lovasz,
    "distillation": distillation,
    "PPO": clipped_policy,
    "DPO": preference,
    "quantiles": quantiles,
    "Cox": cox,
    "ArcFace": arc_face,
    "MMD": moments,
    "mixture density": mixture,
    "log cosh": lambda z: torch.log(torch.cosh(z - HARD)).mean(),
    "Charbonnier": lambda z: torch.sqrt((z - HARD).square() + 1e-3).mean(),
    "total variation": lambda z: z.diff(dim=0).abs().sum() + z.diff(dim=1).abs().sum(),
    "label ranking by softplus": lambda z: F.softplus(z.unsqueeze(1) - z.unsqueeze(2)).triu(1).sum(),
    "spectral": lambda z: (torch.fft.rfft(z, dim=0).abs() - torch.fft.rfft(HARD, dim=0).abs()).square().mean(),
    "nuclear norm": lambda z: torch.linalg.matrix_norm(z, "nuc"),
    "entropy of a Dirichlet": lambda z: -torch.distributions.Dirichlet(F.softplus(z) + 0.5).entropy().mean(),
}


def case_of(loss: Loss) -> Case:
    model, inputs = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)), torch.randn(6, 5)
    return Case(model, lambda model: loss(model(inputs)), 6, has_eval=False)
