"""Names that studies save their results under, and by which the sections find them; see ``report/results/``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

SHORT_FORM = "short-form.txt"  # marks a folder whose studies were made with their short settings
BENCH = "bench-cpu.json"  # written by `python -m fwdlib bench`
BENCH_ONE_THREAD = "bench-cpu-1-thread.json"  # likewise, with --threads 1
DESCENT = "descent.json"
SCALING = "scaling.json"
FEEDBACK = "feedback"  # a folder: a file for each task and mode, and one with the times of a step
PROTOCOLS = "protocols"  # a folder: a file for each model, and one with the times of a step
STEPS = "steps.json"


def read(path: Path) -> Any:
    """Return the content of a JSON file, None if it is not there.

    Raises:
        ValueError: if it is not JSON; the message names the file.
    """
    try:
        return json.loads(path.read_text("utf-8")) if path.is_file() else None
    except ValueError as error:
        advice = "Restore it, or delete it to measure again"
        raise ValueError(f"{path} is damaged: it is not JSON ({error}). {advice}") from error


# --- feedback: the modes of a task -----------------------------------------------------------------------------------

LEARNS = {  # mode -> whether its feedback or its heads learn, and so have a learning rate of their own
    "BP": False,
    "FDFA": True,
    "DKP": True,
    "DFA": False,
    "L-BP": True,
    "LG-BP": True,
    "LG-FG-A": True,
    "FG-GUIDED": True,
    "FG-CV": True,
    "FG-A": False,
    "FG": False,
    "FG-RANK1": False,
    "FG-A, whole batch": False,
    "FG-CV, alpha 0.1": True,
    "FG-CV, alpha to 0": True,
    "BP, LayerNorm": False,
    "FG-A, LayerNorm": False,
    "FG-CV, LayerNorm": True,
    "LG-FG-A, 16 groups": True,
}
MODES = tuple(LEARNS)
MAIN_MODES = MODES[:12]
LOCAL_MODES = ("BP", "FDFA", "L-BP", "LG-BP", "LG-FG-A")  # those whose accuracies are near backprop's
MIXER_MODES = ("BP", "L-BP", "LG-BP", "LG-FG-A", "FG-A")  # of Ren et al.'s table


class Task(NamedTuple):
    """What the modes train."""

    dataset: str
    network: str
    modes: tuple[str, ...]


TASKS = {
    f"{task.dataset}-{task.network}": task
    for task in (
        Task("MNIST", "2x800", MODES),
        Task("KMNIST", "2x800", LOCAL_MODES),
        Task("FashionMNIST", "2x800", LOCAL_MODES),
        Task("CIFAR10-jpeg", "2x1000", LOCAL_MODES),
        Task("MNIST", "cnn", MAIN_MODES),
        Task("KMNIST", "cnn", LOCAL_MODES),
        Task("FashionMNIST", "cnn", LOCAL_MODES),
        Task("CIFAR10-jpeg", "cnn", LOCAL_MODES),
        Task("MNIST", "S-1-1", MIXER_MODES),
        Task("MNIST", "M-1-16", MIXER_MODES),
        Task("CIFAR10-jpeg", "M-1-16", MIXER_MODES),
    )
}
DEPTHS = {f"MNIST-depth-{n}": n for n in (1, 2, 5, 10)}  # task -> hidden layers of 800 units, trained for less long
DEPTH_MODES = ("BP", "DFA", "FDFA", "LG-BP", "LG-FG-A")
LEARNED = 0.5  # a training loss on MNIST, in nats: trainings are compared by when they reach it
PLAIN = "loss.backward()"  # a step of backprop as everyone writes it
RECORDED = "BP, recorded"


def feedback_file(task: str, mode: str) -> str:
    """Return the name of the file of a mode.

    Example:
        >>> feedback_file("MNIST-2x800", "FG-CV, alpha to 0")
        'MNIST-2x800-FG-CV-alpha-to-0.json'
    """
    return f"{task}-{mode.replace(', ', '-').replace(' ', '-')}.json"


# --- protocols: the three models, and the methods of the fair protocol -----------------------------------------------

MODELS = ("logistic", "mlp", "cnn")
METHODS = ("backprop", "forward gradient", "rank-one", "rank-one, K = 16")
AS_PUBLISHED = "as the text says"  # the form of a method without any departure

# --- Frank-Wolfe, test functions, several tangents, backprop from scratch, processes ---------------------------------

FRANK_WOLFE = "frank_wolfe.json"
FUNCTIONS = "functions.json"
TANGENTS = "tangents.json"
SCRATCH = "scratch.json"
SENSITIVITY = "sensitivity.json"
BUDGET = "budget.json"
TRAFFIC = "traffic.json"

WRITTEN_OUT = "Rosenbrock, written out"  # among the test functions whose steps are timed
STYBLINSKI_TANG = -39.16616570377142  # the minimum of Styblinski and Tang's function, for each of the n numbers


class Cell(NamedTuple):
    """The two differences between the published framework and PyTorch, each on or off."""

    divided: bool
    """Whether each linear layer divides its gradients by the batch size, although the loss sums."""
    xavier: bool
    """Whether weights start normal with gain sqrt 2 and there are no biases at the start, not by PyTorch's default."""


CELLS = {
    "as PyTorch": Cell(divided=False, xavier=False),
    "Xavier": Cell(divided=False, xavier=True),
    "divided": Cell(divided=True, xavier=False),
    "divided, Xavier": Cell(divided=True, xavier=True),
}
COMPARED = {"tinynet": "divided, Xavier", "PyTorch": "as PyTorch"}  # framework -> its cell in the published comparison
