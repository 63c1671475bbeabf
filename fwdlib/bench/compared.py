"""What the benchmark compares: models with their batches, and training steps in all their forms.

A step is the estimate and the update of plain SGD. All steps of a model share its parameters. The learning rate is so
small that the parameters stay where they are.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value

from fwdlib import runtime
from fwdlib.bench import networks, rivals
from fwdlib.bench.rivals import CHECKPOINTS, OPTIMIZERS, Step
from fwdlib.checks import check_choice, check_count
from fwdlib.models import CNN, MLP, LogisticRegression, initialise
from fwdlib.objectives import params_of
from fwdlib.stacked.step import SGDStep
from fwdlib.steps import forward_step_

LEARNING_RATE = 1e-9
OURS = ("forward gradient", "rank-one", "per-example", "activity")
COMPARED = ("backprop", *CHECKPOINTS, "two-point", *OURS)  # names of METHOD_STYLES
SWEPT = COMPARED[:-2]  # over the depth, the width and the batch of an MLP
COMPILED = ("backprop", "rank-one")  # of these also over the width and the batch, compiled
PEERS = ("torchzero",)
DROPPED_IN = ("backprop", "in-backward", "rank-one")  # timed with each of torch's optimizers, too
LARGE = 30  # modules: a larger model takes up to a minute to compile
OWN_MODEL = tuple(CHECKPOINTS)  # they leave hooks at the parameters


class Task(NamedTuple):
    """A model and the batch that it trains on."""

    title: str
    build: Callable[[], nn.Module]
    batch: int
    """Number of examples."""
    shape: tuple[int, ...]
    """Shape of one example."""
    num_classes: int
    vocabulary: int = 0
    """Of the tokens that the inputs are; 0 if they are numbers."""


def perceptron(*widths: int) -> nn.Sequential:
    """Return linear layers between these widths with ReLU between them, initialised so that signals keep their size.

    Torch's own initialisation shrinks signals by a factor of 0.4 in each layer. After a hundred layers the gradient
    would consist of denormal numbers, which processors handle slowly.
    """
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        linear = nn.Linear(fan_in, fan_out)
        nn.init.kaiming_uniform_(linear.weight, nonlinearity="relu")
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def paper_cnn() -> nn.Sequential:
    """Return the CNN of Baydin et al. 2022: 4 convolutions 3x3x64, 2x2 max-pools after 2 and 4, two linear layers."""

    def convolution(channels: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, 64, 3, padding=1), nn.ReLU()]

    return nn.Sequential(
        *convolution(1),
        *convolution(64),
        nn.MaxPool2d(2),
        *convolution(64),
        *convolution(64),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 7 * 7, 1024),
        nn.ReLU(),
        nn.Linear(1024, 10),
    )


MODELS = {
    "penguins-logistic": Task("penguins logistic 4-3", LogisticRegression, 250, (4,), 3),
    "penguins-mlp": Task("penguins MLP 4-64-8-3", MLP, 250, (4,), 3),
    "mnist-logistic": Task("MNIST logistic 784-10", lambda: LogisticRegression(784, 10), 64, (784,), 10),
    "mnist-mlp": Task("MNIST MLP 784-1024-1024-10", lambda: perceptron(784, 1024, 1024, 10), 64, (784,), 10),
    "kmnist-cnn": Task("KMNIST CNN of notebook 3", CNN, 500, (1, 28, 28), 10),
    "paper-cnn": Task("CNN of the paper", paper_cnn, 64, (1, 28, 28), 10),
    "vit": Task("vision transformer", networks.vit, 16, (3, 32, 32), 10),
    "gpt": Task("GPT-style transformer", networks.gpt, 16, (64,), 256, vocabulary=256),
    "resnet18": Task("ResNet-18", networks.resnet18, 8, (3, 32, 32), 10),
    "mobilenet-v3": Task("MobileNetV3 small", networks.mobilenet_v3, 8, (3, 64, 64), 10),
}


def find_task(name: str) -> Task:
    """Return the task called ``name`` in :data:`MODELS`; ``"20x256"`` is 20 layers of width 256, and one to 10 logits.

    Raises:
        ValueError: if ``name`` is neither; the message lists the models.
    """
    depth, cross, width = name.partition("x")
    if cross and depth.isdecimal() and width.isdecimal():
        widths = [int(width)] * (check_count("depth", int(depth)) + 1)
        return Task(f"{depth} layers of width {width}", lambda: perceptron(*widths, 10), 64, (int(width),), 10)
    return MODELS[check_choice("models", name, MODELS)]


def prepare(
    task: Task, device: torch.device | str = "cpu", batch: int | None = None
) -> tuple[nn.Module, Tensor, Tensor]:
    """Return the model in training mode with random inputs and targets; time and memory do not depend on their values.

    Args:
        task: what to build.
        device: where to put it.
        batch: number of examples; None for the task's own.
    """
    model = initialise(task.build, 0).to(device).train()
    draw = runtime.generator(0, purpose="benchmark")
    batch = check_count("batch", task.batch if batch is None else batch)
    if task.vocabulary:
        inputs = torch.randint(task.vocabulary, (batch, *task.shape), generator=draw)
    else:
        inputs = torch.randn(batch, *task.shape, generator=draw)
    targets = torch.randint(task.num_classes, inputs.shape if task.vocabulary else (batch,), generator=draw)
    return model, inputs.to(device), targets.to(device)


class Variant(NamedTuple):
    """A method in one of its forms. Its string, such as ``"rank-one K=4, compiled"``, is its key in the results."""

    method: str
    """One of :data:`COMPARED`."""
    num_tangents: int = 1
    compiled: bool = False
    form: str = ""
    """``"channels_last"`` for convolutional models; ``"one graph"`` for backprop, whose forward pass, backward pass and
    update are then traced into one graph by hand."""
    optimizer: str = ""
    """One of :data:`~fwdlib.bench.rivals.OPTIMIZERS`, into which the method drops ``.grad``; empty for plain SGD in the
    method's own fastest form."""

    def __str__(self) -> str:
        """Return the label and the mode, separated by a comma."""
        label = f"{self.method} K={self.num_tangents}" if self.num_tangents > 1 else self.method
        label = f"{label} with {self.optimizer}" if self.optimizer else label
        return f"{label} {self.form}".rstrip() + (", compiled" if self.compiled else ", eager")


