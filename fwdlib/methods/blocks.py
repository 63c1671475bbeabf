"""A model as a chain of blocks, between which no error passes: what the rules of direct feedback work on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fwdlib.stacked.dual import Dual
from fwdlib.stacked.forward_pass import Pass
from fwdlib.stacked.perturbations import Perturbation
from fwdlib.stacked.recording import Recording
from fwdlib.tangents import Params, random_signs

HOW_TO_SAY = (
    "Make it an nn.Sequential in which every hidden layer ends in an activation module (nn.Sequential(nn.Linear(784, "
    "800), nn.ReLU(), nn.Linear(800, 10))), or give it a method blocks() that returns the modules which it applies one "
    "after the other: [nn.Sequential(conv, relu), ..., readout]."
)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a model, in order: each up to and with an activation, the last one the readout.

    Args:
        model: an ``nn.Sequential``, nested or not, or anything with a method ``blocks()`` that returns them.

    Raises:
        ValueError: if the blocks cannot be told, or there are fewer than two; the message shows how to say them.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        >>> [len(block) for block in blocks_of(model)]
        [3, 1]
    """
    if callable(getattr(model, "blocks", None)):
        blocks = list(model.blocks())
    elif isinstance(model, nn.Sequential):
        blocks = [nn.Sequential(*modules) for modules in _cut(model)]
    else:
        raise ValueError(f"the blocks of {type(model).__name__} cannot be told. {HOW_TO_SAY}")
    if len(blocks) < 2:
        raise ValueError(
            f"{type(model).__name__} has {len(blocks)} block, and feedback needs a hidden one. {HOW_TO_SAY}"
        )
    lost = {id(p) for p in model.parameters()} - {id(p) for block in blocks for p in block.parameters()}
    if lost:
        names = [name for name, p in model.named_parameters() if id(p) in lost]
        raise ValueError(f"blocks() leaves out the parameters {', '.join(names)}. {HOW_TO_SAY}")
    return blocks


def _cut(model: nn.Sequential) -> list[list[nn.Module]]:
    blocks: list[list[nn.Module]] = [[]]
    for module in _leaves(model):
        blocks[-1].append(module)
        if _is_activation(module):
            blocks.append([])
    return blocks if blocks[-1] else blocks[:-1]


def _leaves(model: nn.Sequential) -> list[nn.Module]:
    found = []
    for module in model:
        found += _leaves(module) if isinstance(module, nn.Sequential) else [module]
    return found


def _is_activation(module: nn.Module) -> bool:
    return type(module).__module__ == "torch.nn.modules.activation" and not any(True for _ in module.children())


class Network:
    """A model as its blocks, and what has been recorded of it.

    Args:
        model: made of blocks.

    Raises:
        ValueError: as :func:`blocks_of`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = list(model.modules())
        self.blocks = [Block(model, block) for block in blocks_of(model)]
        self.recording = Recording()

    def tensors(self) -> Params:
        """Return the model's own parameters and buffers by its names for them, without its search for them."""
        return {name: owner[attribute] for block in self.blocks for name, owner, attribute in block.places.values()}


class Block:
    """A block, and where the model's parameters and buffers are in it.

    Args:
        model: that it is a part of.
        block: one of :func:`blocks_of`.
    """

    def __init__(self, model: nn.Module, block: nn.Module) -> None:
        self.block = block
        names = {id(x): name for name, x in [*model.named_buffers(), *model.named_parameters()]}
        self.places: dict[str, tuple[str, dict, str]] = {}  # by its name in the block: in the model, and where it is
        for local, x in [*block.named_parameters(), *block.named_buffers()]:
            path, _, attribute = local.rpartition(".")
            owner = block.get_submodule(path)
            kept = owner._parameters if attribute in owner._parameters else owner._buffers
            self.places[local] = names[id(x)], kept, attribute

    def run(self, tensors: Params | None, inputs: Tensor, tangents: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Push the inputs and their tangents (K, B, ...) through, with the tape on, which begins here.

        Args:
            tensors: in place of the model's parameters and buffers of these names; None for its own.
            inputs: constants to the tape.
            tangents: None for no tangents.
        """
        call: Any = self.block
        if tensors is not None:
            given = {local: tensors[name] for local, (name, _, _) in self.places.items() if name in tensors}
            call = lambda inputs: functional_call(self.block, given, (inputs,))  # noqa: E731
        if tangents is None:
            with torch.enable_grad():
                return call(inputs), None
        dual = Dual.of(inputs, tangents)
        with torch.enable_grad(), Pass(Perturbation({}, len(tangents), len(inputs), random_signs), {}):
            dual = call(dual)
            return dual.primal, dual.tangents.detach()


class ErrorsOfBlocks(torch.autograd.Function):
    """Hand the blocks their errors where backprop would carry them back; forward, it is the logits.

    ``deltas`` makes of the error of the logits that of each hidden output. As no block's tape reaches the one before,
    a call to autograd with the loss then finds nothing but local derivatives.
    """

    @staticmethod
    def forward(ctx: Any, deltas: Callable[[Tensor], list[Tensor]], logits: Tensor, *hidden: Tensor) -> Tensor:
        """Return the logits."""
        ctx.deltas = deltas
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, error: Tensor) -> tuple[Tensor | None, ...]:
        """Return the error of the logits and those of the hidden outputs."""
        return None, error, *ctx.deltas(error)


def shapes_of(model: nn.Module, inputs: Tensor) -> tuple[int, list[torch.Size]]:
    """Return the number of outputs, and the shape of what each hidden block gives for one example.

    Args:
        model: made of blocks; left as it was.
        inputs: a batch for it.
    """
    shapes, activation = [], inputs
    modes = [(module, module.training) for module in model.modules()]
    model.eval()  # BatchNorm's statistics stay as they are
    try:
        with torch.no_grad():
            for block in blocks_of(model):
                activation = block(activation)
                shapes.append(activation.shape[1:])
    finally:
        for module, mode in modes:
            module.training = mode
    return shapes.pop().numel(), shapes
