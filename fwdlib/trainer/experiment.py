"""``python -m fwdlib train``: train an image classifier by any method, and write what came out.

It writes these files in the log folder, each whole or not at all:

- ``log.csv``: a row for each epoch;
- ``record.json``: the same rows, the settings, the source of the data, the machine and the versions;
- ``checkpoint.pt``: see :mod:`fwdlib.trainer.checkpoint`; ``["model"]`` has the weights;
- ``curves.png``, ``curves.svg``: drawn from the record at the end.

All but the checkpoint depend on the run alone, so an interrupted and resumed run ends with the same files.
"""

from __future__ import annotations

import csv
import io
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR

from fwdlib import runtime
from fwdlib.atomic import check_own, check_writable, write_bytes
from fwdlib.data import Dataset, fetch, load_images
from fwdlib.estimators import Estimator, backprop_gradient, forward_gradient
from fwdlib.history import History, Run
from fwdlib.locks import LOCK, held
from fwdlib.models import initialise, num_parameters
from fwdlib.results import write_json, write_text
from fwdlib.trainer.networks import MIXERS, LocalMixer, alexnet, fully_connected, shallow_cnn
from fwdlib.trainer.processes import ALONE, RESTARTS, Processes, num_restarts, num_started
from fwdlib.trainer.session import TrainerSession
from fwdlib.trainer.settings import SHARED_MODES, Settings, why_not_shared
from fwdlib.training import Augment, MakeOptimizer, make_optimizer, train

FORMAT = 1
BEGUN = ".begun-by"  # names the torchrun, or other parent, that has begun the run in this folder
ALEXNET_SIZE = 224
FUSED = ("Adam", "AdamW", "SGD", "Adagrad")  # have one kernel for the whole step, also on a CPU
COLUMNS = ("epoch", "train_loss", "test_loss", "test_accuracy", "seconds", "images_per_second", "learning_rate")
# Settings that a checkpoint depends on. The session notes batch size, seed, optimizer and learning rates by itself.
BELONGS = (
    *("dataset", "mixer", "norm", "train_mode", "num_tangents", "num_groups", "grid"),
    *("b_lr", "feedback_decay", "alpha", "alpha_decay", "weights"),
)
FILES = ("record.json", "log.csv", "curves.png", "curves.svg")
PASSING = ("log_dir", "resume", "dry_run", "log_interval", "processes")  # settings that do not change the result


def folder_of(settings: Settings) -> Path:
    """Return the log folder: ``log_dir``, or else ``train/<name of the run>`` in the folder for results."""
    return Path(settings.log_dir) if settings.log_dir else runtime.results_dir() / "train" / settings.name


def run(settings: Settings, *, progress: bool = True) -> dict[str, Any]:
    """Train, and write the files.

    Args:
        settings: what to train, and how.
        progress: whether to show a progress bar.

    Returns:
        The record, as in ``record.json``.

    Raises:
        InUseError: if another process writes to the folder.
        FileExistsError: if the folder has files of somebody else, where the run would write its own.
        ValueError: if the folder has a checkpoint and ``resume`` is not set; if the checkpoint is damaged or belongs to
            a different run; or if the training diverged: the files up to the last whole epoch are kept.
        FileNotFoundError: if the data set is not available. No other takes its place.
        DamagedFileError: if the data set's archive is not the published one.
        OSError: if a file cannot be written.
        AlreadyReportedError: if process 0 of several has raised one of these.
    """
    device = runtime.resolve_device(device_name(settings))
    with together(settings, device) as processes:
        return _run(settings, device, processes, progress)


def _run(settings: Settings, device: torch.device, processes: Processes, progress: bool) -> dict[str, Any]:
    folder = folder_of(settings)
    with ExitStack() as stack:
        resume = not settings.dry_run and processes.from_first(lambda: _claim(folder, settings, stack))
        record = _train_in(folder, settings, device, processes, progress, resume=resume)
    (folder / BEGUN).unlink(missing_ok=True)
    return record


