r"""Data-parallel training that exchanges only scalars, and beside it backprop's, which exchanges gradients.

A batch is shared among N processes that hold the same parameters. If they draw the same tangents, each can make the
whole estimate from the mean of their directional derivatives:

.. math:: \frac1K \sum_k \Bigl(\frac1N \sum_{r=1}^N \nabla f_r \cdot v_k\Bigr)\, v_k

so K numbers and the loss go over the wire in a step, whatever the number of parameters; backprop sends all of them. The
mean over processes is linear, and hence its own derivative. So it is part of the loss here, which every estimator of
forward mode differentiates like any other: nothing of them is written anew.

Start it by ``torchrun --nproc-per-node N -m fwdlib train ...``, or on one machine by ``python -m fwdlib train
--processes N ...``. The exchange is torch.distributed's: gloo on CPUs, nccl on GPUs.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import handle_torch_function, has_torch_function_unary

from fwdlib import runtime
from fwdlib.data import Dataset, fingerprint
from fwdlib.estimators import Estimator, GradientEstimate
from fwdlib.history import History
from fwdlib.objectives import BatchLoss, own_params
from fwdlib.stacked.dual import Dual
from fwdlib.stacked.forward_pass import Pass, register_rule
from fwdlib.tangents import Params
from fwdlib.trainer.checkpoint import Part, differences
from fwdlib.trainer.processes import ALONE, ToldElsewhereError, Workers, num_restarts, num_started
from fwdlib.trainer.session import TrainerSession
from fwdlib.training import train

T = TypeVar("T")
MEETING = "FWDLIB_MEETING"  # variable with the file in which processes meet that start() has started
TIMEOUT = timedelta(minutes=5)  # for the slowest process to come to the same point


# --- the mean over processes -----------------------------------------------------------------------------------------


class Exchange:
    """The mean of a small tensor over all processes.

    They stand in a grid whose sides are the prime factors of their number, and gather along one side after the other.
    Four processes take two messages each, where the ring of gloo's all-reduce takes six, one after the other: for a few
    numbers the messages are all that counts. All processes add the same numbers in the same order.

    Args:
        device: of the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self.size = dist.get_world_size()
        self._sides = prime_factors(self.size)
        names = [f"side {i}" for i in range(len(self._sides))]
        mesh = init_device_mesh(device.type, tuple(self._sides), mesh_dim_names=tuple(names))
        self._groups = [mesh.get_group(name) for name in names]

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of ``values``, of any shape, which must be the same in all processes."""
        total = values.detach().reshape(-1)
        for side, group in zip(self._sides, self._groups, strict=True):
            rows = total.new_empty(side * len(total))
            dist.all_gather_into_tensor(rows, total, group=group)
            total = rows.view(side, -1).sum(0)
        return (total / self.size).reshape(values.shape)


def prime_factors(number: int) -> list[int]:
    """Return the prime factors of a whole number, in rising order.

    Example:
        >>> prime_factors(12)
        [2, 2, 3]
    """
    factors, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return factors


class _Mean(torch.autograd.Function):
    # The mean over processes for torch's own forward mode. As it is linear, its derivative is itself.
    @staticmethod
    def forward(values: Tensor, exchange: Exchange) -> Tensor:
        return exchange.mean(values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Exchange], output: Tensor) -> None:
        ctx.exchange = inputs[1]

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return mean_over_processes(tangent, ctx.exchange)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, values: Tensor, exchange: Exchange) -> tuple[Tensor, int | None]:
        return mean_over_processes(values, exchange), in_dims[0]


def mean_over_processes(values: Tensor, exchange: Exchange) -> Tensor:
    """Return the mean of ``values`` over all processes, to be differentiated in forward mode.

    In the stacked pass value and derivatives are exchanged together, in torch's own forward mode one after the other.

    Args:
        values: a small tensor.
        exchange: between the processes.

    Raises:
        NotImplementedError: for tangents that belong to examples, of which each process knows its own alone.
    """
    if has_torch_function_unary(values) or torch._C._len_torch_function_stack():
        return handle_torch_function(mean_over_processes, (values,), values, exchange)
    return _Mean.apply(values, exchange)


@register_rule(mean_over_processes)
def _mean_over_processes(run: Pass, values: Any, exchange: Exchange) -> Dual:
    if run.perturbation.per_example:
        raise NotImplementedError(
            "tangents of activities or single examples cannot be shared among processes: each would have to know the "
            "examples of the others. Take tangents of the weights, such as rank-one ones."
        )
    return Dual(exchange.mean(run.stack(values)))


# --- the processes ---------------------------------------------------------------------------------------------------


class Processes(Workers):
    """The processes of torch.distributed's default group, see :func:`processes`.

    Args:
        device: that this one works on.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.exchange = Exchange(device)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross entropy over the shares of all processes; it has no derivative in reverse mode."""
        return mean_over_processes(F.cross_entropy(logits, targets), self.exchange)

    def share(self, rows: Tensor) -> Tensor:
        """Return every N-th of the rows, from that of the rank on."""
        return rows[self.rank :: self.size]

    def each(self, part: Part) -> Part:
        """Return a part of a checkpoint that holds the states of all processes, and loads each its own."""
        return _Each(part, self)

    def check_alike(self, about: Mapping[str, str]) -> None:
        """Refuse to train together what differs, versions of torch and fwdlib included.

        Raises:
            ValueError: in the first process, with what differs, and for which processes.
            ToldElsewhereError: in the others.
        """
        versions = runtime.versions()
        found = self._gather({**about, **{f"the version of {name}": versions[name] for name in ("torch", "fwdlib")}})
        lines = []
        for name in dict.fromkeys(name for each in found for name in each):
            ranks: dict[str, list[str]] = {}
            for rank, each in enumerate(found):
                ranks.setdefault(each.get(name, "nothing"), []).append(str(rank))
            if len(ranks) > 1:
                values = ", ".join(f"{value} in {', '.join(which)}" for value, which in ranks.items())
                lines.append(f"{name} is {values}")
        if lines:
            raise self.told(
                ValueError(
                    f"the {self.size} processes would not train the same thing: {differences(lines)}. Start all of "
                    f"them with the same command, code and data"
                )
            )

    def settle(self, model: nn.Module) -> None:
        """Give all processes the mean of their buffers, and compare their parameters, by a hash.

        Raises:
            RuntimeError: if these differ, as they can where processors round differently.
        """
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.copy_(self.exchange.mean(buffer))
        prints = self._gather(fingerprint(*(p.double() for p in model.parameters())))  # numpy has no bfloat16
        if len(set(prints)) > 1:
            odd = [str(rank) for rank, found in enumerate(prints) if found != prints[0]]
            raise RuntimeError(
                f"the parameters of process {', '.join(odd)} are no longer those of process 0, so what they exchange "
                f"means nothing. Processors of different kinds round differently: use machines of one kind"
            )

    def from_first(self, make: Callable[[], T]) -> T:
        """Return what ``make()`` returns in the first process; an exception there ends all of them.

        Raises:
            Exception: in the first process, what ``make`` raises.
            ToldElsewhereError: in the others.
        """
        made: list[Any] = [None, None]
        problem: Exception | None = None
        if self.rank == 0:
            try:
                made[0] = make()
            except Exception as error:
                problem, made[1] = error, str(error)
        dist.broadcast_object_list(made, src=0)
        if problem:
            raise problem
        if made[1] is not None:
            raise ToldElsewhereError(made[1])
        return made[0]

    def _gather(self, value: T) -> list[T]:
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found


class _Each:
    def __init__(self, part: Part, workers: Processes) -> None:
        self._part, self._workers = part, workers

    def state_dict(self) -> dict[str, Any]:
        return {"of each process": self._workers._gather(self._part.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._part.load_state_dict(state["of each process"][self._workers.rank])


class DataParallelGradient:
    """Backprop's gradient of the loss of all processes, by torch's DistributedDataParallel.

    It averages the gradients while the backward pass goes on. Running statistics of BatchNorm stay each process's own
    in a step, as with forward gradients; the logged loss is exchanged beside the backward pass.
    """

    def __init__(self) -> None:
        self._wrapped: DistributedDataParallel | None = None

    def __call__(self, objective: BatchLoss, params: Params) -> GradientEstimate:
        """Return the gradient of a model at its own parameters, ``params_of(model)``.

        Raises:
            ValueError: if the parameters are others.
        """
        model = objective.model
        own = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if own.keys() != params.keys() or own_params(own, params) is None:
            raise ValueError("DistributedDataParallel works at the model's own parameters: pass params_of(model)")
        if self._wrapped is None or self._wrapped.module is not model:
            with warnings.catch_warnings():  # torch 2.15 has another name for it, which lower versions lack
                warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
                self._wrapped = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
        for p in own.values():
            p.grad = None
        with torch.enable_grad():
            loss = F.cross_entropy(self._wrapped(objective.inputs), objective.targets)
            mean = loss.detach() / dist.get_world_size()
            sent = dist.all_reduce(mean, async_op=True)
            loss.backward()
        sent.wait()
        return GradientEstimate(mean, {name: p.grad for name, p in own.items()}, mean.new_empty(0))


# --- starting --------------------------------------------------------------------------------------------------------


@contextmanager
def processes(device: torch.device) -> Iterator[Workers]:
    """Join the processes that torchrun has started, for the time of a ``with`` block; alone, join none.

    Args:
        device: that this process works on; a CPU means gloo, a GPU nccl.

    Raises:
        ToldElsewhereError: if another process is gone.
        RuntimeError: what else goes wrong in the block.
    """
    if num_started() == 1:
        yield ALONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    master = os.environ.get("MASTER_ADDR", "localhost")
    if socket.gethostbyname(master).startswith("127."):  # or gloo would listen where the machine's name points to
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback())
    place = {"rank": int(os.environ["RANK"]), "world_size": num_started()}
    store, *_ = next(dist.rendezvous(os.environ.get(MEETING, "env://"), timeout=TIMEOUT, **place))
    # Under a name of its own after each restart: torchrun's store still has the addresses of those that were lost.
    store = dist.PrefixStore(f"start {num_restarts()}", store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, timeout=TIMEOUT, **place)
    try:
        yield Processes(device)
    except RuntimeError as error:
        is_lost = "Connection closed by peer" in str(error) or "Connection reset by peer" in str(error)
        raise (ToldElsewhereError(f"another process was lost: {error}") if is_lost else error) from error
    finally:
        dist.destroy_process_group()


def _loopback() -> str:
    return next(name for _, name in socket.if_nameindex() if name.startswith("lo"))


def start(count: int, function: Callable[..., None], *args: Any) -> None:
    """Call a function in several new processes on this machine, which :func:`processes` joins.

    They meet in a file and talk over the loopback device, so that nothing can be reached from elsewhere. (torchrun has
    a server of its own, which listens on all addresses.) Each takes one thread, unless ``OMP_NUM_THREADS`` says more.

    Args:
        count: how many.
        function: that can be pickled. Where it ends by ``sys.exit(code)``, the others are ended.
        args: its arguments, likewise.

    Raises:
        ChildError: if one of them ends with a code other than 0; the message has it.
        ProcessRaisedException: if one of them ends by another exception; the message has its traceback.
    """
    with tempfile.TemporaryDirectory(prefix="fwdlib-") as folder:
        given = (count, (Path(folder) / "meeting").as_uri(), function, args)
        children = torch.multiprocessing.start_processes(_start, given, nprocs=count, join=False)
        # what ends the others is said below, or by the first
        logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
        lost = None
        try:
            while not children.join():
                pass
        except torch.multiprocessing.ProcessExitedException as end:
            lost = end.error_index
        finally:  # at Ctrl-C there are some left
            for process in children.processes:
                process.terminate()
                process.join()
        codes = [process.exitcode for process in children.processes]
        if lost is not None:  # that it noticed first: better the one that was killed than one that missed it
            killed = [rank for rank, code in enumerate(codes) if code < 0 and code != -signal.SIGTERM]
            rank = (killed or [lost])[0]
            raise ChildError(rank, codes[rank])


class ChildError(RuntimeError):
    """A process that :func:`start` has started ended early, by an error that it has told, or by a signal."""

    def __init__(self, rank: int, code: int) -> None:
        how = f"code {code}" if code >= 0 else f"signal {-code}"
        super().__init__(f"process {rank} was ended by {how}, and with it the others")
        self.rank = rank
        self.code = code


def _start(rank: int, count: int, meeting: str, function: Callable[..., None], args: tuple) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), MEETING: meeting}
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    function(*args)


def train_together(
    count: int, build: Callable[[], nn.Module], data: Dataset, estimator: Estimator, **options: Any
) -> list[History]:
    """Train a model in several new processes on this machine, which share each batch.

    Args:
        count: of processes.
        build: makes the model; like the estimator, something that can be imported or is made of such things by
            ``functools.partial``: the processes know nothing of a notebook's cells.
        data: the data set.
        estimator: see :func:`fwdlib.training.train`.
        options: what else that takes.

    Returns:
        The history of each process: all the same, the times apart.

    Raises:
        ChildError: as :func:`start`.
    """
    with tempfile.TemporaryDirectory(prefix="fwdlib-") as folder:
        start(count, _train, folder, build, data, estimator, options)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _train(folder: str, build: Callable, data: Dataset, estimator: Estimator, options: dict[str, Any]) -> None:
    with processes(torch.device(options.get("device", "cpu"))) as workers:
        history = train(build, data, estimator, session=TrainerSession(workers=workers), **options)
        torch.save(history, Path(folder) / f"{workers.rank}.pt")
