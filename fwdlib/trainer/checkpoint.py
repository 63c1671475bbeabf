"""Checkpoints: everything that changes while a model trains, in one file, so that an interrupted run can be resumed.

The file is a dict that ``torch.load(path, weights_only=True)`` reads. ``model.load_state_dict`` takes its entry
``"model"``.
"""

from __future__ import annotations

import io
import pickle
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
from fwdlib.trainer.processes import ALONE, Processes

FORMAT = 1
ADVICE = "delete it to start anew, or name another place for the checkpoint"
NAMED = 4  # differences that a message names; networks of different depth have a hundred


class Part(Protocol):
    """Something that changes during training: a model, an optimizer, a scheduler, ..."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    def load_state_dict(self, state: dict[str, Any]) -> object:
        """Restore the state."""


class Checkpoint:
    """The file of one run.

    Args:
        path: the file.
        about: what the run depends on, name -> value in words; a file with other values is not loaded.
        parts: what is saved and loaded, by name.
        processes: the processes of the run. Process 0 reads and writes the file for all of them.
    """

    def __init__(
        self, path: Path, about: Mapping[str, str], parts: Mapping[str, Part], processes: Processes = ALONE
    ) -> None:
        self.path = path
        self.about = dict(about)
        self.parts = parts
        self.processes = processes

    def exists(self) -> bool:
        """Tell whether the file exists."""
        return self.processes.from_first(self.path.exists)

    def pack(self, progress: dict[str, Any]) -> memoryview:
        """Return the content of the file for the present state. :meth:`write` writes it.

        Args:
            progress: numbers, strings, lists and dicts, which :meth:`load` returns.
        """
        states = {name: part.state_dict() for name, part in self.parts.items()}
        buffer = io.BytesIO()  # on a full disk, torch.save into a file aborts, or its error does not name the disk
        torch.save({"format": FORMAT, "about": self.about, "progress": progress, **states}, buffer)
        return buffer.getbuffer()

    def write(self, packed: memoryview) -> None:
        """Replace the file.

        Raises:
            OSError: if that fails. The old file is intact, and no part of a new one is left.
        """
        if self.processes.rank == 0:
            write_bytes(self.path, packed, "the previous checkpoint, if any, is intact")

    def load(self) -> dict[str, Any]:
        """Restore all parts from the file, and return its progress.

        Raises:
            ValueError: in process 0, if the file is damaged, is not a checkpoint, or belongs to a different run.
            AlreadyReportedError: in the others.
        """
        content = self.processes.from_first(partial(_read, self.path))
        there, here = content["about"], self.about
        lines = [
            f"{name} is {there.get(name, 'nothing')} there, {here.get(name, 'nothing')} here"
            for name in {**there, **here}
            if there.get(name) != here.get(name)
        ]
        if lines:
            error = ValueError(
                f"{self.path} belongs to a different run: {differences(lines)}. To resume that run, give its settings; "
                f"to start anew, name another place for the checkpoint"
            )
            raise self.processes.reported_once(error)
        for name, part in self.parts.items():
            try:
                part.load_state_dict(content[name])
            except Exception as error:  # a damaged state can raise anything
                raise self.damaged(f"its state of the {name} does not fit, {error!r}") from error
        return content["progress"]

    def damaged(self, reason: str) -> Exception:
        """Return the error to raise in every process if the file cannot be used."""
        return self.processes.reported_once(_damaged(self.path, reason))


def differences(lines: list[str]) -> str:
    """Return the first few of the lines, each of which names a difference, and how many more there are."""
    more = f"; and {len(lines) - NAMED} more differ" if len(lines) > NAMED else ""
    return "; ".join(lines[:NAMED]) + more


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} is damaged, or not a checkpoint ({reason}): {ADVICE}")


def _read(path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()  # torch.load does not check: a flipped bit would change a weight
        if broken:
            raise zipfile.BadZipFile(f"the checksum of {broken} is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError):
        raise
    except pickle.UnpicklingError as error:  # its text advises to load the file all the same
        reason = "it holds other things than numbers, texts and tensors; they could run a program and are not loaded"
        raise _damaged(path, reason) from error
    except Exception as error:  # a damaged file can raise anything
        raise _damaged(path, next(iter(str(error).splitlines()), "") or type(error).__name__) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of format {FORMAT}: {ADVICE}")
    if lacking := sorted({"about", "progress"} - content.keys()):
        raise _damaged(path, f"it lacks {', '.join(lacking)}")
    return content


class Randomness:
    """The states of a run's own generators and of torch's global ones, which Dropout and crops use.

    Args:
        generators: the run's own, by name.
        device: its global generator is kept, and the CPU's.
    """

    def __init__(self, generators: Mapping[str, torch.Generator], device: torch.device) -> None:
        self._generators = generators
        self._device = device

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all generators."""
        states = {name: generator.get_state() for name, generator in self._generators.items()}
        on_device = [torch.cuda.get_rng_state(self._device)] if self._device.type == "cuda" else []
        return {"own": states, "global": [torch.get_rng_state(), *on_device]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the states of all generators."""
        for name, generator in self._generators.items():
            generator.set_state(state["own"][name])
        of_cpu, *on_device = state["global"]
        torch.set_rng_state(of_cpu)
        for of_device in on_device:
            torch.cuda.set_rng_state(of_device, self._device)


def describe(
    model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler | None, estimator: Callable
) -> dict[str, str]:
    """Describe what a run is made of, so that a checkpoint can be matched with its run.

    Args:
        model: described by the shapes of its tensors.
        optimizer: before its first step; described by its class and its settings, such as the learning rate.
        scheduler: before its first step; described by its class and its settings.
        estimator: described by its name.

    Returns:
        Name -> value in words.
    """
    rule = estimator.func if isinstance(estimator, partial) else estimator
    about = {f"the shape of {name}": str(tuple(value.shape)) for name, value in model.state_dict().items()}
    about["the estimator"] = getattr(rule, "__name__", type(rule).__name__)
    about |= _options("optimizer", optimizer, optimizer.param_groups[0])
    return about | (_options("scheduler", scheduler, scheduler.state_dict()) if scheduler else {})


def _options(kind: str, thing: object, values: Mapping[str, object]) -> dict[str, str]:
    left_out = ("params", "initial_lr")  # a scheduler adds the latter
    options = {key: value for key, value in values.items() if key not in left_out and not key.startswith("_")}
    return {f"the {kind}": type(thing).__name__} | {f"the {kind}'s {key}": repr(v) for key, v in options.items()}
