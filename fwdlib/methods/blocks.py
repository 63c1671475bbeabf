"""A model as a chain of blocks with no error passing between them: the rules of direct feedback need this form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fwdlib.stacked.dual import Dual
from fwdlib.stacked.forward_pass import Pass
from fwdlib.stacked.perturbations import Perturbation
from fwdlib.stacked.recording import Recording
from fwdlib.tangents import Params, random_signs

HOW_TO_GIVE_BLOCKS = (
    "Make it an nn.Sequential in which every hidden layer ends in an activation module (nn.Sequential(nn.Linear(784, "
    "800), nn.ReLU(), nn.Linear(800, 10))), or give it a method blocks() that returns the modules that it applies in "
    "order: [nn.Sequential(conv, relu), ..., readout]."
)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a model, in order: each ends with an activation, the last is the readout.

    Args:
        model: an ``nn.Sequential``, nested or not, or anything with a method ``blocks()`` that returns them.

    Raises:
        ValueError: if the model does not show its blocks, or has fewer than two; the message shows what to do.

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
        raise ValueError(f"{type(model).__name__} does not show its blocks. {HOW_TO_GIVE_BLOCKS}")
    if len(blocks) < 2:
        raise ValueError(
            f"{type(model).__name__} has {len(blocks)} block, and feedback needs a hidden one. {HOW_TO_GIVE_BLOCKS}"
        )
    lost = {id(p) for p in model.parameters()} - {id(p) for block in blocks for p in block.parameters()}
    if lost:
        names = [name for name, p in model.named_parameters() if id(p) in lost]
        raise ValueError(f"blocks() leaves out the parameters {', '.join(names)}. {HOW_TO_GIVE_BLOCKS}")
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
    """The blocks of a model, and the recording of its kernels.

    Raises:
        ValueError: as :func:`blocks_of`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = list(model.modules())
        self.blocks = [Block(model, block) for block in blocks_of(model)]
        self.recording = Recording()

    def tensors(self) -> Params:
        """Return the model's own parameters and buffers by name, without a search through its modules."""
        return {name: owner[attribute] for block in self.blocks for name, owner, attribute in block.places.values()}

    def run(
        self, tensors: Params | None, inputs: Tensor, behind: Sequence[Tensor | None], *, live_only: bool = False
    ) -> tuple[list[Tensor], Tensor | None]:
        """Return the outputs of all blocks, each with a tape that starts at its inputs, and the tangents of the last.

        Args:
            tensors: replace the model's parameters and buffers of these names; None for its own.
            inputs: of the first block.
            behind: for each hidden block the tangents (K, B, ...) that enter at its outputs; None for none.
            live_only: no tangent enters at an output of 0 behind a ReLU, which passes no gradient on.
        """
        activation, tangents = inputs, None
        outputs: list[Tensor] = []
        for block, entering in zip(self.blocks, [*behind, None], strict=True):
            output, tangents = block.run(tensors, activation, tangents)
            outputs.append(output)
            activation = output.detach()
            if entering is not None:
                if live_only and block.ends_in_relu:
                    entering = entering * (activation != 0)
                tangents = entering if tangents is None else tangents + entering
        return outputs, tangents


class Block:
    """A block, and the places of the model's parameters and buffers in it.

    Args:
        model: the whole model.
        block: one of :func:`blocks_of`.
    """

    def __init__(self, model: nn.Module, block: nn.Module) -> None:
        self.block = block
        last = _leaves(block)[-1] if isinstance(block, nn.Sequential) else block
        self.ends_in_relu = isinstance(last, nn.ReLU)  # so an output of 0 has no derivative
        names = {id(x): name for name, x in [*model.named_buffers(), *model.named_parameters()]}
        self.places: dict[str, tuple[str, dict, str]] = {}  # local name -> name, owner, attribute
        for local, x in [*block.named_parameters(), *block.named_buffers()]:
            path, _, attribute = local.rpartition(".")
            owner = block.get_submodule(path)
            kept = owner._parameters if attribute in owner._parameters else owner._buffers
            self.places[local] = names[id(x)], kept, attribute

    def run(self, tensors: Params | None, inputs: Tensor, tangents: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the outputs and their tangents (K, B, ...). The tape is on and starts at the inputs.

        Args:
            tensors: replace the model's parameters and buffers of these names; None for its own.
            inputs: constants for the tape.
            tangents: of the inputs; None for no tangents.
        """
        call: Any = self.block
        if tensors is not None:
            given = {local: tensors[name] for local, (name, _, _) in self.places.items() if name in tensors}
            call = lambda inputs: functional_call(self.block, given, (inputs,))  # noqa: E731
        if tangents is None:
            with torch.enable_grad():
                return call(inputs), None
        dual = Dual.of(inputs, tangents)
        perturbation = Perturbation({}, len(tangents), len(inputs), random_signs)
        with torch.enable_grad(), Pass(perturbation, {}, keeps_tape=True):
            dual = call(dual)
            return dual.primal, dual.tangents.detach()


class ErrorsOfBlocks(torch.autograd.Function):
    """Give each block its error in the backward pass, where backprop would carry it back. Forward, return the logits.

    ``deltas`` turns the error of the logits into that of each hidden output. No block's tape reaches the block before,
    so autograd then computes local derivatives only.
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
    """Return the number of outputs, and the shape of each hidden block's output for one example.

    Args:
        model: made of blocks; it is not changed.
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
