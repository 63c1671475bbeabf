"""Processes that share each batch: real ones, started by start() or torchrun, on the loopback device."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

from fwdlib.bench import links
from fwdlib.data import Dataset
from fwdlib.estimators import backprop_gradient, forward_gradient
from fwdlib.models import initialise
from fwdlib.objectives import BatchLoss, params_of
from fwdlib.trainer import distributed, experiment
from fwdlib.trainer.processes import ALONE, AlreadyReportedError
from fwdlib.trainer.session import TrainerSession
from fwdlib.trainer.settings import Settings
from fwdlib.training import train

pytestmark = pytest.mark.slow  # starts processes

CPU = torch.device("cpu")
NUM_STEPS = 200
NUM_TANGENTS = 16
MOST_BYTES = 1000  # in a step, at 16 tangents
ESTIMATORS = {
    "rank-one": partial(forward_gradient, num_tangents=NUM_TANGENTS),
    "normal": partial(forward_gradient, num_tangents=4, tangents="normal"),
    "backprop": backprop_gradient,
}


def build(width: int = 32) -> nn.Module:
    return nn.Sequential(nn.Linear(20, width), nn.Tanh(), nn.Linear(width, 3))


def with_batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))


def dataset(num_train: int = 160) -> Dataset:
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(num_train + 40, 20, generator=draw)
    targets = (inputs @ torch.randn(20, 3, generator=draw)).argmax(1)
    return Dataset(inputs[:-40], targets[:-40], inputs[-40:], targets[-40:], ["a", "b", "c"], None)


def trained(processes, name, make=build, **options):
    estimator = ESTIMATORS[name]
    if name == "backprop" and processes.size > 1:
        estimator = distributed.DataParallelGradient()
    usual = {"optimizer": "Adam", "learning_rate": 1e-3, "batch_size": 32, "max_iterations": NUM_STEPS}
    usual |= {"evaluate_every": 50, "progress": None, "session": TrainerSession(processes=processes)}
    return train(make, dataset(), estimator, **usual | options)


# --- what the processes do: all that is asked of a group of one size, in one go ---------------------------------------


def work(folder: Path) -> None:
    """Try everything, and leave what came out in a file for each process."""
    torch.set_num_threads(1)
    with distributed.joined(CPU) as processes:
        found = {"exchange": exchanged(processes)}
        for name in ESTIMATORS:
            history = trained(processes, name)
            found[name] = {"params": history.params[0], "run": vars(history.runs[0])}
        (run,) = trained(processes, "rank-one", batch_size=None, max_iterations=20).runs
        found["whole training part"] = run.train_loss
        found["BatchNorm"] = settled(processes)
        found["bytes"] = {(name, width): sent(processes, name, width) for name, width in BYTES}
        found["refusals"] = {name: refused(processes, **options) for name, options in DIFFERENT.items()}
        found["drift"] = drifted(processes)
        found["activity"] = refused_tangents(processes)
        found["listening"] = listening()
        torch.save(found, folder / f"{processes.size}-{processes.rank}.pt")


def exchanged(processes) -> dict:
    draw = torch.Generator().manual_seed(processes.rank)
    mine = torch.randn(5, 7, generator=draw)
    return {"mine": mine, "mean": processes.exchange.mean(mine), "scalar": processes.exchange.mean(mine[0, 0])}


def settled(processes) -> dict:
    model = initialise(with_batch_norm, 0)
    model[1].running_mean += processes.rank
    processes.settle(model)
    history = trained(processes, "rank-one", with_batch_norm, max_iterations=20, evaluate_every=10)
    return {"mean": model[1].running_mean, "run": history.runs[0]}


BYTES = [("rank-one", 32), ("rank-one", 4096), ("backprop", 4096)]


def sent(processes, name: str, width: int) -> float:
    """Count the bytes of a step: those of many steps less those of few, so that evaluations are not in it."""

    def of(num_steps: int) -> int:
        start = links.traffic()
        trained(processes, name, partial(build, width), max_iterations=num_steps, evaluate_every=1000)
        return links.traffic().since(start).num_bytes

    few, many = of(10), of(40)
    return (many - few) / 30


DIFFERENT = {
    "model": {"make": [build, partial(build, 33)]},
    "seed": {"seeds": [(0,), (1,)]},
    "data": {"num_train": [160, 128]},
    "learning rate": {"learning_rate": [1e-3, 2e-3]},
    "number of tangents": {"settings": [{"num_tangents": 1}, {"num_tangents": 2}]},
}


def refused(processes, **options) -> tuple[str, str]:
    chosen = {name: values[processes.rank == processes.size - 1] for name, values in options.items()}
    data, make = dataset(chosen.pop("num_train", 160)), chosen.pop("make", build)
    given = {"optimizer": "SGD", "learning_rate": 1e-3, "batch_size": 32, "max_iterations": 1, "progress": None}
    session = TrainerSession(settings=chosen.pop("settings", None), processes=processes)
    try:
        train(make, data, forward_gradient, session=session, **given | chosen)
    except (ValueError, AlreadyReportedError) as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def drifted(processes) -> str:
    model = initialise(build, 0)
    with torch.no_grad():
        model[0].weight += 1e-7 * processes.rank
    try:
        processes.settle(model)
    except RuntimeError as error:
        return str(error)
    return ""


def refused_tangents(processes) -> str:
    data, model = dataset(), build()
    objective = BatchLoss(model, data.train_inputs, data.train_targets, processes.loss)
    try:
        forward_gradient(objective, params_of(model), tangents="activity")
    except NotImplementedError as error:
        return str(error)
    return ""


def listening() -> list[str]:
    connections = psutil.Process().net_connections("inet")
    return [connection.laddr.ip for connection in connections if connection.status == psutil.CONN_LISTEN]


@pytest.fixture(scope="module", params=[2, 4])
def found(request, tmp_path_factory):
    """What each of 2 or 4 processes found, in the order of their ranks."""
    folder = tmp_path_factory.mktemp("processes")
    distributed.start(request.param, work, folder)
    return [torch.load(folder / f"{request.param}-{rank}.pt", weights_only=False) for rank in range(request.param)]


# --- tests -----------------------------------------------------------------------------------------------------------


def test_the_mean_is_that_of_all_and_the_same_to_the_bit(found):
    mean = torch.stack([each["exchange"]["mine"] for each in found]).mean(0)
    for each in found:
        torch.testing.assert_close(each["exchange"]["mean"], mean)
        assert torch.equal(each["exchange"]["mean"], found[0]["exchange"]["mean"])
        assert each["exchange"]["scalar"].shape == ()
        torch.testing.assert_close(each["exchange"]["scalar"], mean[0, 0])


@pytest.mark.parametrize("name", ESTIMATORS)
def test_parameters_are_those_of_one_process_on_the_whole_batch_and_equal_on_all(found, name):
    alone = trained(ALONE, name)
    for each in found:
        assert all(torch.equal(p, found[0][name]["params"][key]) for key, p in each[name]["params"].items())
    for key, p in alone.params[0].items():
        assert (found[0][name]["params"][key] - p).norm() <= 1e-5 * p.norm()
    assert found[-1][name]["run"]["train_loss"] == found[0][name]["run"]["train_loss"]
    assert found[0][name]["run"]["train_loss"] == pytest.approx(alone.runs[0].train_loss, rel=1e-5)
    assert found[0][name]["run"]["test_errors"] == alone.runs[0].test_errors


def test_the_whole_training_part_is_shared_as_a_batch_is(found):
    (alone,) = trained(ALONE, "rank-one", batch_size=None, max_iterations=20).runs
    assert found[0]["whole training part"] == pytest.approx(alone.train_loss, rel=1e-5)


def test_running_statistics_are_averaged_and_masks_of_dropout_are_each_processes_own(found):
    for each in found:
        assert torch.equal(each["BatchNorm"]["mean"], torch.full((16,), (len(found) - 1) / 2))
        assert each["BatchNorm"]["run"].test_loss == found[0]["BatchNorm"]["run"].test_loss
    (alone,) = trained(ALONE, "rank-one", with_batch_norm, max_iterations=20, evaluate_every=10).runs
    assert found[0]["BatchNorm"]["run"].train_loss != pytest.approx(alone.train_loss, rel=1e-5)  # other masks


def test_a_step_sends_scalars_whatever_the_number_of_parameters_and_backprop_sends_them_all(found):
    num_params = sum(p.numel() for p in build(4096).parameters())
    for each in found:
        small, large, backprop = (each["bytes"][key] for key in BYTES)
        assert 4 * (1 + NUM_TANGENTS) <= small <= MOST_BYTES
        assert 4 * (1 + NUM_TANGENTS) <= large <= MOST_BYTES
        assert backprop >= 4 * num_params


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model", ["the shape of 0.weight is (32, 20) in 0", "(33, 20) in"]),
        ("seed", ["seed is 0 in 0", "1 in"]),
        ("data", ["the number of training images is 160 in 0", "128 in"]),
        ("learning rate", ["lr is 0.001 in 0", "0.002 in"]),
        ("number of tangents", ["num_tangents is 1 in 0", "2 in"]),
    ],
)
def test_processes_that_differ_are_refused_with_what_differs(found, name, words):
    kinds = [each["refusals"][name][0] for each in found]
    assert kinds == ["ValueError"] + ["AlreadyReportedError"] * (len(found) - 1)
    assert all(word in found[0]["refusals"][name][1] for word in [*words, "Start all of them with the same command"])


def test_parameters_that_have_drifted_apart_are_noticed(found):
    assert all("are no longer those of process 0" in each["drift"] for each in found)


def test_tangents_that_belong_to_examples_are_refused(found):
    assert all("cannot be shared among processes" in each["activity"] for each in found)


def test_nothing_listens_but_on_the_loopback_device(found):
    addresses = [address for each in found for address in each["listening"]]
    assert addresses
    assert all(address.startswith("127.") or address == "::1" for address in addresses)


def test_a_batch_must_fall_into_equal_shares():
    three = type(ALONE)()
    three.size = 3
    with pytest.raises(ValueError, match="batch_size 32 must be a multiple of the 3 processes"):
        trained(three, "rank-one")
    with pytest.raises(ValueError, match="the batch of all 160 examples must be a multiple"):
        trained(three, "rank-one", batch_size=None)


def test_backprop_in_parallel_wants_the_models_own_parameters():
    data, model = dataset(), build()
    copies = {name: p.clone() for name, p in params_of(model).items()}
    with pytest.raises(ValueError, match="the model's own parameters"):
        distributed.DataParallelGradient()(BatchLoss(model, data.train_inputs, data.train_targets), copies)


def fail(where: int) -> None:
    rank = int(os.environ["RANK"])
    if rank == where:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def test_a_lost_process_ends_the_others():
    start = time.monotonic()
    with pytest.raises(distributed.ChildError, match="process 1 was ended by signal 9") as caught:
        distributed.start(2, fail, 1)
    assert (caught.value.rank, caught.value.code) == (1, -signal.SIGKILL)
    assert time.monotonic() - start < 45


def hang(where: int, folder: str) -> None:
    distributed.TIMEOUT = timedelta(seconds=4)
    try:
        with distributed.joined(CPU) as processes:
            if processes.rank == where:
                os.kill(os.getpid(), signal.SIGSTOP)
            processes.exchange.mean(torch.zeros(1))
    except TimeoutError as error:
        (Path(folder) / "said").write_text(str(error))
        sys.exit(1)


@pytest.mark.parametrize("where", [0, 1])
def test_a_process_that_hangs_ends_the_others_with_words(tmp_path, where):
    start = time.monotonic()
    with pytest.raises(distributed.ChildError) as caught:
        distributed.start(2, hang, where, str(tmp_path))
    assert (caught.value.rank, caught.value.code) == (1 - where, 1)
    assert time.monotonic() - start < 45
    said = (tmp_path / "said").read_text()
    assert "one of the 2 processes that train together has not answered for 4 seconds: it hangs" in said
    assert "--resume" in said


def slow_first(folder: str) -> None:
    distributed.TIMEOUT = timedelta(seconds=2)
    with distributed.joined(CPU) as processes:
        found = processes.from_first(lambda: time.sleep(6) or "downloaded")
        (Path(folder) / str(processes.rank)).write_text(found)


def test_a_long_download_is_no_hanging_process(tmp_path):
    distributed.start(2, slow_first, str(tmp_path))
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["downloaded"] * 2


# --- the command -----------------------------------------------------------------------------------------------------

TRAIN = ["-m", "fwdlib", "train", "--dataset", "digits", "--n-layers", "1", "--log-interval", "1", "--lr", "1e-3"]
SMALL = [*TRAIN, "--train-mode", "FG-RANK1", "--num-tangents", "4", "--batch-size", "128"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "FWDLIB_OFFLINE": "1"}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)["model"]


def epochs_of(folder: Path) -> int:
    log = folder / "log.csv"
    return len(log.read_text().splitlines()) - 1 if log.exists() else 0


def test_torchrun_goes_on_after_a_killed_process_and_ends_with_the_same_weights(tmp_path):
    command = [*SMALL, "--epochs", "12", "--log-dir"]
    undisturbed = [sys.executable, *command, str(tmp_path / "undisturbed"), "--processes", "2"]
    said = subprocess.run(undisturbed, env=ENVIRONMENT, check=True, capture_output=True, text=True, timeout=120).stderr
    assert "Warning" not in said
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "2"]
    folder = tmp_path / "killed"
    process = subprocess.Popen(
        [*torchrun, *command, str(folder)], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        deadline = time.monotonic() + 120
        while epochs_of(folder) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert 3 <= epochs_of(folder) < 12
        victim = max(psutil.Process(process.pid).children(), key=lambda child: child.pid)
        victim.kill()
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, output
    assert "Signal 9" in output or "SIGKILL" in output or "exitcode: -9" in output, output
    assert epochs_of(folder) == 12
    expected = weights(tmp_path / "undisturbed")
    assert all(torch.equal(p, expected[name]) for name, p in weights(folder).items())
    rows = [(each / "log.csv").read_text().splitlines() for each in (folder, tmp_path / "undisturbed")]
    assert [row.split(",")[:4] for row in rows[0]] == [row.split(",")[:4] for row in rows[1]]  # all but the times

    # torchrun restarts processes that refuse, too: that is no leave to resume
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    refused = subprocess.run([*torchrun, *command, str(folder)], env=ENVIRONMENT, capture_output=True, text=True)
    assert refused.returncode != 0
    assert "add --resume" in refused.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files

    again = [sys.executable, *command, str(folder), "--processes", "4", "--resume"]
    ended = subprocess.run(again, env=ENVIRONMENT, check=False, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert ended.stderr.count("the number of processes is 2 there, 4 here") == 1  # said once, not by each


def test_rules_that_need_the_examples_of_all_are_refused_before_anything_starts():
    with pytest.raises(ValueError, match="by BP, FG, FG-RANK1 only, not by FDFA"):
        Settings(train_mode="FDFA", processes=2)


def test_alone_nothing_of_torch_distributed_is_joined(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with experiment.together(Settings(train_mode="FDFA"), CPU) as processes:
        assert processes is ALONE
