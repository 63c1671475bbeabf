"""A toy data set in two dimensions: inside or outside a disc."""

from __future__ import annotations

import torch

from fwdlib.checks import check_count, check_seed
from fwdlib.data import Dataset, Source, fingerprint
from fwdlib.runtime import generator, resolve_device

CREDIT = ("none needed", "the toy set of EPFL's course EE-559, Deep Learning, mini-project 2 (2019)")


def load_disc(
    *, num_train: int = 1000, num_test: int = 1000, seed: int = 0, device: str | torch.device = "cpu"
) -> Dataset:
    """Draw uniform points of the unit square; the classes are inside and outside a disc of half its area.

    The disc is centred and has the radius 1 / sqrt(2 pi). All points are independent, so a part of the test set can
    serve as a validation set.

    Args:
        num_train: number of points in the training set.
        num_test: number of points in the test set.
        seed: of the points. A larger set starts with the points of a smaller one.
        device: where the tensors go.

    Returns:
        Inputs (N, 2) and targets (N,), 1 for inside.

    Raises:
        ValueError: if a number is below 1, or ``seed`` or ``device`` cannot be used.

    Example:
        >>> data = load_disc(num_train=3)
        >>> distances = (data.train_inputs - 0.5).norm(dim=1)
        >>> (distances < (2 * torch.pi) ** -0.5).long().tolist() == data.train_targets.tolist()
        True
    """
    device = resolve_device(device)
    check_seed(seed)
    halves = []
    for half, argument, count in (("train", "num_train", num_train), ("test", "num_test", num_test)):
        points = torch.rand(check_count(argument, count), 2, generator=generator(seed, purpose=f"disc {half}"))
        halves += [points, ((points - 0.5).square().sum(1) <= 1 / (2 * torch.pi)).long()]
    source = Source("disc", "fwdlib.methods.disc.load_disc", None, fingerprint(*halves), *CREDIT, seed)
    return Dataset(*(tensor.to(device) for tensor in halves), ("outside", "inside"), source)
