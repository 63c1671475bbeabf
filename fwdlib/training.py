"""The only training loop of the project: any estimator, any torch optimizer, one seed or several, any batch."""

from __future__ import annotations

import inspect
import math
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Number
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from tqdm.auto import tqdm

from fwdlib import runtime
from fwdlib.checks import check_choice, check_count, check_positive, check_seed
from fwdlib.data import Dataset
from fwdlib.estimators import Estimator, GradientEstimate
from fwdlib.history import History, Run
from fwdlib.models import initialise
from fwdlib.objectives import BatchLoss, params_of
from fwdlib.seeds import keep_rows, replicated_estimate, single_estimate
from fwdlib.session import Progress, Running, Session
from fwdlib.steps import has_hooks, take_step
from fwdlib.tangents import Params

MakeOptimizer = Callable[[list[Tensor]], Optimizer]
MakeScheduler = Callable[[Optimizer], LRScheduler]
Augment = Callable[[Tensor], Tensor]

# Optimizers that update each element by itself, so a leading axis of replicates changes nothing.
ELEMENTWISE = ("SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "Adagrad", "Adadelta", "ASGD")
OPTIMIZERS = tuple(
    name
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind)
    and issubclass(kind, Optimizer)
    # the base class; one that evaluates the loss several times a step; for sparse gradients; for matrices alone
    and name not in ("Optimizer", "LBFGS", "SparseAdam", "Muon")
)


def make_optimizer(name: str, learning_rate: float, **options: float) -> MakeOptimizer:
    """Return a function from parameters to the ``torch.optim`` optimizer called ``name``.

    Raises:
        ValueError: if torch has no such optimizer (for first-order, dense gradients), or ``learning_rate`` is not a
            finite number above 0.

    Example:
        >>> make_optimizer("SGD", 0.2, momentum=0.9)([torch.zeros(3)]).param_groups[0]["lr"]
        0.2
    """
    check_choice("optimizer", name, OPTIMIZERS)
    check_positive("learning_rate", learning_rate)
    return partial(getattr(torch.optim, name), lr=learning_rate, **options)


def evaluate(
    model: nn.Module, params: Params, inputs: Tensor, targets: Tensor, batch_size: int = 1000
) -> tuple[Tensor, Tensor]:
    """Return the mean cross entropy and the number of misclassified examples, with the model in evaluation mode.

    Args:
        model: maps inputs (N, ...) to logits (N, classes).
        params: its parameters, by name.
        inputs: shape (N, ...).
        targets: class indices, shape (N,).
        batch_size: examples that go through the model at once. Bounds the memory, changes no number beyond rounding.

    Returns:
        Two scalars, loss and errors.
    """
    modes = [(module, module.training) for module in model.modules()]  # not all alike where a BatchNorm is frozen
    model.eval()
    try:
        with torch.no_grad():
            logits = torch.cat([functional_call(model, params, (part,)) for part in inputs.split(batch_size)])
            is_wrong = (logits.argmax(1) != targets) | logits.isnan().any(1)  # the argmax of nan is a class, too
            return F.cross_entropy(logits, targets), is_wrong.sum()
    finally:
        for module, mode in modes:
            module.training = mode


