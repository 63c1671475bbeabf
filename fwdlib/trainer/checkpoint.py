"""Checkpoints: all that changes while a model trains, in one file, so that a run can go on where it was cut off.

The file is a dict that ``torch.load(path, weights_only=True)`` reads; under ``"model"`` is what
``model.load_state_dict`` takes.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fwdlib.atomic import write_bytes
from fwdlib.trainer.processes import ALONE, Workers

FORMAT = 1
NAMED = 4  # so many differences are named; a net of another depth has a hundred


class Part(Protocol):
    """Something that changes during training: a model, an optimizer, a scheduler, ..."""

    def state_dict(self) -> dict[str, Any]:
        """Return all that it takes to go on."""

    def load_state_dict(self, state: dict[str, Any]) -> object:
        """Go on from there."""


class Checkpoint:
    """The file of one run.

    Args:
        path: of the file.
        about: what the run is, name -> value in words; a file that says otherwise is not loaded.
        parts: what is saved and loaded, by name.
        workers: the processes that the run has; the first writes and reads the file for all of them.
    """

    def __init__(
        self, path: Path, about: Mapping[str, str], parts: Mapping[str, Part], workers: Workers = ALONE
    ) -> None:
        self.path = path
        self.about = dict(about)
        self.parts = parts
        self.workers = workers

    def exists(self) -> bool:
        """Tell whether there is a file to go on from."""
        return self.workers.from_first(self.path.exists)

    def pack(self, progress: dict[str, Any]) -> memoryview:
        """Return the content of the file as it would be now; :meth:`write` writes it, or you forget it.

        Args:
            progress: numbers, words, lists and dicts that :meth:`load` gives back.
        """
        states = {name: part.state_dict() for name, part in self.parts.items()}
        buffer = io.BytesIO()  # torch.save into a file that cannot grow says nothing of the disk, or aborts
        torch.save({"format": FORMAT, "about": self.about, "progress": progress, **states}, buffer)
        return buffer.getbuffer()

    def write(self, packed: memoryview) -> None:
        """Put the new content in the place of the old.

        Raises:
            OSError: if that fails. The old file is still there, and there is no part of a new one.
        """
        if self.workers.rank == 0:
            write_bytes(self.path, packed, "the checkpoint before this one, if there was one, is as it was")

    def load(self) -> dict[str, Any]:
        """Bring all parts into the state of the file, and return its progress.

        Raises:
            ValueError: if the file is damaged, is no checkpoint, or is one of something else. No part has changed then.
            ToldElsewhereError: the same, in all processes but the first.
        """
        content = self.workers.from_first(partial(_read, self.path))
        there = content["about"]
        names = [name for name in {**there, **self.about} if there.get(name) != self.about.get(name)]
        if names:
            shown = differences(
                [
                    f"{name} is {there.get(name, 'nothing')} there, {self.about.get(name, 'nothing')} here"
                    for name in names
                ]
            )
            error = ValueError(
                f"{self.path} is the checkpoint of something else: {shown}. To go on from it, give "
                f"the settings that it was made with; to start anew, another place for the checkpoint"
            )
            raise self.workers.told(error)
        for name, part in self.parts.items():
            part.load_state_dict(content[name])
        return content["progress"]


def differences(lines: list[str]) -> str:
    """Return the first few of the lines that each tell a difference, and how many more there are."""
    more = f"; and {len(lines) - NAMED} more differ" if len(lines) > NAMED else ""
    return "; ".join(lines[:NAMED]) + more


def _read(path: Path) -> dict[str, Any]:
    mend = "delete it to start anew, or name another place for the checkpoint"
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()  # torch.load would take a flipped bit for a weight
        if broken:
            raise zipfile.BadZipFile(f"the checksum of {broken} is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # a damaged file can lead to anything
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(f"{path} is damaged, or no checkpoint ({reason}): {mend}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of format {FORMAT}: {mend}")
    return content


class Randomness:
    """The random numbers of a run: those of its own generators, and torch's global ones, for Dropout and crops.

    Args:
        generators: the run's own, by name.
        device: whose global generator counts, beside the CPU's.
    """

    def __init__(self, generators: Mapping[str, torch.Generator], device: torch.device) -> None:
        self._generators = generators
        self._device = device

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all of them."""
        states = {name: generator.get_state() for name, generator in self._generators.items()}
        on_device = [torch.cuda.get_rng_state(self._device)] if self._device.type == "cuda" else []
        return {"own": states, "global": [torch.get_rng_state(), *on_device]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put all of them into these states."""
        for name, generator in self._generators.items():
            generator.set_state(state["own"][name])
        of_cpu, *on_device = state["global"]
        torch.set_rng_state(of_cpu)
        for of_device in on_device:
            torch.cuda.set_rng_state(of_device, self._device)


def describe(
    model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler | None, estimator: Callable
) -> dict[str, str]:
    """Say what a run is made of, so that a checkpoint can be told from that of another.

    Args:
        model: its shapes count.
        optimizer: before its first step: its kind and its settings, the learning rate among them.
        scheduler: likewise.
        estimator: its name.

    Returns:
        Name -> value in words.
    """
    rule = estimator.func if isinstance(estimator, partial) else estimator
    about = {f"the shape of {name}": str(tuple(value.shape)) for name, value in model.state_dict().items()}
    about["the estimator"] = getattr(rule, "__name__", type(rule).__name__)
    about |= _options("optimizer", optimizer, optimizer.param_groups[0])
    return about | (_options("scheduler", scheduler, scheduler.state_dict()) if scheduler else {})


def _options(kind: str, thing: object, values: Mapping[str, object]) -> dict[str, str]:
    left_out = ("params", "initial_lr")  # the latter is a scheduler's note
    options = {key: value for key, value in values.items() if key not in left_out and not key.startswith("_")}
    return {f"the {kind}": type(thing).__name__} | {f"the {kind}'s {key}": repr(v) for key, v in options.items()}
