r"""Data-parallel training that exchanges only scalars; for comparison, backprop's, which exchanges gradients.

N processes hold the same parameters and share each batch. They draw the same tangents, so each makes the whole estimate
from the mean of their directional derivatives:

.. math:: \frac1K \sum_k \Bigl(\frac1N \sum_{r=1}^N \nabla f_r \cdot v_k\Bigr)\, v_k

A step sends K numbers and the loss, whatever the number of parameters; backprop sends all gradients. The mean over
processes is part of the loss (:mod:`fwdlib.trainer.exchange`), so every forward estimator works without change.

Start it by ``torchrun --nproc-per-node N -m fwdlib train ...``, or on one machine by ``python -m fwdlib train
--processes N ...``. torch.distributed does the exchange, with gloo on CPUs and nccl on GPUs.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import socket
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fwdlib import runtime
from fwdlib.children import end_with_parent
from fwdlib.data import Dataset, fingerprint
from fwdlib.estimators import Estimator, GradientEstimate
from fwdlib.history import History
from fwdlib.objectives import BatchLoss, own_params
from fwdlib.tangents import Params
from fwdlib.trainer.checkpoint import Part, differences
from fwdlib.trainer.exchange import Exchange, mean_over_processes
from fwdlib.trainer.processes import ALONE, AlreadyReportedError, Processes, num_restarts, num_started
from fwdlib.trainer.session import TrainerSession
from fwdlib.training import train

T = TypeVar("T")
MEETING = "FWDLIB_MEETING"  # environment variable: the file in which the processes of start() meet
TIMEOUT = timedelta(minutes=2)  # for the slowest process to reach the same point; then it counts as hung
GRACE = 5.0  # seconds for the other processes to end when one has


class ProcessGroup(Processes):
    """The processes of torch.distributed's default group, see :func:`joined`."""

    def __init__(self, device: torch.device, store: dist.Store) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._store, self._num_made = store, 0
        self.exchange = Exchange(device)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross entropy over the shares of all processes, differentiable in forward mode only."""
        return mean_over_processes(F.cross_entropy(logits, targets), self.exchange)

    def share(self, rows: Tensor) -> Tensor:
        """Return every N-th row, beginning at this process's rank."""
        return rows[self.rank :: self.size]

    def each(self, part: Part) -> Part:
        """Return a part of a checkpoint that saves the state of every process's ``part``, and restores each."""
        return _Each(part, self)

    def check_alike(self, about: Mapping[str, str]) -> None:
        """Refuse to train together if the processes differ, also in their versions of torch and fwdlib.

        Raises:
            ValueError: in process 0, if two processes differ; the message says which, and in what.
            AlreadyReportedError: in the others.
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
            message = f"the {self.size} processes would not train the same thing: {differences(lines)}. Start all of "
            raise self.reported_once(ValueError(f"{message}them with the same command, code and data"))

    def settle(self, model: nn.Module) -> None:
        """Set the buffers of all processes to their mean, and compare the parameters, by a hash.

        Raises:
            RuntimeError: if the parameters differ, as they can if processors round differently.
        """
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.copy_(self.exchange.mean(buffer))
        prints = self._gather(fingerprint(*(p.double() for p in model.parameters())))  # numpy has no bfloat16
        if len(set(prints)) > 1:
            odd = [str(rank) for rank, found in enumerate(prints) if found != prints[0]]
            raise RuntimeError(
                f"the parameters of process {', '.join(odd)} are no longer those of process 0, so their exchange would "
                f"be meaningless. Processors of different kinds round differently: use machines of one kind"
            )

    def from_first(self, make: Callable[[], T]) -> T:
        """Return what ``make()`` returns in process 0.

        Raises:
            Exception: in process 0, what ``make`` raises.
            AlreadyReportedError: in the others, if ``make`` raises.
        """
        made: list[Any] = [None, None]
        problem: Exception | None = None
        if self.rank == 0:
            try:
                made[0] = make()
            except Exception as error:
                problem, made[1] = error, str(error)
        self._await_first()
        dist.broadcast_object_list(made, src=0)
        if problem:
            raise problem
        if made[1] is not None:
            raise AlreadyReportedError(made[1])
        return made[0]

    def _await_first(self) -> None:
        # Process 0 may download for longer than TIMEOUT, and is not hung.
        key, self._num_made = f"made {self._num_made}", self._num_made + 1
        if self.rank == 0:
            self._store.set(key, "")
        while not self._store.check([key]):
            time.sleep(0.05)

    def _gather(self, value: T) -> list[T]:
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found


class _Each:
    def __init__(self, part: Part, processes: ProcessGroup) -> None:
        self._part, self._processes = part, processes

    def state_dict(self) -> dict[str, Any]:
        return {"of each process": self._processes._gather(self._part.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._part.load_state_dict(state["of each process"][self._processes.rank])


def data_parallel(model: nn.Module, **options: Any) -> DistributedDataParallel:
    """Wrap a model whose gradients all processes average, while each keeps its own buffers."""
    with warnings.catch_warnings():  # renamed in torch 2.15; lower versions lack the new name
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True, **options)


class DataParallelGradient:
    """Backprop's gradient of the loss of all processes, by torch's DistributedDataParallel.

    Gradients are averaged and the logged loss is exchanged during the backward pass. Within a step each process keeps
    its own running statistics of BatchNorm, as with forward gradients.
    """

    def __init__(self) -> None:
        self._wrapped: DistributedDataParallel | None = None

    def __call__(self, objective: BatchLoss, params: Params) -> GradientEstimate:
        """Return the gradient of a model at its own parameters, ``params_of(model)``.

        Raises:
            ValueError: if ``params`` are other tensors.
        """
        model = objective.model
        own = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if own.keys() != params.keys() or own_params(own, params) is None:
            raise ValueError("DistributedDataParallel needs the model's own parameters: pass params_of(model)")
        if self._wrapped is None or self._wrapped.module is not model:
            self._wrapped = data_parallel(model)
        for p in own.values():
            p.grad = None
        with torch.enable_grad():
            loss = F.cross_entropy(self._wrapped(objective.inputs), objective.targets)
            mean = loss.detach() / dist.get_world_size()
            sent = dist.all_reduce(mean, async_op=True)
            loss.backward()
        sent.wait()
        return GradientEstimate(mean, {name: p.grad for name, p in own.items()}, mean.new_empty(0))


# --- starting and joining --------------------------------------------------------------------------------------------


@contextmanager
def joined(device: torch.device) -> Iterator[Processes]:
    """Join the processes that torchrun or :func:`start` has started, for the duration of a ``with`` block.

    A process that was started alone gets :data:`~fwdlib.trainer.processes.ALONE`.

    Args:
        device: where this process computes; CPUs use gloo, GPUs nccl.

    Raises:
        AlreadyReportedError: if another process has ended.
        TimeoutError: if another process hangs.
        RuntimeError: if anything else goes wrong in the block.
    """
    if num_started() == 1:
        yield ALONE
        return
    if MEETING not in os.environ:  # torchrun leaves its processes to themselves when it is killed
        end_with_parent()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    master = os.environ.get("MASTER_ADDR", "localhost")
    if socket.gethostbyname(master).startswith("127."):  # or gloo would listen on the address of the machine's name
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback())
    place = {"rank": int(os.environ["RANK"]), "world_size": num_started()}
    try:
        store, *_ = next(dist.rendezvous(os.environ.get(MEETING, "env://"), timeout=TIMEOUT, **place))
        # A new name after each restart: torchrun's store still has the addresses of the lost processes.
        store = dist.PrefixStore(f"start {num_restarts()}", store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, timeout=TIMEOUT, **place)
        yield ProcessGroup(device, store)
    except RuntimeError as error:
        if "Connection closed by peer" in str(error) or "Connection reset by peer" in str(error):
            raise AlreadyReportedError(f"another process was lost: {error}") from error
        if "timed out" in str(error).lower():
            raise TimeoutError(HUNG.format(num_started(), TIMEOUT.total_seconds())) from error
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


HUNG = (
    "one of the {} processes that train together has not answered for {:.0f} seconds: it hangs, or its machine is "
    "gone. The same command with --resume goes on from the last whole epoch"
)


def _loopback() -> str:
    return next(name for _, name in socket.if_nameindex() if name.startswith("lo"))


def start(count: int, function: Callable[..., None], *args: Any) -> None:
    """Call a function in several new processes on this machine, which can join each other by :func:`joined`.

    They meet in a file and talk over the loopback device, so no other machine can reach them. (torchrun's own server
    listens on all addresses.) Each uses one thread, unless ``OMP_NUM_THREADS`` says otherwise.

    Args:
        count: number of processes.
        function: must be picklable. If it calls ``sys.exit(code)`` with a code other than 0, the other processes end.
        args: its arguments, also picklable.

    Raises:
        ChildError: if a process ends with a code other than 0, or by a signal.
        ProcessRaisedException: if a process ends by another exception; the message has its traceback.
    """
    with tempfile.TemporaryDirectory(prefix="fwdlib-") as folder:
        given = (count, str(Path(folder, "meeting")), function, args)
        children = torch.multiprocessing.start_processes(_start, given, nprocs=count, join=False)
        # the ChildError below, or process 0, says why the others end
        logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
        processes, codes = children.processes, []
        try:
            while True:
                wait([process.sentinel for process in processes if process.exitcode is None])
                codes = [process.exitcode for process in processes]  # before join() ends the others
                if children.join(grace_period=GRACE):
                    return
        except torch.multiprocessing.ProcessExitedException as end:
            # prefer a rank killed by a signal over one that merely noticed
            killed = [rank for rank, code in enumerate(codes) if code is not None and code < 0]
            rank = (killed or [end.error_index])[0]
            raise ChildError(rank, processes[rank].exitcode) from None
        finally:  # after Ctrl-C some are still running
            for process in processes:
                process.terminate()
            for process in processes:
                process.join(GRACE)
                process.kill()  # one that hangs, or was stopped, ignores SIGTERM
                process.join()


class ChildError(RuntimeError):
    """A process of :func:`start` ended early, by a signal or by an error that it has reported itself."""

    def __init__(self, rank: int, code: int) -> None:
        how = f"code {code}" if code >= 0 else f"signal {-code}"
        super().__init__(f"process {rank} was ended by {how}, and with it the others")
        self.rank = rank
        self.code = code


def _start(rank: int, count: int, meeting: str, function: Callable[..., None], args: tuple) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ[MEETING] = Path(meeting).as_uri()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)

    def clean_up() -> None:
        if not multiprocessing.parent_process().is_alive():  # it was killed, so that it cannot remove its folder
            shutil.rmtree(Path(meeting).parent, ignore_errors=True)

    end_with_parent(clean_up)
    try:
        function(*args)
    finally:
        clean_up()


def train_together(
    count: int, build: Callable[[], nn.Module], data: Dataset, estimator: Estimator, **options: Any
) -> list[History]:
    """Train a model in several new processes on this machine, which share each batch.

    Args:
        count: number of processes.
        build: makes the model. Like the estimator, it must be importable, or a ``functools.partial`` of importable
            things: the processes do not know the cells of a notebook.
        data: the data set.
        estimator: see :func:`fwdlib.training.train`.
        options: other arguments of ``train``.

    Returns:
        The history of each process. All are equal, apart from the times.

    Raises:
        ChildError: as :func:`start`.
    """
    with tempfile.TemporaryDirectory(prefix="fwdlib-") as folder:
        start(count, _train, folder, build, data, estimator, options)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _train(folder: str, build: Callable, data: Dataset, estimator: Estimator, options: dict[str, Any]) -> None:
    with joined(torch.device(options.get("device", "cpu"))) as processes:
        history = train(build, data, estimator, session=TrainerSession(processes=processes), **options)
        torch.save(history, Path(folder) / f"{processes.rank}.pt")