def train(
    build: Callable[[], nn.Module],
    data: Dataset,
    estimator: Estimator,
    *,
    optimizer: str | MakeOptimizer = "SGD",
    learning_rate: float | None = None,
    scheduler: MakeScheduler | None = None,
    threshold: float | None = None,
    max_iterations: int,
    batch_size: int | None = None,
    augment: Augment | None = None,
    evaluate_every: int = 1,
    test_batch_size: int = 1000,
    seeds: Sequence[int] = (0,),
    together: bool | None = None,
    device: str | torch.device = "cpu",
    on_evaluation: Callable[[Run], object] | None = None,
    session: Session | None = None,
    progress: str | None = "training",
    progress_every: int = 1,
) -> History:
    """Train a model from each of several seeds until its training loss reaches the threshold.

    A seed fixes the initial parameters, the tangents and the batches. The test set is evaluated outside the timer.
    Where gradients offer ``add_to_``, as those of the stacked engine do, plain SGD updates the parameters from their
    factors and never writes a gradient out.

    With ``together``, all seeds train at once: the parameters get a leading axis, and the estimator is vmapped over it.
    Each seed draws the same random numbers as alone, so its results are the same up to rounding.

    Args:
        build: makes the model, for example a class of :mod:`fwdlib.models`.
        data: the data set.
        estimator: ``(objective, params) -> GradientEstimate``. If it takes a keyword ``generator``, each seed gets its
            own. If it has a state, as the rules of :mod:`fwdlib.methods.feedback` have, its method ``reset(seed)`` is
            called before each run, and ``state_dict()`` and ``load_state_dict(state)`` for checkpoints.
        optimizer: the name of a ``torch.optim`` optimizer, or a function from a list of tensors to an optimizer.
        learning_rate: for an optimizer given by name.
        scheduler: a function from the optimizer to a scheduler of its learning rate, whose ``step()`` is called after
            each evaluation except the first.
        threshold: stop a seed once its training loss is at most this; None to run all iterations.
        max_iterations: stop every seed after this many steps.
        batch_size: B, examples drawn without replacement in each pass through the training set, which leaves out the
            remainder; None for the whole training set at once.
        augment: applied to the inputs of each batch. It may draw from torch's global generator, which each run seeds.
        evaluate_every: steps between two evaluations. The test set and the threshold are checked only there. The
            training loss is then the mean over the batches since the previous evaluation.
        test_batch_size: test examples that go through the model at once.
        seeds: one run for each.
        together: train all seeds at once, or one after the other. None trains them at once where that gives the same
            results and is faster: for models without convolutions, buffers and Dropout that differ by their parameters
            alone, and elementwise optimizers without hooks.
        device: ``"cpu"``, ``"cuda"``, ...
        on_evaluation: called after each evaluation with the run so far.
        session: what surrounds the run, for example the checkpoint and the processes of
            :class:`fwdlib.trainer.session.TrainerSession`; None for one process that keeps no file.
        progress: the name of the progress bar; None for no bar.
        progress_every: steps between two updates of the bar.

    Returns:
        The history of each seed. A seed that diverges or never reaches the threshold is a result, and recorded. Its
        ``params`` are the trainable parameters of each seed, by name, with which its last training loss was computed;
        frozen parameters and buffers, such as BatchNorm's statistics, are not among them.

    Raises:
        ValueError: if an argument is out of its range, ``together=True`` cannot give the numbers of single runs, or the
            session refuses the run.
        TypeError: if the estimator returns no :class:`GradientEstimate`.
    """
    if isinstance(optimizer, str):
        optimizer = make_optimizer(optimizer, learning_rate)
    elif learning_rate is not None:
        raise ValueError(
            f"learning_rate goes with an optimizer given by name; yours has its own, got {learning_rate!r}"
        )
    if threshold is not None:
        check_positive("threshold", threshold)
    check_count("max_iterations", max_iterations)
    for name, value in (("evaluate_every", evaluate_every), ("test_batch_size", test_batch_size)):
        check_count(name, value)
    check_count("progress_every", progress_every)
    if batch_size is not None and check_count("batch_size", batch_size) > len(data.train_targets):
        num_train = len(data.train_targets)
        raise ValueError(f"batch_size must be at most the {num_train} training examples, got {batch_size}")
    if data.train_targets.dim() != 1 or data.train_targets.is_floating_point():
        shape, dtype = tuple(data.train_targets.shape), data.train_targets.dtype
        raise ValueError(f"train_targets must be class indices, integers of shape (N,), got {dtype} of shape {shape}")
    if not hasattr(seeds, "__len__"):
        raise ValueError(f"seeds must be a list of whole numbers, such as range(5), got {seeds!r}")
    check_count("the number of seeds", len(seeds))
    for seed in seeds:
        check_seed(seed)
    session = session or Session()
    session.check(len(seeds), batch_size, len(data.train_targets))
    device = runtime.resolve_device(device)
    data = Dataset(*(part.to(device) if isinstance(part, Tensor) else part for part in data))
    models = [initialise(build, seed).to(device) for seed in seeds]
    task = _Task(
        data=data,
        estimator=estimator,
        optimizer=optimizer,
        scheduler=scheduler,
        threshold=threshold,
        max_iterations=max_iterations,
        batch_size=batch_size,
        augment=augment,
        evaluate_every=evaluate_every,
        test_batch_size=test_batch_size,
        on_evaluation=on_evaluation or (lambda run: None),
        session=session,
        progress_every=progress_every,
    )
    obstacle = _why_not_together(models, task)
    if together and obstacle:
        raise ValueError(f"together=True is not possible here: {obstacle}")
    if together is None:
        together = obstacle is None and not _has_convolutions(models[0])
    groups = [range(len(seeds))] if together else [[i] for i in range(len(seeds))]
    generators = [runtime.generator(seed, device) for seed in seeds]

    # counts images where there are batches, so that its rate is in images per second
    limit = max_iterations * len(groups) * task.examples_a_step
    counting = {"unit": "it"} if batch_size is None else {"unit": " images", "unit_scale": True}
    histories = []
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        tqdm(total=limit, desc=progress, leave=False, disable=progress is None or session.rank > 0, **counting) as bar,
    ):
        for group in groups:
            histories.append(
                _train_group(
                    [models[i] for i in group], [seeds[i] for i in group], [generators[i] for i in group], task, bar
                )
            )
    return History(
        runs=[run for runs, _, _ in histories for run in runs],
        params=[params for _, ends, _ in histories for params in ends],
        num_test=len(data.test_targets),
        together=len(seeds) if together else 1,
        seconds=sum(seconds for _, _, seconds in histories),
    )


