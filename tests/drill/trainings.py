"""Faults of ``train``: killed, resumed, started twice, and with torchrun."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import torch

from tests.drill.harness import Trial, contents, differing, item
from tests.same import assert_same_training

MODES = ("BP", "FG-RANK1", "FG-CV", "FDFA")
WORDS = ("--dataset", "digits", "--n-layers", "1", "--batch-size", "256", "--lr", "1e-3", "--log-interval", "1")
TRAIN = ("-m", "fwdlib", "train", *WORDS)
SHARED = (*TRAIN, "--train-mode", "FG-RANK1")
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "2")
LAUNCHERS = {"torchrun": (*TORCHRUN, *SHARED), "train": (*SHARED, "--processes", "2")}


def epochs_in(folder: Path) -> int:
    """Return how many epochs the log of a training has, -1 without a log."""
    log = folder / "log.csv"
    return len(log.read_text().splitlines()) - 1 if log.exists() else -1


@item(
    "whole",
    "A training that is killed at any moment and resumed ends with the same weights, optimizer, random states and log "
    "as one that was not, bit for bit.",
    short=True,
)
def training_killed(trial: Trial) -> str:
    """SIGKILL `train` six times at random moments, in BP, FG-RANK1, FG-CV and FDFA, and `--resume`."""
    moments = []
    for mode in [trial.moments.choice(MODES)] if trial.short else MODES:
        whole, killed = trial.folder / f"{mode}-whole", trial.folder / f"{mode}-killed"
        command = (*TRAIN, "--train-mode", mode, "--epochs", "6", "--log-dir")
        beside = trial.start(*command, whole)
        for first in (0, 2)[: 1 + MODES.index(mode) % 2]:
            epoch = first + trial.moments.randrange(2)
            process = trial.start(*command, killed, "--resume")
            trial.until(lambda killed=killed, epoch=epoch: epochs_in(killed) >= epoch)
            trial.pause(0, 0.3)
            trial.end(process, signal.SIGKILL)
            moments.append(f"{mode} {epochs_in(killed)}")
        trial.run(*command, killed, "--resume")
        assert trial.end(beside).code == 0
        assert_same_training(killed, whole)
    return f"bit-identical; killed after these epochs: {', '.join(moments)}"


@item(
    "ends",
    "No process outlives the `train --processes` or torchrun that started it, however that ends.",
    short=True,
)
def launcher_killed(trial: Trial) -> str:
    """End torchrun, and `train --processes 2`, by SIGKILL and SIGTERM, while their processes train."""
    told, ways = [], [(launcher, sent) for launcher in LAUNCHERS for sent in (signal.SIGKILL, signal.SIGTERM)]
    for launcher, sent in [trial.moments.choice(ways)] if trial.short else ways:
        folder = trial.folder / f"{launcher} {sent.name}"
        process = trial.start(*LAUNCHERS[launcher], "--epochs", "500", "--log-dir", folder)
        trial.until(lambda folder=folder: epochs_in(folder) >= 1)
        trial.pause(0, 1)
        trial.end(process, sent)
        told.append(f"{launcher}, {sent.name}: {trial.all_end(10):.1f} s")
        trial.give_up(folder)
    return f"all ended; {', '.join(told)}"


@item(
    "whole",
    "Under torchrun, a training that loses a process goes on from its last whole epoch, to the same weights.",
)
def rank_killed(trial: Trial) -> str:
    """SIGKILL one of two processes under `torchrun --max-restarts 2`, at a random moment."""
    command = (*SHARED, "--epochs", "8", "--log-dir")
    whole, killed = trial.folder / "whole", trial.folder / "killed"
    beside = trial.start(*command, whole, "--processes", "2")
    process = trial.start(*TORCHRUN, *command, killed)
    trial.until(lambda: epochs_in(killed) >= 1)
    trial.pause(0, 0.5)
    ranks = [each for each in psutil.Process(process.pid).children() if "-m" in each.cmdline()]
    trial.moments.choice(sorted(ranks, key=lambda rank: rank.pid)).kill()
    ended = trial.end(process)
    assert ended.code == 0, ended.said[-800:]
    assert "exitcode: -9" in ended.said or "Signal 9" in ended.said or "SIGKILL" in ended.said, "nobody was killed"
    assert trial.end(beside).code == 0
    assert_same_training(killed, whole)
    return "restarted; bit-identical"


@item("said", "A restart by torchrun is no leave to resume: it goes on only with what its own launch has begun.")
def torchrun_on_finished_folder(trial: Trial) -> str:
    """Start `torchrun --max-restarts 2` without `--resume` on the folder of a finished training."""
    folder = trial.folder / "finished"
    trial.run(*SHARED, "--epochs", "1", "--log-dir", folder)
    before = contents(folder)
    ended = trial.end(trial.start(*TORCHRUN, *SHARED, "--epochs", "1", "--log-dir", folder))
    assert ended.code != 0, "it resumed"
    assert "add --resume" in ended.said, ended.said[-800:]
    assert differing(before, contents(folder)) == []
    return "refused; the files are as they were"


@item(
    "locked",
    "One training writes to a folder. A second one is told who has it and since when; a dead process holds nothing.",
    short=True,
)
def two_trainings(trial: Trial) -> str:
    """Start a second `train` on the same folder, then SIGKILL the first and `--resume`."""
    folder = trial.folder / "shared"
    first = trial.start(*TRAIN, "--train-mode", "BP", "--epochs", "500", "--log-dir", folder)
    trial.until(lambda: epochs_in(folder) >= 1)
    second = trial.run(*TRAIN, "--train-mode", "BP", "--epochs", "1", "--log-dir", folder, "--resume", code=1)
    assert f"in use by process {first.pid} on" in second.said, second.said
    assert "since" in second.said
    assert trial.end(first, signal.SIGKILL).code == -signal.SIGKILL, "the first was disturbed"
    epochs = epochs_in(folder) + 1
    trial.run(*TRAIN, "--train-mode", "BP", "--epochs", epochs, "--log-dir", folder, "--resume")
    assert epochs_in(folder) == epochs
    return "the second was refused with the first's number; the resumed one went on"


class Code:
    """Something that makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@item("executed", "Reading a checkpoint executes nothing: one that contains code is refused.", short=True)
