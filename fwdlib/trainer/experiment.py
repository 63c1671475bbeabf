"""One training of an image classifier by any method: what ``python -m fwdlib train`` does, and what it leaves behind.

Files in the log folder, all written whole or not at all, all but the checkpoint a function of the run alone, so that a
run which was cut off and goes on ends with the same ones:

- ``log.csv``: a row for each epoch;
- ``record.json``: the same rows, settings, source of the data, machine and versions;
- ``checkpoint.pt``: see :mod:`fwdlib.trainer.checkpoint`; ``["model"]`` has the weights;
- ``curves.png``, ``curves.svg``: drawn from the record at the end.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR

from fwdlib import runtime
from fwdlib.atomic import write_bytes
from fwdlib.data import Dataset, fetch, load_images
from fwdlib.estimators import Estimator, backprop_gradient, forward_gradient
from fwdlib.history import History, Run
from fwdlib.models import alexnet, fully_connected, initialise, num_parameters, shallow_cnn
from fwdlib.results import write_json, write_text
from fwdlib.trainer.processes import ALONE, Workers, num_restarts, num_started
from fwdlib.trainer.session import TrainerSession
from fwdlib.trainer.settings import SHARED_MODES, Settings, why_not_shared
from fwdlib.training import Augment, MakeOptimizer, make_optimizer, train

FORMAT = 1
ALEXNET_SIZE = 224
FUSED = ("Adam", "AdamW", "SGD", "Adagrad")  # have one kernel for the whole step, on a CPU, too
COLUMNS = ("epoch", "train_loss", "test_loss", "test_accuracy", "seconds", "images_per_second", "learning_rate")
# What of the settings a checkpoint depends on; batch, seed, optimizer and learning rates train() notes by itself.
BELONGS = ("dataset", "train_mode", "num_tangents", "b_lr", "feedback_decay", "alpha", "alpha_decay")

PASSING = ("log_dir", "resume", "dry_run", "log_interval", "processes")  # make no difference to what comes out


def folder_of(settings: Settings) -> Path:
    """Return the log folder: the one that was asked for, or ``train/<name of the run>`` in the folder for results."""
    return Path(settings.log_dir) if settings.log_dir else runtime.results_dir() / "train" / settings.name


def run(settings: Settings, *, progress: bool = True) -> dict[str, Any]:
    """Train, and write the files.

    Args:
        settings: all there is to say.
        progress: whether to show a progress bar.

    Returns:
        The record, as it is in ``record.json``.

    Raises:
        ValueError: if the folder has a checkpoint and ``resume`` is not set; if that is damaged or one of something
            else; or if the training diverged: its files up to the last whole epoch are there.
        FileNotFoundError: if the data set cannot be had; no other takes its place.
        DamagedFileError: if its archive is not the published one.
        OSError: if a file cannot be written.
        ToldElsewhereError: if several processes train together, and the first of them has raised one of these.
    """
    device = runtime.resolve_device(device_name(settings))
    with together(settings, device) as workers:
        return _run(settings, device, workers, progress)


def _run(settings: Settings, device: torch.device, workers: Workers, progress: bool) -> dict[str, Any]:
    folder, is_first = folder_of(settings), workers.rank == 0
    checkpoint = folder / "checkpoint.pt"
    resume = settings.resume or num_restarts() > 0
    loaded: list[Dataset] = []

    def prepare() -> None:
        if checkpoint.exists() and not (resume or settings.dry_run):
            raise ValueError(
                f"{checkpoint} is there from an earlier run. To go on from it, add --resume; to begin anew, delete it "
                f"or name another --log-dir"
            )
        loaded.append(load(settings, device))

    workers.from_first(prepare)  # if it has to be downloaded, then once
    data = loaded[0] if loaded else load(settings, device)
    steps = len(data.train_targets) // settings.batch_size
    if not steps:
        raise workers.told(
            ValueError(
                f"batch_size must be at most the {len(data.train_targets)} training images, got {settings.batch_size}"
            )
        )
    record = {
        "format": FORMAT,
        "settings": {name: value for name, value in asdict(settings).items() if name not in PASSING},
        "network": settings.network,
        "num_params": num_parameters(network(settings, data)()),
        "num_train": len(data.train_targets),
        "num_test": len(data.test_targets),
        "num_processes": workers.size,
        "steps_per_epoch": steps,
        "source": data.source._asdict(),
        "environment": runtime.environment(device),
    }
    writes = is_first and not settings.dry_run
    if writes:
        for left in folder.glob(".*.part"):  # of a run that was killed while it wrote
            left.unlink()
    history = fit(
        settings,
        data,
        max_iterations=1 if settings.dry_run else steps * settings.epochs,
        evaluate_every=1 if settings.dry_run else steps,
        device=device,
        on_evaluation=partial(write_logs, folder, record) if writes else None,
        session=TrainerSession(
            None if settings.dry_run else checkpoint,
            resume=resume and not settings.dry_run,
            settings={name: getattr(settings, name) for name in BELONGS},
            workers=workers,
        ),
        progress=f"{settings.train_mode} on {settings.dataset}" if progress else None,
        progress_every=settings.log_interval,
    )
    (end,) = history.runs
    if end.status == "diverged":
        kept = (
            f"; the checkpoint of epoch {(end.iterations - 1) // steps} in {folder} is intact" if end.iterations else ""
        )
        raise workers.told(
            ValueError(
                f"the training diverged: its loss was {end.train_loss[-1]} after {end.iterations} steps, in epoch "
                f"{-(-end.iterations // steps)}. Try a lower --lr than {settings.lr:g}{kept}"
            )
        )
    record = finished(record, end)
    if writes:
        draw(folder, record)
    return record


def device_name(settings: Settings) -> str:
    """Return the device of this process: of several GPUs that with its number on this machine."""
    shares = settings.device == "cuda" and num_started() > 1
    return f"cuda:{os.environ['LOCAL_RANK']}" if shares else settings.device


@contextmanager
def together(settings: Settings, device: torch.device) -> Iterator[Workers]:
    """Join the processes that were started with this one, for the time of a ``with`` block.

    Raises:
        ValueError: if there are others, and the train mode has no use for them.
    """
    if num_started() == 1:
        yield ALONE
        return
    from fwdlib.trainer import distributed  # takes a second to import

    with distributed.processes(device) as workers:
        if settings.train_mode not in SHARED_MODES:
            raise workers.told(ValueError(why_not_shared(settings.train_mode)))
        yield workers


def fit(settings: Settings, data: Dataset, /, **options: Any) -> History:
    """Train as the settings say: their network, estimator, optimizer, schedule, batches and seed.

    Args:
        settings: how.
        data: on what, as :func:`load` gives it, or a part of it.
        options: the rest of what :func:`fwdlib.training.train` takes, ``max_iterations`` for one.
    """
    build = network(settings, data)
    return train(
        build,
        data,
        estimator(settings, build, data, len(data.train_targets) // settings.batch_size),
        optimizer=optimizer(settings.optimizer, settings.lr, settings.weight_decay),
        scheduler=partial(StepLR, step_size=1, gamma=settings.gamma),
        batch_size=settings.batch_size,
        augment=crops() if settings.network == "alexnet" else None,
        test_batch_size=settings.test_batch_size,
        seeds=(settings.seed,),
        **options,
    )


# --- what is trained -------------------------------------------------------------------------------------------------


def load(settings: Settings, device: torch.device) -> Dataset:
    """Load the data set on a device, its pixels scaled from 0..1 to -1..1; of the test set one batch for a dry run.

    Raises:
        FileNotFoundError: if it cannot be had; the message names it, the folders looked in and the command that gets
            it. Asked for by name, it has no substitute.
        DamagedFileError: if an archive is not the published one.
    """
    if settings.dataset != "digits":
        fetch(settings.dataset)  # says so where there is none; load_images would take digits in its place
    data = load_images(settings.dataset, device=device)
    count = settings.test_batch_size if settings.dry_run else len(data.test_targets)
    return data._replace(
        train_inputs=data.train_inputs.sub_(0.5).div_(0.5),
        test_inputs=data.test_inputs[:count].sub_(0.5).div_(0.5),
        test_targets=data.test_targets[:count],
    )


def network(settings: Settings, data: Dataset) -> Callable[[], nn.Sequential]:
    """Return what makes the network for these images."""
    _, channels, size, _ = data.train_inputs.shape
    classes = len(data.class_names)
    if settings.network == "alexnet":
        return partial(enlarging_alexnet, classes)
    if settings.network == "cnn":
        return partial(shallow_cnn, channels, size, classes)
    return partial(fully_connected, channels * size * size, settings.n_layers, settings.width, classes)


def enlarging_alexnet(num_classes: int) -> nn.Sequential:
    """Return AlexNet behind what enlarges images to its 224 x 224; crops that are as large pass as they are."""
    return nn.Sequential(nn.Upsample(size=(ALEXNET_SIZE, ALEXNET_SIZE), mode="bilinear"), *alexnet(num_classes))


def crops() -> Augment:
    """Return what turns a batch of images into random crops of 224 x 224, flipped or not, each image by itself."""
    from torchvision.transforms import v2

    one = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomResizedCrop(ALEXNET_SIZE, antialias=True)])

    def augment(images: Tensor) -> Tensor:
        return torch.stack([one(image) for image in images])

    return augment


def estimator(settings: Settings, build: Callable[[], nn.Module], data: Dataset, steps_per_epoch: int) -> Estimator:
    """Return the estimator of a train mode.

    Args:
        settings: which, and its options.
        build: makes the network.
        data: whose images tell a feedback rule the shapes of the layers.
        steps_per_epoch: alpha decays by the epoch in the settings, by the step in the estimator.
    """
    tangents = {"num_tangents": settings.num_tangents}
    match settings.train_mode:
        case "BP":
            if num_started() == 1:
                return backprop_gradient
            from fwdlib.trainer.distributed import DataParallelGradient

            return DataParallelGradient()
        case "FG":
            return partial(forward_gradient, tangents="normal", **tangents)
        case "FG-RANK1":
            return partial(forward_gradient, tangents="rank-one", **tangents)
        case "FG-A":
            return partial(forward_gradient, tangents="activity", **tangents)
    from fwdlib.methods import feedback

    inputs = data.train_inputs[:1]
    model = initialise(build, settings.seed).to(inputs.device)
    recorded = {"recorded": True}  # the networks of this module have no branches
    learns = {"optimizer": optimizer("Adam", settings.b_lr, settings.feedback_decay), **recorded}
    match settings.train_mode:
        case "DFA":
            return feedback.DirectFeedbackAlignment(model, inputs, **recorded)
        case "DKP":
            return feedback.DirectKolenPollack(model, inputs, **learns)
        case "FDFA":
            return feedback.ForwardDirectFeedbackAlignment(model, inputs, **learns, **tangents)
    decay = {"alpha": settings.alpha, "alpha_decay": settings.alpha_decay ** (1 / steps_per_epoch)}
    return feedback.ControlVariateForwardGradient(model, inputs, **learns, **tangents, **decay)


def optimizer(name: str, learning_rate: float, weight_decay: float) -> MakeOptimizer:
    """Return what makes an optimizer, in its fused form where it has one."""
    fused = {"fused": True} if name in FUSED else {}
    return make_optimizer(name, learning_rate, weight_decay=weight_decay, **fused)


# --- what it leaves --------------------------------------------------------------------------------------------------


def rows(run: Run, record: dict[str, Any]) -> list[dict[str, float]]:
    """Return a row for each whole epoch of a run; what diverged in the middle of one has none.

    Args:
        run: so far.
        record: of the run, without its epochs.

    Returns:
        Dicts with the keys ``COLUMNS``. Losses are means, that of training over the batches since the epoch before; the
        accuracy is the part of the test images that are classified right; seconds are those of the steps alone.
    """
    settings, every = record["settings"], run.every
    found = []
    for epoch in range(1, len(run.test_loss) - (run.status == "diverged")):
        seconds = sum(run.step_seconds[(epoch - 1) * every : epoch * every])
        values = (
            epoch,
            run.train_loss[epoch],
            run.test_loss[epoch],
            1 - run.test_errors[epoch] / record["num_test"],
            seconds,
            every * settings["batch_size"] / seconds,
            settings["lr"] * settings["gamma"] ** (epoch - 1),
        )
        found.append(dict(zip(COLUMNS, values, strict=True)))
    return found


def finished(record: dict[str, Any], run: Run) -> dict[str, Any]:
    """Return the record with what a run has come to: ``status``, ``iterations``, ``epochs`` (the rows)."""
    return record | {"status": run.status or "running", "iterations": run.iterations, "epochs": rows(run, record)}


def write_logs(folder: Path, record: dict[str, Any], run: Run) -> None:
    """Write ``log.csv`` and ``record.json`` anew.

    Raises:
        OSError: if that fails; what was there before is still there.
    """
    content = finished(record, run)
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows({name: f"{value:.6g}" for name, value in row.items()} for row in content["epochs"])
    write_text(folder / "log.csv", text.getvalue())
    write_json(folder / "record.json", content)


def draw(folder: Path, record: dict[str, Any]) -> None:
    """Draw the curves of a record, as PNG and as SVG.

    Raises:
        OSError: if that fails.
    """
    import matplotlib.style

    from fwdlib.methods import figures
    from fwdlib.plotting import STYLE

    figure = figures.plot_epochs(record)
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
        buffer = io.BytesIO()
        with matplotlib.style.context(STYLE):  # its hash salt and its fonts count when the file is written
            figure.savefig(buffer, format=kind, metadata=metadata)
        write_bytes(folder / f"curves.{kind}", buffer.getvalue())