@dataclass(frozen=True, kw_only=True)
class _Task:
    # The arguments of train() that are the same for all seeds.
    data: Dataset
    estimator: Estimator
    optimizer: MakeOptimizer
    scheduler: MakeScheduler | None
    threshold: float | None
    max_iterations: int
    batch_size: int | None
    augment: Augment | None
    evaluate_every: int
    test_batch_size: int
    on_evaluation: Callable[[Run], object]
    session: Session
    progress_every: int

    @property
    def examples_a_step(self) -> int:
        return 1 if self.batch_size is None else self.batch_size


def _train_group(
    models: list[nn.Module], seeds: Sequence[int], generators: list[torch.Generator], task: _Task, bar: tqdm
) -> tuple[list[Run], list[Params], float]:
    model, data, max_iterations, session = models[0], task.data, task.max_iterations, task.session
    many = len(models) > 1
    params = {name: p.detach() for name, p in stack_module_state(models)[0].items()} if many else params_of(model)
    objective = BatchLoss(model, data.train_inputs, data.train_targets, session.loss)
    make_estimate = replicated_estimate if many else single_estimate
    estimate_rows = make_estimate(task.estimator, objective, generators)
    evaluate_all = partial(evaluate, model)
    if many:
        evaluate_all = _evaluated_together(evaluate_all)
    optimizer = task.optimizer(list(params.values()))
    scheduler = task.scheduler(optimizer) if task.scheduler else None
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError(
            "ReduceLROnPlateau needs a loss at each step, and train() gives a scheduler none: take one that counts its "
            "steps, such as StepLR"
        )
    clock = _Clock(data.train_inputs.device)
    runs = [Run(seed, "", 0, every=task.evaluate_every) for seed in seeds]
    ends: list[Params] = [{} for _ in seeds]
    rows = list(range(len(seeds)))  # the run of each row of the parameters
    running = list(rows)
    if not many:
        if _has_state(task.estimator):
            task.estimator.reset(seeds[0])
        # for Dropout and crops, which draw from torch's global generator; train() restores it
        purpose = f"dropout of process {session.rank}" if session.rank else "dropout"
        torch.manual_seed(runtime.generator(seeds[0], purpose=purpose).initial_seed())

    batches = _Batches(task, runtime.generator(seeds[0], purpose="batches"))
    recent: list[list[float]] = []  # training losses since the last evaluation
    first = 0
    about = Running(
        seeds[0],
        model,
        optimizer,
        scheduler,
        task.estimator,
        batches,
        generators[0],
        data,
        task.batch_size,
        task.evaluate_every,
        max_iterations,
    )
    if progress := session.begin(about):
        first, runs[0], recent, clock.total = progress
        bar.initial = bar.n = first * task.examples_a_step
    shown = first

    for iteration in range(first, max_iterations + 1):
        is_last = iteration == max_iterations
        is_due = iteration % task.evaluate_every == 0 or is_last
        if is_due:
            session.before_evaluation(about, Progress(iteration, runs[0], recent, clock.total))
        objective.inputs, objective.targets = batches.draw()
        if is_due:
            evaluated = evaluate_all(params, data.test_inputs, data.test_targets, task.test_batch_size)
        with clock:
            estimate: GradientEstimate = estimate_rows(params)
        if not isinstance(estimate, GradientEstimate):
            raise TypeError(f"the estimator must return a GradientEstimate, got {type(estimate).__name__}")
        recent.append(estimate.loss.reshape(-1).tolist())
        recorded = [(row, i) for row, i in enumerate(rows) if i in running]
        if not is_due:  # only a seed whose loss is no longer finite: the others keep to the schedule
            recorded = [(row, i) for row, i in recorded if not math.isfinite(recent[-1][row])]
        if recorded:
            if not is_due:
                evaluated = evaluate_all(params, data.test_inputs, data.test_targets, task.test_batch_size)
            test_loss, test_errors = (t.reshape(-1).tolist() for t in evaluated)
            for row, i in recorded:
                run = runs[i]
                run.train_loss.append(sum(losses[row] for losses in recent) / len(recent))
                run.test_loss.append(test_loss[row])
                run.test_errors.append(test_errors[row])
                run.iterations = iteration
                run.status = _status(run.train_loss[-1], task.threshold, is_last)
                if run.status:
                    # Copied when the seed stops; later values of its row are never read.
                    ends[i] = {name: p[row].clone() if many else p.clone() for name, p in params.items()}
                    running.remove(i)
            if is_due:
                recent.clear()
                session.after_evaluation(is_finite=math.isfinite(runs[0].train_loss[-1] + runs[0].test_loss[-1]))
            for _, i in recorded:
                task.on_evaluation(runs[i])
        if not running:
            break
        if scheduler and is_due and iteration:
            _advance(scheduler)
        with clock:
            take_step(optimizer, params, estimate.grads)
        seconds = clock.lap()
        if not many:
            runs[0].step_seconds.append(seconds)
        done = iteration + 1
        if done % task.progress_every == 0:
            if bar.update((done - shown) * task.examples_a_step):  # drawn: only some are
                bar.set_postfix(_figures(runs[running[0]], recent, task, len(running)), refresh=False)
            shown = done
        if many and 2 * len(running) <= len(rows):  # or the few slow seeds would pay for all
            kept = [row for row, i in enumerate(rows) if i in running]
            params, optimizer = keep_rows(params, optimizer, task.optimizer, kept)
            recent = [[losses[row] for row in kept] for losses in recent]
            rows = list(running)
            estimate_rows = make_estimate(task.estimator, objective, [generators[i] for i in rows])
    bar.update((max_iterations - shown) * task.examples_a_step)
    return runs, ends, clock.total


