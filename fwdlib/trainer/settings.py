"""The settings of ``python -m fwdlib train``, as plain dataclasses: help must not wait for torch.

Each class is a group of the help page, and the docstring below a field is its help. :class:`Settings` has all groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

from tyro import conf

from fwdlib.checks import check_choice, check_count, check_fraction, check_positive

DatasetName = Literal["MNIST", "FashionMNIST", "CIFAR10", "CIFAR100", "KMNIST", "CIFAR10-jpeg", "digits"]
TrainMode = Literal[
    "BP", "FG", "FG-RANK1", "FG-A", "FG-CV", "DFA", "DKP", "FDFA", "L-BP", "LG-BP", "LG-FG-A", "FG-GUIDED"
]
MixerName = Literal["S/1/1", "M/1/16", "M/8/16", "L/8/64"]
NormName = Literal["batch", "layer", "group", "none"]
OptimizerName = Literal["Adam", "AdamW", "Adamax", "NAdam", "RAdam", "SGD", "RMSprop", "Adagrad"]
DATASETS: tuple[str, ...] = get_args(DatasetName)
TRAIN_MODES: tuple[str, ...] = get_args(TrainMode)
WeightsName = Literal["example", "batch"]
MIXERS: tuple[str, ...] = get_args(MixerName)
NORMS: tuple[str, ...] = get_args(NormName)
WEIGHTS: tuple[str, ...] = get_args(WeightsName)
OPTIMIZER_NAMES: tuple[str, ...] = get_args(OptimizerName)
SHARED_MODES = ("BP", "FG", "FG-RANK1")  # of which several processes can share a batch


@dataclass(frozen=True)
class Task:
    """What is learned, and by which network. Its hidden layers have a normalisation and ReLU."""

    dataset: DatasetName = "MNIST"
    """Images to classify; `python -m fwdlib data` shows where each set would come from."""
    n_layers: int = 2
    """Hidden layers of the fully connected network, of 800 units each, 1000 for CIFAR10."""
    conv: bool = False
    """Train the CNN 15C5-40C5-P2-128 instead. CIFAR100 always gets AlexNet."""
    mixer: MixerName | None = None
    """Train LocalMixer of this size instead: blocks/patches/groups of Ren et al. 2023. It has norms of its own."""
    norm: NormName = "batch"
    """Normalisation of the hidden layers. BatchNorm makes an example's loss depend on the other examples of its batch.
    The others do not: layer, over all units; group, over at most 16 groups; none."""


@dataclass(frozen=True)
class Method:
    """How the gradient is computed. The defaults of FDFA are those of Bacho & Chu 2024."""

    train_mode: TrainMode = "FDFA"
    """The method:
    - BP: backprop, the exact gradient.
    - FG: forward gradient along a normal tangent of all weights.
    - FG-RANK1: forward gradient along a tangent a b^T of each weight.
    - FG-A: forward gradient along tangents of the activities.
    - FG-CV: FG-A with FDFA's feedback as a control variate.
    - DFA: a fixed random matrix sends the output's error to each layer.
    - DKP: a matrix that learns as a weight would sends it.
    - FDFA: a matrix that learns from forward derivatives sends it.
    - L-BP: each hidden layer has a loss of its own besides, and backprop trains for their sum.
    - LG-BP: each hidden layer has a loss of its own and nothing else, with its exact gradient.
    - LG-FG-A: forward gradients of these losses, each group of units by itself.
    - FG-GUIDED: forward gradient of the model's loss along the exact gradients of the layers' own losses."""
    num_tangents: int = 1
    """Tangents to average over in each step, for FG, FG-RANK1, FG-A, FG-CV, FDFA and LG-FG-A."""
    num_groups: int = 100
    """Groups of the units of a layer, at most, for LG-FG-A: more groups, less noise; one unit a group is exact."""
    grid: int = 4
    """Patches along each side of a feature map, at most, for L-BP, LG-BP, LG-FG-A and FG-GUIDED."""
    b_lr: float = 1e-4
    """Learning rate, with Adam, of the feedback of DKP, FDFA and FG-CV, or of the heads of local losses."""
    feedback_decay: float = 0.0
    """Weight decay of the feedback or the heads, for the same modes; for DKP the authors recommend 1e-6."""
    alpha: float = 1.0
    """Weight of what the feedback fails to predict, for FG-CV: 1, our default, has no bias; 0 is FDFA."""
    alpha_decay: float = 1.0
    """Factor of alpha per epoch, for FG-CV: 1, our default, keeps alpha constant."""
    weights: WeightsName = "example"
    """Derivative that weights an example's tangents, for FG-A and FG-CV: of its own loss, or of the batch's. With
    BatchNorm the first has a small bias, the second much more noise; without it neither has bias."""


@dataclass(frozen=True)
class Steps:
    """How the gradient changes the weights. All defaults except the seed are those of Bacho & Chu 2024."""

    epochs: int = 100
    """Passes through the training images."""
    batch_size: int = 64
    """Images in a step; the authors use 128 for AlexNet."""
    optimizer: OptimizerName = "Adam"
    """Optimizer of the weights, from torch.optim; SGD has no momentum."""
    lr: float = 1e-4
    """Learning rate of the weights."""
    gamma: float = 0.95
    """Factor of the weights' learning rate after each epoch; the feedback's stays constant."""
    weight_decay: float = 0.0
    """Weight decay of the weights."""
    seed: int = 0
    """Fixes the initial weights, the batches, the feedback and the tangents."""


@dataclass(frozen=True)
class Execution:
    """Where training runs, and which files it writes.

    Each epoch adds a row to log.csv and record.json, and replaces checkpoint.pt. The end adds a figure of the curves.
    """

    device: str = "cpu"
    """cpu, cuda or cuda:1; the images are kept there, too."""
    processes: int = 1
    """Processes on this machine that share each batch, for BP, FG and FG-RANK1. Not needed under torchrun."""
    log_dir: Annotated[Path | None, conf.arg(metavar="DIR", help_behavior_hint="")] = None
    """Folder for the files. (default: results/train/DATASET-MODE-NETWORK-seedN)"""
    resume: bool = False
    """Resume from the folder's checkpoint, if it exists, and end as an uninterrupted run would."""
    dry_run: bool = False
    """Take one step, evaluate one batch of test images and write nothing, to see that it works."""
    test_batch_size: int = 1000
    """Test images that go through the network at once. It changes the memory, not the result."""
    log_interval: int = 100
    """Steps between two updates of the progress bar."""


