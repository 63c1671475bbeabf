"""What ``python -m fwdlib train`` can be told: plain dataclasses, for its help must not wait for torch.

Each class is a group of the help page, each docstring below a field its line; :class:`Settings` is all of them in one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

from tyro import conf

from fwdlib.checks import check_choice, check_count, check_fraction, check_positive

DatasetName = Literal["MNIST", "FashionMNIST", "CIFAR10", "CIFAR100", "KMNIST", "digits"]
TrainMode = Literal["BP", "FG", "FG-RANK1", "FG-A", "FG-CV", "DFA", "DKP", "FDFA"]
OptimizerName = Literal["Adam", "AdamW", "Adamax", "NAdam", "RAdam", "SGD", "RMSprop", "Adagrad"]
DATASETS: tuple[str, ...] = get_args(DatasetName)
TRAIN_MODES: tuple[str, ...] = get_args(TrainMode)
OPTIMIZER_NAMES: tuple[str, ...] = get_args(OptimizerName)
SHARED_MODES = ("BP", "FG", "FG-RANK1")  # several processes can share a batch


@dataclass(frozen=True)
class Task:
    """What is learned, and by which network; its hidden layers have BatchNorm and ReLU."""

    dataset: DatasetName = "MNIST"
    """Images to tell apart; `python -m fwdlib data` says where each set would come from."""
    n_layers: int = 2
    """Hidden layers of the fully connected network, of 800 units each, 1000 for CIFAR10."""
    conv: bool = False
    """Take the CNN 15C5-40C5-P2-128 instead. CIFAR100 always gets AlexNet."""


@dataclass(frozen=True)
class Method:
    """Where the gradient comes from. All defaults but alpha's are those of Bacho & Chu 2024."""

    train_mode: TrainMode = "FDFA"
    """The method:
    - BP: backprop, the exact gradient.
    - FG: forward gradient along a normal tangent of all weights.
    - FG-RANK1: along a tangent a b^T for each weight.
    - FG-A: along tangents of the activities.
    - FG-CV: the same, with FDFA's feedback as a control variate.
    - DFA: the output's error sent to each layer by a fixed random matrix.
    - DKP: by a matrix that learns as a weight would.
    - FDFA: by a matrix that learns from forward derivatives."""
    num_tangents: int = 1
    """Tangents to average over in each step, for FG, FG-RANK1, FG-A, FG-CV and FDFA."""
    b_lr: float = 1e-4
    """Learning rate of the feedback, by Adam, for DKP, FDFA and FG-CV."""
    feedback_decay: float = 0.0
    """Weight decay of the feedback, for DKP, FDFA and FG-CV; for DKP the authors recommend 1e-6."""
    alpha: float = 1.0
    """Weight of what the feedback fails to predict, for FG-CV: 1, ours, has no bias; 0 is FDFA."""
    alpha_decay: float = 1.0
    """What alpha is multiplied with over an epoch, for FG-CV: 1, ours, leaves it as it is."""


@dataclass(frozen=True)
class Steps:
    """How the weights follow the gradient. Defaults are those of Bacho & Chu 2024, the seed apart."""

    epochs: int = 100
    """Passes through the training images."""
    batch_size: int = 64
    """Images in a step; for AlexNet the authors take 128."""
    optimizer: OptimizerName = "Adam"
    """Optimizer of the weights, from torch.optim; SGD has no momentum."""
    lr: float = 1e-4
    """Learning rate of the weights."""
    gamma: float = 0.95
    """What the learning rate of the weights is multiplied with after each epoch; the feedback's stays."""
    weight_decay: float = 0.0
    """Weight decay of the weights."""
    seed: int = 0
    """Fixes the initial weights, the batches, the feedback and the tangents."""


@dataclass(frozen=True)
class Running:
    """Where it runs, and what it leaves.

    After each epoch a row in log.csv, the same in record.json, and checkpoint.pt; at the end the curves as a figure.
    """

    device: str = "cpu"
    """cpu, cuda or cuda:1; the images live there, too."""
    processes: int = 1
    """Processes on this machine that share each batch, for BP, FG and FG-RANK1. Those that torchrun has started need no
    saying."""
    log_dir: Annotated[Path | None, conf.arg(metavar="DIR", help_behavior_hint="")] = None
    """Folder for the files. (default: results/train/DATASET-MODE-NETWORK-seedN)"""
    resume: bool = False
    """Go on from the folder's checkpoint, if there is one, and end as if there had been no interruption."""
    dry_run: bool = False
    """Take one step, evaluate one batch of test images and write nothing, to see that it works."""
    test_batch_size: int = 1000
    """Test images that go through the network at once: a matter of memory, not of the result."""
    log_interval: int = 100
    """Steps between two updates of the progress bar."""


@dataclass(frozen=True)
class Settings(Task, Method, Steps, Running):
    """All of it, checked: ``Settings(dataset="MNIST", train_mode="FDFA", epochs=10)``.

    Raises:
        ValueError: if a value is out of its range.
    """

    def __post_init__(self) -> None:
        check_choice("dataset", self.dataset, DATASETS)
        check_choice("train_mode", self.train_mode, TRAIN_MODES)
        check_choice("optimizer", self.optimizer, OPTIMIZER_NAMES)
        for name in (
            "n_layers",
            "num_tangents",
            "epochs",
            "batch_size",
            "test_batch_size",
            "log_interval",
            "processes",
        ):
            check_count(name, getattr(self, name))
        check_count("seed", self.seed, minimum=0)
        if self.processes > 1 and self.train_mode not in SHARED_MODES:
            raise ValueError(why_not_shared(self.train_mode))
        for name in ("lr", "b_lr", "gamma"):
            check_positive(name, getattr(self, name))
        for name in ("weight_decay", "feedback_decay"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be 0 or a finite number above it, got {getattr(self, name)!r}")
        for name in ("alpha", "alpha_decay"):
            check_fraction(name, getattr(self, name))

    @property
    def width(self) -> int:
        """Units of a hidden layer of the fully connected network."""
        return 1000 if self.dataset == "CIFAR10" else 800

    @property
    def network(self) -> str:
        """What the network is called: ``"2x800"``, ``"cnn"`` or ``"alexnet"``."""
        if self.dataset == "CIFAR100":
            return "alexnet"
        return "cnn" if self.conv else f"{self.n_layers}x{self.width}"

    @property
    def name(self) -> str:
        """What the run is called, for its folder."""
        return f"{self.dataset}-{self.train_mode}-{self.network}-seed{self.seed}"


def why_not_shared(train_mode: str) -> str:
    """Return what to tell who wants several processes for a train mode that has no use for them."""
    return (
        f"several processes can train together by {', '.join(SHARED_MODES)} only, not by {train_mode}, whose updates "
        f"are made from what each example does in each layer: to share them would take as many numbers as backprop's"
    )