def checkpoint_with_code(trial: Trial) -> str:
    """Put code into a checkpoint, and `--resume`."""
    folder, sign = trial.folder / "log", trial.folder / "executed"
    folder.mkdir()
    torch.save({"format": 1, "about": Code(sign)}, folder / "checkpoint.pt")
    before = contents(folder)
    said = trial.run(*TRAIN, "--epochs", "1", "--log-dir", folder, "--resume", code=1).said
    assert not sign.exists(), "the code was executed"
    assert "checkpoint.pt is damaged, or not a checkpoint" in said, said
    assert differing(before, contents(folder)) in ([], [".fwdlib-lock"])
    return "refused; nothing was executed"


@item("listens", "`train --processes` listens on the loopback device alone. (torchrun listens on all addresses.)")
def training_listens(trial: Trial) -> str:
    """Look at all sockets of `train --processes 2`."""
    folder = trial.folder / "log"
    process = trial.start(*SHARED, "--epochs", "500", "--log-dir", folder, "--processes", "2")
    trial.until(lambda: epochs_in(folder) >= 1)
    addresses = {link.laddr.ip for each in trial.processes() for link in each.net_connections() if not link.raddr}
    trial.end(process, signal.SIGINT)
    trial.all_end(10)
    trial.give_up(folder)
    assert addresses, "no socket was found"
    assert all(address.startswith("127.") or address == "::1" for address in addresses), addresses
    return f"it listens at {', '.join(sorted(addresses))}"


# Time runs backwards by an hour, once, in the middle.
BACK = """\
import sys, time
real, begun = time.time, time.monotonic()
time.time = lambda: real() - 3600 * (time.monotonic() - begun > 2)
from fwdlib import cli
sys.exit(cli.main(sys.argv[1:]))"""


@item("whole", "No result depends on the clock: files from the future and a clock that is set back change nothing.")
def clock_set_back_in_training(trial: Trial) -> str:
    """Set the clock back an hour while `train` runs, kill it, date its files a day ahead, and `--resume`."""
    killed, whole = trial.folder / "killed", trial.folder / "whole"
    command = (*TRAIN[2:], "--train-mode", "BP", "--epochs", "6", "--log-dir")
    process = trial.start("-c", BACK, *command, killed)
    trial.until(lambda: epochs_in(killed) >= 2)
    trial.end(process, signal.SIGKILL)
    date_ahead(killed)
    trial.run("-c", BACK, *command, killed, "--resume")
    trial.run("-m", "fwdlib", *command, whole)
    assert_same_training(killed, whole)
    return "bit-identical"


def date_ahead(folder: Path) -> None:
    """Date all files of a folder a day ahead."""
    tomorrow = time.time() + 86400
    for path in folder.rglob("*"):
        os.utime(path, (tomorrow, tomorrow))