@dataclass(frozen=True)
class Settings(Task, Method, Steps, Execution):
    """All settings, checked: ``Settings(dataset="MNIST", train_mode="FDFA", epochs=10)``.

    Raises:
        ValueError: if a value is out of its range.
    """

    def __post_init__(self) -> None:
        check_choice("dataset", self.dataset, DATASETS)
        check_choice("train_mode", self.train_mode, TRAIN_MODES)
        if self.mixer is not None:
            check_choice("mixer", self.mixer, MIXERS)
        check_choice("norm", self.norm, NORMS)
        check_choice("weights", self.weights, WEIGHTS)
        check_choice("optimizer", self.optimizer, OPTIMIZER_NAMES)
        counts = ("n_layers", "num_tangents", "num_groups", "grid", "epochs", "batch_size", "test_batch_size")
        counts += ("log_interval", "processes")
        for name in counts:
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
        return 1000 if self.dataset.startswith("CIFAR10") else 800

    @property
    def is_alexnet(self) -> bool:
        """Whether the network is AlexNet."""
        return self.dataset == "CIFAR100" and self.mixer is None

    @property
    def network(self) -> str:
        """Name of the network: ``"2x800"``, ``"cnn"``, ``"alexnet"`` or ``"mixer-M-1-16"``; and of its norm."""
        if self.mixer is not None:
            return f"mixer-{self.mixer.replace('/', '-')}"
        kind = "alexnet" if self.is_alexnet else "cnn" if self.conv else f"{self.n_layers}x{self.width}"
        return kind if self.norm == "batch" else f"{kind}-{self.norm}"

    @property
    def name(self) -> str:
        """Name of the run, and of its folder."""
        return f"{self.dataset}-{self.train_mode}-{self.network}-seed{self.seed}"


def why_not_shared(train_mode: str) -> str:
    """Return the message for several processes with a train mode that cannot share a batch."""
    return (
        f"several processes can train together by {', '.join(SHARED_MODES)} only, not by {train_mode}. Its updates "
        f"need the activities of each example in each layer; sharing those would send as many numbers as backprop does"
    )