def _evaluated_together(evaluate_one: Callable) -> Callable:
    together = vmap(evaluate_one, in_dims=(0, None, None, None))

    def evaluate_all(*arguments: Any) -> tuple[Tensor, Tensor]:
        try:
            return together(*arguments)
        except RuntimeError as error:
            if "randomness" not in str(error):
                raise
            raise ValueError(
                "the model draws random numbers in evaluation mode, which cannot be each seed's own; pass "
                "together=False"
            ) from error

    return evaluate_all


def _figures(run: Run, recent: list[list[float]], task: _Task, num_running: int) -> dict[str, str]:
    # What the progress bar says behind its rate.
    if task.batch_size is None:
        return {"loss": f"{run.train_loss[-1]:.3f}", "running": f"{num_running}"}
    loss = sum(losses[0] for losses in recent) / len(recent) if recent else run.train_loss[-1]
    right = 1 - run.test_errors[-1] / len(task.data.test_targets)
    return {"loss": f"{loss:.3f}", "test accuracy": f"{100 * right:.2f} %"}


class _Batches:
    # Examples drawn without replacement in each pass through the training set. The state is that of the generator at
    # the start of the pass, which gives the order again, and the number of batches drawn from it.
    def __init__(self, task: _Task, generator: torch.Generator) -> None:
        self._task = task
        self._generator = generator
        self._at_start = generator.get_state()
        self._order: list[Tensor] = []
        self._position = 0

    def draw(self) -> tuple[Tensor, Tensor]:
        data, augment = self._task.data, self._task.augment
        inputs, targets = data.train_inputs, data.train_targets
        if self._task.batch_size is not None:
            if self._position == len(self._order):
                self._shuffle()
            rows = self._task.session.share(self._order[self._position])
            self._position += 1
            inputs, targets = inputs.index_select(0, rows), targets.index_select(0, rows)
        else:
            inputs, targets = map(self._task.session.share, (inputs, targets))
        return (augment(inputs) if augment else inputs), targets

    def _shuffle(self) -> None:
        size, targets = self._task.batch_size, self._task.data.train_targets
        self._at_start = self._generator.get_state()
        order = torch.randperm(len(targets), generator=self._generator).to(targets.device)
        self._order = [rows for rows in order.split(size) if len(rows) == size]
        self._position = 0

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self._at_start, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._generator.set_state(state["generator"])
        if self._task.batch_size is not None:
            self._shuffle()
            self._position = state["position"]