def _claim(folder: Path, settings: Settings, stack: ExitStack) -> bool:
    # Hold the folder until the stack closes, and return whether to go on with the run in it. After torchrun has
    # restarted the processes, they go on with what this very start of torchrun has begun, and with nothing else.
    checkpoint, begun, launch = folder / "checkpoint.pt", folder / BEGUN, f"{socket.gethostname()} {os.getppid()}"
    check_writable(checkpoint)
    if not checkpoint.exists():  # else the checkpoint says whose files these are
        check_own(folder, FILES, "record.json", ("format", "settings", "network"))
    stack.callback(_remove_unused, folder, [path for path in (folder, *folder.parents) if not path.exists()])
    folder.mkdir(parents=True, exist_ok=True)
    stack.enter_context(held(folder, patience=10 if num_restarts() else 0))
    resume = settings.resume
    if num_restarts() and begun.is_file() and begun.read_text(encoding="utf-8") == launch:
        resume |= begun.stat().st_mtime > psutil.Process(os.getppid()).create_time() - 1
    if checkpoint.exists() and not resume:
        raise ValueError(
            f"{checkpoint} exists: it is there from an earlier run. To resume that run, add --resume; to start anew, "
            f"delete the file or name another --log-dir"
        )
    if RESTARTS in os.environ:
        write_text(begun, launch)
    return resume