def variants(model: nn.Module, *, quick: bool = False, peers: bool = False) -> list[Variant]:
    """Return the variants to time for a model. A quick run has fewer, and as for a large model three compiled ones.

    Args:
        model: the model.
        quick: whether the run is quick.
        peers: whether to time other packages, too.
    """
    has_convolution = any(isinstance(module, nn.Conv2d) for module in model.modules())
    found = [Variant(method) for method in (*CHECKPOINTS, "two-point", "forward gradient")]
    found += [Variant(method) for method in PEERS if peers]
    found += [Variant(method, optimizer=name) for method in DROPPED_IN for name in OPTIMIZERS if not quick]
    for compiled in (False, True):
        forms = ["", *(["channels_last"] if has_convolution else []), *(["one graph"] if compiled else [])]
        found += [Variant("backprop", compiled=compiled, form=form) for form in forms]
        found += [Variant(method, 1, compiled) for method in OURS[1:]]
        found += [Variant("rank-one", 1, compiled, "channels_last")] if has_convolution else []
        found += [] if quick or compiled else [Variant("rank-one", k) for k in (4, 16)]
    if quick or sum(1 for _ in model.modules()) > LARGE:
        backprop = Variant("backprop", compiled=True)
        kept = (backprop, backprop._replace(form="one graph"), Variant("rank-one", compiled=True))
        found = [variant for variant in found if not variant.compiled or variant in kept]
    return sorted(found, key=lambda variant: (*COMPARED, *PEERS).index(variant.method))


