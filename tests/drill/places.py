"""Faults of places: full and read-only disks, and folders that belong to somebody else."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from tests.drill.batches import RUN, tiny, unshared
from tests.drill.harness import Ended, Skipped, Trial, contents, differing, item
from tests.drill.reports import REPORT, drawing
from tests.drill.sources import COMMAND, PUBLISHED, host, published
from tests.drill.trainings import TRAIN
from tests.notebook_files import write_notebook

# $0 is the folder, $1 the options of its file system, which ends with this process; "$0.before" is copied into it, and
# what it holds in the end to "$0.after".
DISK = """\
mount -t tmpfs -o "$1" none "$0" && cp -a "$0.before/." "$0" && mount -o "remount,$2,$1" "$0" && shift 2 && "$@"
code=$?; cp -a "$0/." "$0.after"; exit $code"""
LIMIT = 'ulimit -f "$1"; shift; cp -a "$0.before/." "$0"; "$@"; code=$?; cp -a "$0/." "$0.after"; exit $code'


def on_disk(trial: Trial, folder: Path, *words: object, kilobytes: int = 0, **changes: str | None) -> Ended:
    """Run ``python WORDS`` with a folder on a disk of its own: small, or else read-only. Nothing stays mounted.

    Where that is not permitted, a small disk is a limit on the size of files, and a read-only one a place below a file.
    """
    for each in (folder, folder.with_name(f"{folder.name}.before"), folder.with_name(f"{folder.name}.after")):
        each.mkdir(parents=True, exist_ok=True)
    try:
        options = (f"size={kilobytes}k", "rw") if kilobytes else ("size=4m", "ro")
        before = (*unshared("--mount"), "sh", "-c", DISK, folder, *options)
    except Skipped:
        if not kilobytes:
            raise
        before = ("sh", "-c", LIMIT, folder, str(2 * kilobytes // 3))
    return trial.run(*words, code=1, before=before, **changes)


@item(
    "whole",
    "On a full disk the files of before are intact, no half file is left, and the message names the file and the way "
    "out.",
    short=True,
)
def disk_full(trial: Trial) -> str:
    """Run `train --resume`, `run` and a build on a disk that is too small for what they write."""
    folder = trial.folder / "train"
    words = (*TRAIN, "--train-mode", "BP", "--log-dir", folder)
    trial.run(*words, "--epochs", "1")
    size = (folder / "checkpoint.pt").stat().st_size // 1024
    before = contents(folder.rename(trial.folder / "train.before"))
    said = on_disk(trial, folder, *words, "--epochs", "2", "--resume", kilobytes=size * 3 // 2).said
    assert f"could not write {folder / 'checkpoint.pt'}: " in said, said
    assert "free some space" in said, said
    assert differing(before, contents(trial.folder / "train.after")) in ([], [".fwdlib-lock-holder.txt"])
    big = write_notebook(
        trial.folder / "big.ipynb",
        "seed = 0",
        "import os\nfrom pathlib import Path\n(Path(os.environ['FWDLIB_RESULTS']) / 'a').write_bytes(bytes(10**7))",
    )
    said = on_disk(trial, trial.folder / "run", *RUN, big, "--output", trial.folder / "run", kilobytes=2000).said
    assert f"{trial.folder / 'run'}" in said, said
    assert "No space left" in said, said
    page = trial.folder / "page"
    command = drawing(trial, page)
    trial.run(*command)
    before = contents(page.rename(trial.folder / "page.before"))
    kept = sum(len(content) for _, content in before.values()) // 1024
    said = on_disk(trial, page, *command, kilobytes=kept + 500).said
    assert "No report was made" in said, said
    left = differing(before, contents(trial.folder / "page.after"))
    assert [name for name in left if not name.startswith(".report-build")] == [], left
    return "three messages; the checkpoint, the results and the pages of before are intact"


@item("said", "A command that cannot write where it is told to says so before it works for minutes.")
def read_only(trial: Trial) -> str:
    """Name a read-only folder to `train`, `run`, a build, report.evidence, `bench` and `data fetch`."""
    at, told = trial.folder / "locked", []
    drawn, fetched = drawing(trial, trial.folder / "page"), ("-c", PUBLISHED + COMMAND, "data", "fetch", "KMNIST")
    with host(trial, "serves") as net:
        ways = {
            "train": ((*TRAIN, "--epochs", "50", "--log-dir", at / "log"), {}),
            "run": ((*RUN, tiny(trial), "--output", at / "out"), {}),
            "report": ((*drawn[:3], "--output", at / "page", *drawn[5:]), {}),
            "evidence": (("-m", "report.evidence", at / "evidence"), {}),
            "bench": (("-m", "fwdlib", "bench", "--quick", "--out", at / "bench.json"), {}),
            "data fetch": (fetched, published(trial) | net | {"FWDLIB_CACHE": str(at / "cache")}),
        }
        for name, (words, changes) in ways.items():
            begun = time.monotonic()
            said = on_disk(trial, at, *words, **changes).said
            assert str(at) in said, f"{name} does not name the place: {said[-300:]}"
            assert "Read-only" in said, f"{name} does not say why: {said[-300:]}"
            assert time.monotonic() - begun < 20, f"{name} took {time.monotonic() - begun:.0f} s"
            told.append(f"{name} {time.monotonic() - begun:.0f} s")
            assert contents(at) == {}
    return f"refused by name: {', '.join(told)}"


# What a stranger may have: the very names that our commands use among them.
STRANGERS = (
    *("notes.txt", ".hidden/key", ".movie.part", "index.html", "report.html", "figures/mine.svg", "results/mine.json"),
    *("results/1a_logistic_backprop.json", "executed/tiny.ipynb", "executed/tiny.json", "table.csv", "log.csv"),
    *("record.json", "curves.png", "descent.json", "bench-cpu.json", "cache/KMNIST/raw/mine.gz"),
)


@item(
    "yours",
    "A command changes no file that the project has not made: a folder of somebody else stays as it is, byte for byte, "
    "also where its files have the names of ours.",
    short=True,
)
def strangers_folder(trial: Trial) -> str:
    """Name a folder full of somebody else's files to every command with an `--output`, `--out` or `--log-dir`."""
    mine, notebook = trial.folder / "mine", tiny(trial)
    for name in STRANGERS:
        (mine / name).parent.mkdir(parents=True, exist_ok=True)
        (mine / name).write_text(f"my own {name}")
    before = contents(mine)
    drawn = drawing(trial, trial.folder / "page")
    ways = {
        "train": (*TRAIN, "--epochs", "1", "--log-dir", mine),
        "train --resume": (*TRAIN, "--epochs", "1", "--resume", "--log-dir", mine),
        "train --dry-run": (*TRAIN, "--dry-run", "--log-dir", mine),
        "run": (*RUN, notebook, "--output", mine),
        "run --no-resume": (*RUN, notebook, "--no-resume", "--output", mine),
        "report": (*REPORT, "--output", mine),
        "report --only-render": (*drawn[:3], "--output", mine, *drawn[5:]),
        "evidence": ("-m", "report.evidence", mine),
        "bench": ("-m", "fwdlib", "bench", "--quick", "--out", mine / "bench-cpu.json"),
        "study": ("-m", "report.studies.descent", "--short", "--folder", mine),
        "data fetch": ("-m", "fwdlib", "data", "fetch", "KMNIST"),
    }
    if trial.short:
        ways = {name: ways[name] for name in ("train", "run", "report --only-render")}
    codes = {}
    for name, words in ways.items():
        cache = {"FWDLIB_CACHE": str(mine / "cache")} if name == "data fetch" else {}
        codes[name] = trial.run(*words, code=None, **cache).code
        changed = [path for path in differing(before, contents(mine)) if path in before]
        assert changed == [], f"{name} has changed {', '.join(changed)}"
        added = differing(before, contents(mine))
        assert codes[name] == 0 or added == [], f"{name} was refused and has added {', '.join(added)}"
    shutil.rmtree(mine)
    return f"not a byte has changed; exit codes: {', '.join(f'{name} {code}' for name, code in codes.items())}"