def _remove_unused(folder: Path, made: list[Path]) -> None:
    # Leave no empty folder behind where nothing was trained.
    if {path.name for path in folder.iterdir()} <= {LOCK, BEGUN}:
        for name in (LOCK, BEGUN):
            (folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # somebody else has put something there
            for path in made:
                path.rmdir()


def _train_in(
    folder: Path, settings: Settings, device: torch.device, processes: Processes, progress: bool, *, resume: bool
) -> dict[str, Any]:
    checkpoint = None if settings.dry_run else folder / "checkpoint.pt"
    data = _load_together(settings, device, processes)
    steps = len(data.train_targets) // settings.batch_size
    if not steps:
        limit = f"the {len(data.train_targets)} training images"
        raise processes.reported_once(ValueError(f"batch_size must be at most {limit}, got {settings.batch_size}"))
    record = _record(settings, data, device, steps, processes.size)
    writes = processes.rank == 0 and not settings.dry_run
    if writes:
        for name in (*FILES, "checkpoint.pt"):
            for left in folder.glob(f".{name}.*.part"):  # of a run that was killed while it wrote
                left.unlink()
    belongs = {name: getattr(settings, name) for name in BELONGS}
    history = fit(
        settings,
        data,
        max_iterations=1 if settings.dry_run else steps * settings.epochs,
        evaluate_every=1 if settings.dry_run else steps,
        device=device,
        on_evaluation=partial(write_logs, folder, record) if writes else None,
        session=TrainerSession(checkpoint, resume=resume, settings=belongs, processes=processes),
        progress=f"{settings.train_mode} on {settings.dataset}" if progress else None,
        progress_every=settings.log_interval,
    )
    (end,) = history.runs
    if end.status == "diverged":
        raise processes.reported_once(_divergence(end, steps, settings.lr, folder))
    record = finished(record, end)
    if writes:
        draw(folder, record)
    return record


def _load_together(settings: Settings, device: torch.device, processes: Processes) -> Dataset:
    # Process 0 loads first, so that it alone downloads.
    loaded: list[Dataset] = []
    processes.from_first(lambda: loaded.append(load(settings, device)))
    return loaded[0] if loaded else load(settings, device)


def _record(
    settings: Settings, data: Dataset, device: torch.device, steps_per_epoch: int, num_processes: int
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "settings": {name: value for name, value in asdict(settings).items() if name not in PASSING},
        "network": settings.network,
        "num_params": num_parameters(network(settings, data)()),
        "num_train": len(data.train_targets),
        "num_test": len(data.test_targets),
        "num_processes": num_processes,
        "steps_per_epoch": steps_per_epoch,
        "source": data.source._asdict(),
        "environment": runtime.environment(device),
    }


def _divergence(end: Run, steps_per_epoch: int, learning_rate: float, folder: Path) -> ValueError:
    epoch, whole_epoch = -(-end.iterations // steps_per_epoch), (end.iterations - 1) // steps_per_epoch
    kept = f"; the checkpoint of epoch {whole_epoch} in {folder} is intact" if end.iterations else ""
    return ValueError(
        f"the training diverged: its loss was {end.train_loss[-1]} after {end.iterations} steps, in epoch {epoch}. Try "
        f"a lower --lr than {learning_rate:g}{kept}"
    )


def device_name(settings: Settings) -> str:
    """Return the device of this process. Several processes with ``cuda`` use one GPU each, by their local rank."""
    shares = settings.device == "cuda" and num_started() > 1
    return f"cuda:{os.environ['LOCAL_RANK']}" if shares else settings.device


@contextmanager
def together(settings: Settings, device: torch.device) -> Iterator[Processes]:
    """Join the processes that were started with this one, for the duration of a ``with`` block.

    Raises:
        ValueError: if there are others, and the train mode cannot share a batch.
    """
    if num_started() == 1:
        yield ALONE
        return
    from fwdlib.trainer import distributed  # takes a second to import

    with distributed.joined(device) as processes:
        if settings.train_mode not in SHARED_MODES:
            raise processes.reported_once(ValueError(why_not_shared(settings.train_mode)))
        yield processes


def fit(settings: Settings, data: Dataset, /, **options: Any) -> History:
    """Train as the settings say: their network, estimator, optimizer, schedule, batches and seed.

    Args:
        settings: how to train.
        data: what :func:`load` returns, or a part of it.
        options: other arguments of :func:`fwdlib.training.train`, such as ``max_iterations``.
    """
    build = network(settings, data)
    return train(
        build,
        data,
        estimator(settings, build, data, len(data.train_targets) // settings.batch_size),
        optimizer=optimizer(settings.optimizer, settings.lr, settings.weight_decay),
        scheduler=partial(StepLR, step_size=1, gamma=settings.gamma),
        batch_size=settings.batch_size,
        augment=crops() if settings.is_alexnet else None,
        test_batch_size=settings.test_batch_size,
        seeds=(settings.seed,),
        **options,
    )


# --- what is trained -------------------------------------------------------------------------------------------------


def load(settings: Settings, device: torch.device) -> Dataset:
    """Load the data set on a device and scale its pixels from 0..1 to -1..1. A dry run gets one batch of test images.

    Raises:
        FileNotFoundError: if the data set is not available; the message names it, the folders that were searched and
            the command that downloads it. Nothing takes its place.
        DamagedFileError: if an archive is not the published one.
    """
    if settings.dataset != "digits":
        fetch(settings.dataset)  # raises if there is none; load_images would return digits in its place
    data = load_images(settings.dataset, device=device)
    count = settings.test_batch_size if settings.dry_run else len(data.test_targets)
    return data._replace(
        train_inputs=data.train_inputs.sub_(0.5).div_(0.5),
        test_inputs=data.test_inputs[:count].sub_(0.5).div_(0.5),
        test_targets=data.test_targets[:count],
    )


def network(settings: Settings, data: Dataset) -> Callable[[], nn.Module]:
    """Return the function that makes the network for these images."""
    _, channels, size, _ = data.train_inputs.shape
    classes = len(data.class_names)
    norm = settings.norm
    if settings.mixer is not None:
        return partial(LocalMixer, settings.mixer, channels, size, classes)
    if settings.is_alexnet:
        return partial(enlarging_alexnet, classes, norm)
    if settings.conv:
        return partial(shallow_cnn, channels, size, classes, norm)
    return partial(fully_connected, channels * size * size, settings.n_layers, settings.width, classes, norm)


def enlarging_alexnet(num_classes: int, norm: str = "batch") -> nn.Sequential:
    """Return AlexNet behind a layer that enlarges images to 224 x 224. Crops of that size pass unchanged."""
    return nn.Sequential(nn.Upsample(size=(ALEXNET_SIZE, ALEXNET_SIZE), mode="bilinear"), *alexnet(num_classes, norm))


def crops() -> Augment:
    """Return a function that crops each image of a batch at random to 224 x 224, and flips it at random."""
    from torchvision.transforms import v2

    one = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomResizedCrop(ALEXNET_SIZE, antialias=True)])

    def augment(images: Tensor) -> Tensor:
        return torch.stack([one(image) for image in images])

    return augment


def estimator(settings: Settings, build: Callable[[], nn.Module], data: Dataset, steps_per_epoch: int) -> Estimator:
    """Return the estimator of a train mode.

    Args:
        settings: name the mode and its options.
        build: makes the network.
        data: its images give a feedback rule the shapes of the layers.
        steps_per_epoch: alpha decays per epoch in the settings, but per step in the estimator.
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
    from fwdlib.methods import activity, feedback, guided, local_losses

    inputs = data.train_inputs[:1]
    model = initialise(build, settings.seed).to(inputs.device)
    recorded = {"recorded": True}  # the networks of this module have no branches
    learns = {"optimizer": optimizer("Adam", settings.b_lr, settings.feedback_decay), **recorded}
    heads: dict[str, Any] = {"grid": settings.grid}
    if settings.mixer is not None:  # as in the paper
        heads = {"grid": MIXERS[settings.mixer].patches, "head": "mean"}
    match settings.train_mode:
        case "FG-A":
            return activity.ActivityForwardGradient(model, inputs, **recorded, **tangents, weights=settings.weights)
        case "DFA":
            return feedback.DirectFeedbackAlignment(model, inputs, **recorded)
        case "DKP":
            return feedback.DirectKolenPollack(model, inputs, **learns)
        case "FDFA":
            return feedback.ForwardDirectFeedbackAlignment(model, inputs, **learns, **tangents)
        case "L-BP":
            return local_losses.LocalBackprop(model, inputs, **learns, **heads)
        case "LG-BP":
            return local_losses.LocalGreedyBackprop(model, inputs, **learns, **heads)
        case "LG-FG-A":
            groups = settings.num_groups if settings.mixer is None else MIXERS[settings.mixer].groups
            return local_losses.LocalForwardGradient(model, inputs, **learns, **tangents, **heads, num_groups=groups)
        case "FG-GUIDED":
            return guided.GuidedForwardGradient(model, inputs, **learns, **heads)
    decay = {"alpha": settings.alpha, "alpha_decay": settings.alpha_decay ** (1 / steps_per_epoch)}
    weights = {"weights": settings.weights}
    return activity.ControlVariateForwardGradient(model, inputs, **learns, **tangents, **decay, **weights)


def optimizer(name: str, learning_rate: float, weight_decay: float) -> MakeOptimizer:
    """Return the function that makes an optimizer, fused if torch has a fused form."""
    fused = {"fused": True} if name in FUSED else {}
    return make_optimizer(name, learning_rate, weight_decay=weight_decay, **fused)


# --- files -----------------------------------------------------------------------------------------------------------


def rows(run: Run, record: dict[str, Any]) -> list[dict[str, float]]:
    """Return a row for each complete epoch of a run.

    Returns:
        Dicts with the keys ``COLUMNS``. Losses are means; the training loss is the mean over the epoch's batches. The
        accuracy is the fraction of the test images that are classified correctly. Seconds count the steps alone.
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
    """Return the record with the state of the run: ``status``, ``iterations`` and ``epochs``, the rows."""
    return record | {"status": run.status or "running", "iterations": run.iterations, "epochs": rows(run, record)}


def write_logs(folder: Path, record: dict[str, Any], run: Run) -> None:
    """Replace ``record.json`` and ``log.csv``, in this order: the record says whose files these are.

    Raises:
        OSError: if that fails; the old files are intact.
    """
    content = finished(record, run)
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows({name: f"{value:.6g}" for name, value in row.items()} for row in content["epochs"])
    write_json(folder / "record.json", content, exact=("settings",))
    write_text(folder / "log.csv", text.getvalue())


def draw(folder: Path, record: dict[str, Any]) -> None:
    """Draw the curves of a record, as PNG and as SVG.

    Raises:
        OSError: if a file cannot be written.
    """
    import matplotlib.style

    from fwdlib.plotting import STYLE
    from fwdlib.trainer import figures

    figure = figures.plot_epochs(record)
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
        buffer = io.BytesIO()
        with matplotlib.style.context(STYLE):  # savefig reads the hash salt and the fonts
            figure.savefig(buffer, format=kind, metadata=metadata)
        write_bytes(folder / f"curves.{kind}", buffer.getvalue())
