"""The only training loop of the project: any estimator, any torch optimizer, one seed or a stack of them, any batch."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.optim import Optimizer
from tqdm.auto import tqdm

from fwdlib import runtime
from fwdlib.checks import check_choice, check_count, check_positive
from fwdlib.data import Dataset
from fwdlib.estimators import Estimator, GradientEstimate
from fwdlib.history import History, Run
from fwdlib.models import initialise
from fwdlib.objectives import BatchLoss, params_of
from fwdlib.perturbations import Gradients
from fwdlib.tangents import Params, Replicates

MakeOptimizer = Callable[[list[Tensor]], Optimizer]

# Optimizers that treat each element alone, so that a leading axis of replicates changes nothing for any of them.
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


def evaluate(model: nn.Module, params: Params, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean cross entropy and the number of misclassified examples, with the model in evaluation mode.

    Args:
        model: maps inputs (N, ...) to logits (N, classes).
        params: its parameters, by name.
        inputs: shape (N, ...).
        targets: class indices, shape (N,).

    Returns:
        Two scalars, loss and errors.
    """
    modes = [(module, module.training) for module in model.modules()]  # not all alike where a BatchNorm is frozen
    model.eval()
    try:
        with torch.no_grad():
            logits = functional_call(model, params, (inputs,))
            return F.cross_entropy(logits, targets), (logits.argmax(1) != targets).sum()
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
    threshold: float | None = None,
    max_iterations: int,
    batch_size: int | None = None,
    evaluate_every: int = 1,
    seeds: Sequence[int] = (0,),
    stacked: bool | None = None,
    device: str | torch.device = "cpu",
    progress: str | None = "training",
) -> History:
    """Train a model from each of several seeds until its training loss reaches the threshold.

    A seed fixes the initial parameters, the tangents and the batches. The test set is evaluated outside the timer.
    Plain SGD on an estimate of :func:`fwdlib.dual.stacked_forward_gradient` updates the parameters from its factors.

    With ``stacked``, all seeds train at once: the parameters get a leading axis and the estimator is vmapped over it.
    Each seed sees the same random numbers as alone, so the numbers are the same up to the order of floating-point sums.

    Args:
        build: makes the model, for example a class of :mod:`fwdlib.models`.
        data: the data set.
        estimator: ``(objective, params) -> GradientEstimate``. If it takes a keyword ``generator``, each seed gets its
            own.
        optimizer: the name of a ``torch.optim`` optimizer, or a function from a list of tensors to an optimizer.
        learning_rate: for an optimizer given by name.
        threshold: stop a seed once its training loss is at most this; None to run all iterations.
        max_iterations: stop every seed after this many steps.
        batch_size: B, examples drawn without replacement in each pass through the training part, whose rest is left
            out; None for the whole training part at once.
        evaluate_every: steps between two evaluations of the test set and of the threshold. The training loss is then
            the mean over the batches since the last.
        seeds: one run for each.
        stacked: train all seeds at once or one after the other; None to stack where that gives the same and pays, that
            is for models without convolutions, buffers and Dropout and for elementwise optimizers.
        device: ``"cpu"``, ``"cuda"``, ...
        progress: what the progress bar is called; None for no bar.

    Returns:
        The history of each seed. Not reaching the threshold and diverging are results, recorded in it.

    Raises:
        ValueError: if an argument is out of its range, or ``stacked=True`` cannot give the numbers of single runs.
    """
    if isinstance(optimizer, str):
        elementwise = optimizer in ELEMENTWISE
        optimizer = make_optimizer(optimizer, learning_rate)
    elif learning_rate is not None:
        raise ValueError(
            f"learning_rate goes with an optimizer given by name; yours has its own, got {learning_rate!r}"
        )
    else:
        elementwise = type(optimizer([torch.zeros(1)])).__name__ in ELEMENTWISE
    if threshold is not None:
        check_positive("threshold", threshold)
    check_count("max_iterations", max_iterations)
    check_count("evaluate_every", evaluate_every)
    if batch_size is not None and check_count("batch_size", batch_size) > len(data.train_targets):
        num_train = len(data.train_targets)
        raise ValueError(f"batch_size must be at most the {num_train} training examples, got {batch_size}")
    check_count("the number of seeds", len(seeds))
    device = runtime.resolve_device(device)
    data = Dataset(*(part.to(device) if isinstance(part, Tensor) else part for part in data))
    models = [initialise(build, seed).to(device) for seed in seeds]
    obstacle = _why_not_stacked(models[0], elementwise, batch_size)
    if stacked and obstacle:
        raise ValueError(f"stacked=True is not possible here: {obstacle}")
    if stacked is None:
        stacked = obstacle is None and not _has_convolutions(models[0])
    groups = [range(len(seeds))] if stacked else [[i] for i in range(len(seeds))]
    generators = [runtime.generator(seed, device) for seed in seeds]

    limit = max_iterations * len(groups)
    histories = []
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        tqdm(total=limit, desc=progress, unit="it", leave=False, disable=progress is None) as bar,
    ):
        for group in groups:
            histories.append(
                _train_group(
                    [models[i] for i in group],
                    [seeds[i] for i in group],
                    [generators[i] for i in group],
                    data,
                    estimator,
                    optimizer,
                    threshold,
                    max_iterations,
                    batch_size,
                    evaluate_every,
                    bar,
                )
            )
    return History(
        runs=[run for runs, _, _ in histories for run in runs],
        params=[params for _, ends, _ in histories for params in ends],
        num_test=len(data.test_targets),
        stack_size=len(seeds) if stacked else 1,
        seconds=sum(seconds for _, _, seconds in histories),
    )


