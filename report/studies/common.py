"""What the studies of the report share: the command line, files that an interrupted study continues, and tuning.

A study is a module with a NamedTuple ``Settings``, two instances of it, ``FULL`` for the report and ``SHORT`` for
``make evidence``, and a function ``measure(settings, folder, parts)``; a study that is all of one piece has no parts.
The function measures what ``folder`` does not hold yet, and saves each result as soon as it has it. It raises a
ValueError if a file in ``folder`` was made with other settings.
"""
# No `from __future__ import annotations` here: tyro must see the annotations of the local function in main().

import json
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
import tyro
from torch import nn

from fwdlib import runtime
from fwdlib.atomic import check_writable, message_of
from fwdlib.data import Dataset, load_images
from fwdlib.results import write_json
from report.names import read

RESULTS = Path(__file__).parents[1] / "results"


def main(measure: Callable[..., object], full: NamedTuple, short: NamedTuple, parts: Iterable[str] = ()) -> None:
    """Run a study: ``python -m report.studies.NAME [parts ...] [--short] [--folder DIR]``.

    Args:
        measure: the study's function, called with settings, folder and, if it has parts, a tuple of these.
        full: settings for the report.
        short: settings for ``--short``.
        parts: names of all parts; none if the study is all of one piece.

    Raises:
        SystemExit: after printing help (code 0), with a message if a file cannot be read or written (code 1), or if the
            words make no command (code 2).
    """
    names = tuple(parts)
    words = tuple[Literal[*names], ...] if names else tuple[()]

    def command(
        parts: tyro.conf.Positional[words] = names,
        *,
        is_short: Annotated[bool, tyro.conf.arg(name="short"), tyro.conf.FlagCreatePairsOff] = False,
        folder: Path = RESULTS,
    ) -> None:
        """Measure.

        Args:
            parts: What to measure.
            is_short: Use fewer seeds, steps and cases.
            folder: Folder of the results. What it already holds is not measured again.
        """
        runtime.keep_freed_memory()
        try:
            check_writable(folder.expanduser() / "results.json")
            measure(short if is_short else full, folder.expanduser(), *([parts] if names else []))
        except (OSError, ValueError) as error:
            sys.exit(f"{prog}: {message_of(error)}")

    study = sys.modules[measure.__module__]
    prog = f"python -m {study.__spec__.name}"
    tyro.cli(command, prog=prog, description=study.__doc__)


def reopen(file: Path, settings: dict[str, Any], **begin: Any) -> dict[str, Any]:
    """Return what a study has kept in its file so far, with ``settings`` and the present ``environment``.

    Args:
        file: need not exist yet.
        settings: what the measurements in this file depend on.
        begin: what an empty file would hold besides.

    Raises:
        ValueError: if the file was made with other settings, or by somebody else.
    """
    settings = json.loads(json.dumps(settings))  # tuples become lists, as in the file
    found = read(file) or begin
    if found is not begin and not (isinstance(found, dict) and "settings" in found):
        raise ValueError(f"{file} is not a result of this study; move it away, or name another folder")
    kept = found.setdefault("settings", settings)
    if kept != settings:
        missing = "not there"
        before, now = ({name: of.get(name, missing) for name in kept | settings} for of in (kept, settings))
        name = next(name for name in before if before[name] != now[name])
        raise ValueError(
            f"{file} was made with other settings: {name} was {before[name]!r} and is {now[name]!r} now. Delete the "
            f"file to start anew."
        )
    return found | {"environment": runtime.environment()}


def once(found: dict[str, Any], file: Path, key: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the run of this key from ``found["runs"]``; if there is none, make it, add it, and save the file."""
    for done in found["runs"]:
        if key.items() <= done.items():
            return done
    found["runs"].append(key | make())
    write_json(file, found)
    return found["runs"][-1]


def climb(cost: Callable[[int], tuple[float, ...]], power: int) -> int:
    """Return the power of two at the bottom of ``cost``: walk from ``power`` in either direction while the cost falls.

    Args:
        cost: of a power. It is called again for powers that it has already seen, so it should remember its results.
        power: the first guess.

    Example:
        >>> climb(lambda power: (abs(power - 3),), 0)
        3
    """
    for direction in (1, -1):
        while cost(power + direction) < cost(power):
            power += direction
    return power


def held_out(data: Dataset, number: int) -> Dataset:
    """Return the data with the last examples of the training set as its test set."""
    train_inputs, test_inputs = data.train_inputs.tensor_split([-number])
    train_targets, test_targets = data.train_targets.tensor_split([-number])
    return data._replace(
        train_inputs=train_inputs, train_targets=train_targets, test_inputs=test_inputs, test_targets=test_targets
    )


@torch.no_grad()
def losses_of(model: nn.Module, data: Dataset, num_train: int) -> dict[str, float]:
    """Return the cross entropy ``train`` of the first ``num_train`` training examples, and ``test`` and ``accuracy``.

    A model whose training loss is not finite has nan for both losses.
    """
    logits, part = model(data.test_inputs), slice(num_train)
    train = float(F.cross_entropy(model(data.train_inputs[part]), data.train_targets[part]))
    test = float(F.cross_entropy(logits, data.test_targets))
    accuracy = float((logits.argmax(1) == data.test_targets).float().mean())
    train, test = (train, test) if math.isfinite(train) else (math.nan, math.nan)
    return {"train": train, "test": test, "accuracy": accuracy}


def flat_images(name: str, num_test: int) -> Dataset:
    """Return the data set ``name`` of images, each of them a vector."""
    data = load_images(name, num_test=num_test)
    return data._replace(train_inputs=data.train_inputs.flatten(1), test_inputs=data.test_inputs.flatten(1))
