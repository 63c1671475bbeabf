"""A model as a chain of blocks with no error passing between them: the rules of direct feedback need this form.

The *sites* of a model are the outputs of its hidden blocks, where a rule hands in errors and where tangents enter. A
block with several layers can name its inner layers by a method ``layers()``; their outputs are then sites, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fwdlib.forward.derivatives import check_followable
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
        model: an ``nn.Sequential``, nested or not, or anything with a method ``blocks()`` that returns them. A block
            may have a method ``layers()`` that returns a dict: its inner layers in order, each with whether a unit of
            its output acts on one part of the block's output only: the same group of channels, the same position.

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
        NotImplementedError: as :func:`fwdlib.forward.derivatives.check_followable`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = list(model.modules())
        check_followable(self.modules)
        self.blocks = [Block(model, block) for block in blocks_of(model)]
        self.recording = Recording()

    def tensors(self) -> Params:
        """Return the model's own parameters and buffers by name, without a search through its modules."""
        return {name: owner[attribute] for block in self.blocks for name, owner, attribute in block.places.values()}

    def run(
        self, tensors: Params | None, inputs: Tensor, behind: Sequence[Tensor | None], *, live_only: bool = False
    ) -> tuple[list[Tensor], Tensor | None]:
        """Return the outputs of all sites and the logits, each with a tape from the site before, and their tangents.

        Args:
            tensors: replace the model's parameters and buffers of these names; None for its own.
            inputs: of the first block.
            behind: what enters at each site; see :meth:`Block.run`.
            live_only: no tangent enters at an output of 0 behind a ReLU, which passes no gradient on.

        Returns:
            The outputs, and the tangents (K, B, classes) of the logits; None if none entered.
        """
        activation, tangents = inputs, None
        outputs: list[Tensor] = []
        for block in self.blocks:
            entering = behind[len(outputs) : len(outputs) + len(block.layers) + 1]
            found, tangents = block.run(tensors, activation, tangents, entering or [None], live_only=live_only)
            activation = found[-1].detach()
            outputs += found
        return outputs, tangents


class Block:
    """A block, its inner layers, and the places of the model's parameters and buffers in it.

    Args:
        model: the whole model.
        block: one of :func:`blocks_of`.
    """

    def __init__(self, model: nn.Module, block: nn.Module) -> None:
        self.block = block
        self.layers: dict[nn.Module, bool] = block.layers() if callable(getattr(block, "layers", None)) else {}
        names = {id(x): name for name, x in [*model.named_buffers(), *model.named_parameters()]}
        self.places: dict[str, tuple[str, dict, str]] = {}  # local name -> name, owner, attribute
        for local, x in [*block.named_parameters(), *block.named_buffers()]:
            path, _, attribute = local.rpartition(".")
            owner = block.get_submodule(path)
            kept = owner._parameters if attribute in owner._parameters else owner._buffers
            self.places[local] = names[id(x)], kept, attribute

    def run(
        self,
        tensors: Params | None,
        inputs: Tensor,
        tangents: Tensor | None,
        behind: Sequence[Tensor | None],
        *,
        live_only: bool = False,
    ) -> tuple[list[Tensor], Tensor | None]:
        """Return the outputs of the sites, each with a tape from the site before, and the tangents of the last.

        Args:
            tensors: replace the model's parameters and buffers of these names; None for its own.
            inputs: constants for the tape.
            tangents: of the inputs; None for no tangents.
            behind: for each site the tangents (K, B, ...) that enter there, or None. A single item runs the block as a
                whole: only its output is a site.
            live_only: see :meth:`Network.run`.
        """
        call: Any = self.block
        if tensors is not None:
            given = {local: tensors[name] for local, (name, _, _) in self.places.items() if name in tensors}
            call = lambda inputs: functional_call(self.block, given, (inputs,))  # noqa: E731
        outputs: list[Tensor] = []

        def visit(module: nn.Module, output: Tensor) -> Tensor:
            # Cut the tape at a site, and let tangents enter.
            primal, along = (output.primal, output.tangents) if isinstance(output, Dual) else (output, None)
            entering = behind[len(outputs)]
            outputs.append(primal)
            primal = primal.detach()
            if entering is not None:
                if live_only and _ends_in_relu(module):
                    entering = torch.ops.aten.threshold_backward(entering, primal.expand_as(entering), 0)
                along = entering if along is None else along + entering
            return primal if along is None else Dual.of(primal, along)

        with torch.enable_grad(), _visited(self.layers if len(behind) > 1 else (), visit):
            first = next((x for x in (tangents, *behind[:-1]) if x is not None), None)
            if first is None:
                last = visit(self.block, call(inputs))
            else:
                perturbation = Perturbation({}, len(first), len(inputs), random_signs)
                with Pass(perturbation, {}, keeps_tape=True):
                    last = visit(self.block, call(inputs if tangents is None else Dual.of(inputs, tangents)))
        return outputs, last.tangents.detach() if isinstance(last, Dual) else None


@contextmanager
def _visited(layers: Sequence[nn.Module], visit: Callable[[nn.Module, Tensor], Tensor]) -> Iterator[None]:
    # Pass the outputs of these modules through ``visit``.
    hooks = [layer.register_forward_hook(lambda module, _, output: visit(module, output)) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _ends_in_relu(module: nn.Module) -> bool:
    # So an output of 0 has no derivative.
    if isinstance(module, nn.Sequential):
        return isinstance(_leaves(module)[-1], nn.ReLU)
    return isinstance(module, nn.ReLU) or getattr(module, "ends_in_relu", False)


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


def shapes_of(model: nn.Module, inputs: Tensor) -> tuple[int, list[list[torch.Size]]]:
    """Return the number of outputs, and for each hidden block the shapes of its sites for one example.

    Args:
        model: made of blocks; it is not changed.
        inputs: a batch for it.
    """
    shapes, activation = [], inputs
    modes = [(module, module.training) for module in model.modules()]
    model.eval()  # BatchNorm's statistics stay as they are
    try:
        for block in Network(model).blocks:
            outputs, _ = block.run(None, activation, None, [None] * (len(block.layers) + 1))
            shapes.append([output.shape[1:] for output in outputs])
            activation = outputs[-1].detach()
    finally:
        for module, mode in modes:
            module.training = mode
    return shapes.pop()[-1].numel(), shapes