def _train_group(
    models: list[nn.Module],
    seeds: Sequence[int],
    generators: list[torch.Generator],
    data: Dataset,
    estimator: Estimator,
    make: MakeOptimizer,
    threshold: float | None,
    max_iterations: int,
    batch_size: int | None,
    evaluate_every: int,
    bar: tqdm,
) -> tuple[list[Run], list[Params], float]:
    model = models[0]  # for its structure; with several, their parameters are stacked
    many = len(models) > 1
    params = {name: p.detach() for name, p in stack_module_state(models)[0].items()} if many else params_of(model)
    objective = BatchLoss(model, data.train_inputs, data.train_targets)
    make_estimate = _stacked_estimate if many else _single_estimate
    estimate_rows = make_estimate(estimator, objective, generators)
    evaluate_all = partial(evaluate, model)
    if many:
        evaluate_all = vmap(evaluate_all, in_dims=(0, None, None))
    optimizer = make(list(params.values()))
    clock = _Clock(data.train_inputs.device)
    runs = [Run(seed, "", 0, every=evaluate_every) for seed in seeds]
    ends: list[Params] = [{} for _ in seeds]
    rows = list(range(len(seeds)))  # which run each row of the stack is
    running = list(rows)
    if not many:
        # for Dropout, which only knows torch's global generator; train() puts that back
        torch.manual_seed(runtime.generator(seeds[0], purpose="dropout").initial_seed())

    batches = _batches(data, batch_size, runtime.generator(seeds[0], purpose="batches"))
    recent: list[list[float]] = []  # training losses since the last evaluation

    for iteration in range(max_iterations + 1):
        objective.inputs, objective.targets = next(batches)
        is_last = iteration == max_iterations
        is_due = iteration % evaluate_every == 0 or is_last
        if is_due:
            evaluated = evaluate_all(params, data.test_inputs, data.test_targets)
        with clock:
            estimate: GradientEstimate = estimate_rows(params)
        recent.append(estimate.loss.reshape(-1).tolist())
        has_diverged = not all(math.isfinite(recent[-1][row]) for row, i in enumerate(rows) if i in running)
        if has_diverged and not is_due:
            evaluated = evaluate_all(params, data.test_inputs, data.test_targets)
        if is_due or has_diverged:
            test_loss, test_errors = (t.reshape(-1).tolist() for t in evaluated)
            for row, i in enumerate(rows):
                if i not in running:
                    continue
                run = runs[i]
                run.train_loss.append(sum(losses[row] for losses in recent) / len(recent))
                run.test_loss.append(test_loss[row])
                run.test_errors.append(test_errors[row])
                run.iterations = iteration
                run.status = _status(run.train_loss[-1], threshold, is_last)
                if run.status:
                    # Set aside at the moment it stops; what the stack goes on to do with its row is never read.
                    ends[i] = {name: p[row].clone() if many else p.clone() for name, p in params.items()}
                    running.remove(i)
            recent.clear()
        if not running:
            break
        with clock:
            _step(optimizer, params, estimate.grads)
        seconds = clock.lap()
        if not many:
            runs[0].step_seconds.append(seconds)
        bar.update()
        bar.set_postfix(loss=f"{runs[running[0]].train_loss[-1]:.3f}", running=len(running), refresh=False)
        if many and 2 * len(running) <= len(rows):  # or the few slow seeds would pay for all
            kept = [row for row, i in enumerate(rows) if i in running]
            params, optimizer = _keep_rows(params, optimizer, make, kept)
            recent = [[losses[row] for row in kept] for losses in recent]
            rows = list(running)
            estimate_rows = make_estimate(estimator, objective, [generators[i] for i in rows])
    bar.update(max_iterations - iteration)
    return runs, ends, clock.total