def _advance(scheduler: LRScheduler) -> None:
    with warnings.catch_warnings():
        # After a resume the scheduler has seen no optimizer.step().
        warnings.filterwarnings("ignore", message=r"Detected call of `lr_scheduler\.step\(\)`", category=UserWarning)
        scheduler.step()


def _has_state(estimator: Estimator) -> bool:
    return callable(getattr(estimator, "reset", None))


def _status(loss: float, threshold: float | None, is_last: bool) -> str:
    if not math.isfinite(loss):
        return "diverged"
    if threshold is not None and loss <= threshold:
        return "reached"
    if is_last:
        return "completed" if threshold is None else "not reached"
    return ""


def _why_not_together(models: Sequence[nn.Module], task: _Task) -> str | None:
    model = models[0]
    if task.batch_size is not None:
        return "each seed draws its own batches"
    if task.augment is not None:
        return "augment draws from torch's global generator, which the seeds would share"
    if _has_state(task.estimator):
        return "the estimator has a state (feedback matrices, for example), and each seed needs its own"
    if task.scheduler is not None:
        return "the scheduler belongs to one optimizer, which is replaced when a seed stops"
    optimizer = task.optimizer([*params_of(model).values()])
    if type(optimizer) not in [getattr(torch.optim, name) for name in ELEMENTWISE]:
        return f"the optimizer is not one of the elementwise ones ({', '.join(ELEMENTWISE)})"
    if has_hooks(optimizer):
        return "the optimizer has hooks, which would see the gradients of all seeds at once"
    if next(model.buffers(), None) is not None:
        return "the model has buffers (BatchNorm's statistics, for example), and each seed needs its own"
    if any(isinstance(module, nn.modules.dropout._DropoutNd) for module in model.modules()):
        return "the model has Dropout, which cannot draw a mask for each seed"
    if any(not p.requires_grad for p in model.parameters()):
        return "the model has frozen parameters"
    if not all(_are_alike(model, other) for other in models[1:]):
        return "the models of two seeds differ in more than their parameters, and all would run as the first one"
    return None


def _are_alike(model: nn.Module, another: nn.Module) -> bool:
    # Whether two models are the same but for their parameters. What cannot be compared counts as different.
    own, compared = [{*map(id, m.parameters())} for m in (model, another)], set()

    def alike(one: Any, other: Any) -> bool:
        if one is other or id(one) in compared:
            return True
        if type(one) is not type(other):
            return False
        if isinstance(one, nn.Module):
            compared.add(id(one))
            return alike(*(vars(module) | {"_parameters": [*module._parameters]} for module in (one, other)))
        if isinstance(one, weakref.ref):  # recurrent layers keep their parameters as such
            return alike(one(), other())
        if isinstance(one, nn.Parameter):
            return id(one) in own[0] and id(other) in own[1]
        if isinstance(one, Tensor):
            return one.dtype == other.dtype and torch.equal(one, other)
        if isinstance(one, (list, tuple)):
            return len(one) == len(other) and all(map(alike, one, other))
        if isinstance(one, dict):
            return list(one) == list(other) and all(map(alike, one.values(), other.values()))
        return isinstance(one, (Number, str, bytes, set, torch.device, torch.dtype)) and one == other

    return alike(model, another)


def _has_convolutions(model: nn.Module) -> bool:
    # vmap turns convolutions into a grouped convolution, which is slower on a CPU than one after the other.
    return any(isinstance(module, nn.modules.conv._ConvNd) for module in model.modules())


class _Clock:
    # Adds up the time inside its `with` blocks; on a GPU it waits for the kernels to finish.
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.total = 0.0
        self._lap = 0.0

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __enter__(self) -> None:
        self._start = self._now()

    def __exit__(self, *exc: object) -> None:
        self._lap += self._now() - self._start

    def lap(self) -> float:
        lap, self._lap = self._lap, 0.0
        self.total += lap
        return lap