def make_step(variant: Variant, model: nn.Module, inputs: Tensor, targets: Tensor) -> Step:
    """Return a training step: the estimate and the update of SGD. A compiled one compiles in its first two calls."""
    if variant.form == "channels_last":
        model = copy.deepcopy(model).to(memory_format=torch.channels_last)
        inputs = inputs.to(memory_format=torch.channels_last)
    if variant.method == "backprop":
        if variant.form == "one graph":
            return _one_graph(model, inputs, targets)
        return _backprop(model, inputs, targets, variant.optimizer or "SGD", compiled=variant.compiled)
    if variant.method in CHECKPOINTS:
        return rivals.in_backward(model, inputs, targets, LEARNING_RATE, variant.method, variant.optimizer)
    if variant.method == "two-point":
        return rivals.two_point(model, inputs, targets, LEARNING_RATE)
    if variant.method == "torchzero":
        return rivals.torchzero(model, inputs, targets, LEARNING_RATE)
    if variant.method == "forward gradient":
        return _dropped_in(model, inputs, targets, "normal", "SGD")
    if variant.optimizer:
        return _dropped_in(model, inputs, targets, variant.method, variant.optimizer)
    step = SGDStep(
        model,
        learning_rate=LEARNING_RATE,
        num_tangents=variant.num_tangents,
        tangents=variant.method,
        compiled=variant.compiled,
    )
    return lambda: step(inputs, targets)


def _dropped_in(model: nn.Module, inputs: Tensor, targets: Tensor, tangents: str, optimizer_name: str) -> Step:
    optimizer = OPTIMIZERS[optimizer_name](model.parameters(), LEARNING_RATE)

    def closure() -> Tensor:
        return F.cross_entropy(model(inputs), targets)

    return lambda: forward_step_(model, closure, optimizer, num_examples=len(inputs), tangents=tangents)


def _backprop(model: nn.Module, inputs: Tensor, targets: Tensor, optimizer_name: str, *, compiled: bool) -> Step:
    def evaluate(inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(inputs), targets)

    # without fullgraph, torch silently runs what it cannot compile
    loss_of = torch.compile(evaluate, fullgraph=True, dynamic=False, mode=_mode(inputs)) if compiled else evaluate
    optimizer = OPTIMIZERS[optimizer_name](model.parameters(), LEARNING_RATE)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(inputs, targets)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


Named = dict[str, Tensor]


def _one_graph(model: nn.Module, inputs: Tensor, targets: Tensor) -> Step:
    # Compiles backprop as SGDStep compiles forward gradients: no autograd engine, no optimizer between the kernels.
    from torch.fx.experimental.proxy_tensor import make_fx

    def loss_of(params: Named, buffers: Named, inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, params | buffers, (inputs,)), targets)

    def train(params: Named, buffers: Named, inputs: Tensor, targets: Tensor) -> Tensor:
        grads, loss = grad_and_value(loss_of)(params, buffers, inputs, targets)
        # not add_ with alpha: torch 2.14's inductor then fuses it with the product before, and loses alpha
        updated = {name: p - LEARNING_RATE * grads[name] for name, p in params.items()}
        for name, p in params.items():
            p.copy_(updated[name])
        return loss

    params, buffers, graphs = params_of(model), dict(model.named_buffers()), []

    def step() -> Tensor:
        if not graphs:
            copies = ({name: x.clone() for name, x in named.items()} for named in (params, buffers))
            graph = make_fx(train)(*copies, inputs, targets)
            graphs.append(torch.compile(graph, fullgraph=True, dynamic=False, mode=_mode(inputs)))
        with torch.no_grad():
            return graphs[0](params, buffers, inputs, targets)

    return step


def _mode(inputs: Tensor) -> str | None:
    return "reduce-overhead" if inputs.is_cuda else None  # CUDA graphs