def _batches(data: Dataset, batch_size: int | None, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    inputs, targets = data.train_inputs, data.train_targets
    while batch_size is None:
        yield inputs, targets
    while True:
        order = torch.randperm(len(targets), generator=generator).to(targets.device)
        for rows in order.split(batch_size):
            if len(rows) == batch_size:
                yield inputs[rows], targets[rows]


def _step(optimizer: Optimizer, params: Params, grads: Params | Gradients) -> None:
    if isinstance(grads, Gradients) and (learning_rate := _plain_sgd(optimizer)) is not None:
        grads.add_to_(params, -learning_rate)
        return
    for name, p in params.items():
        p.grad = grads[name]
    optimizer.step()


def _plain_sgd(optimizer: Optimizer) -> float | None:
    # Its learning rate, if its step is nothing but p -= learning_rate * grad.
    group, *others = optimizer.param_groups
    if type(optimizer) is not torch.optim.SGD or others:
        return None
    return None if group["momentum"] or group["weight_decay"] or group["maximize"] else group["lr"]


def _status(loss: float, threshold: float | None, is_last: bool) -> str:
    if not math.isfinite(loss):
        return "diverged"
    if threshold is not None and loss <= threshold:
        return "reached"
    if is_last:
        return "completed" if threshold is None else "not reached"
    return ""


def _single_estimate(
    estimator: Estimator, objective: BatchLoss, generators: list[torch.Generator]
) -> Callable[[Params], GradientEstimate]:
    return partial(estimator, objective, **({"generator": generators[0]} if _draws(estimator) else {}))


def _stacked_estimate(
    estimator: Estimator, objective: BatchLoss, generators: list[torch.Generator]
) -> Callable[[Params], GradientEstimate]:
    replicates, draws = Replicates(generators), _draws(estimator)

    def one(params: Params, index: Tensor) -> GradientEstimate:
        return estimator(objective, params, **({"generator": replicates.at(index)} if draws else {}))

    def every(params: Params) -> GradientEstimate:
        try:
            return vmap(one)(params, replicates.indices)
        except RuntimeError as error:
            if "randomness" not in str(error):
                raise
            raise ValueError(
                "the model or the estimator draws random numbers that a stack of seeds cannot tell apart (a functional "
                "dropout, say, or an estimator without a keyword `generator`); pass stacked=False"
            ) from error

    return every


def _draws(estimator: Estimator) -> bool:
    return "generator" in inspect.signature(estimator).parameters


def _keep_rows(params: Params, optimizer: Optimizer, make: MakeOptimizer, kept: list[int]) -> tuple[Params, Optimizer]:
    # A smaller stack, and an optimizer for it that goes on where the other was.
    smaller = {name: p[kept] for name, p in params.items()}
    successor = make(list(smaller.values()))
    for before, after in zip(params.values(), smaller.values(), strict=True):
        for key, value in optimizer.state.get(before, {}).items():
            has_rows = isinstance(value, Tensor) and value.shape[:1] == before.shape[:1]
            successor.state[after][key] = value[kept] if has_rows else value
    return smaller, successor


def _why_not_stacked(model: nn.Module, elementwise: bool, batch_size: int | None) -> str | None:
    if batch_size is not None:
        return "each seed draws its own batches"
    if not elementwise:
        return f"the optimizer is not one of the elementwise ones ({', '.join(ELEMENTWISE)})"
    if next(model.buffers(), None) is not None:
        return "the model has buffers (BatchNorm's statistics, say), which each seed would need for itself"
    if any(isinstance(module, nn.modules.dropout._DropoutNd) for module in model.modules()):
        return "the model has Dropout, which cannot draw each seed's own mask in a stack"
    if any(not p.requires_grad for p in model.parameters()):
        return "the model has frozen parameters"
    return None


def _has_convolutions(model: nn.Module) -> bool:
    # A stack of convolutions becomes a grouped convolution, which is slower on a CPU than one after the other.
    return any(isinstance(module, nn.modules.conv._ConvNd) for module in model.modules())


class _Clock:
    # Adds up the time inside its `with` blocks; on a GPU it waits for the work to be done.
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
