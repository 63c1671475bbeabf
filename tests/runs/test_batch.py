"""Batches of notebooks. Kernels are slow to start, so the tests share three batches and fake the rest."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from fwdlib import data
from fwdlib.locks import held
from fwdlib.runs import places, stamps
from fwdlib.runs.batch import run_batch
from fwdlib.runs.jobs import Job, Outcome, failures
from tests import notebook_files
from tests.processes import wait_until

pytestmark = pytest.mark.slow  # starts processes

WRITER = """\
import json, os, sys
from pathlib import Path
import torch
folder = Path(os.environ["FWDLIB_RESULTS"])
values = [learning_rate, steps, flag, dataset]
seen = {
    "parameters": values,
    "types": [type(value).__name__ for value in values],
    "threads": torch.get_num_threads(),
    "here": os.listdir(),
    "hash_seed": os.environ["PYTHONHASHSEED"],
    "python": sys.executable,
    "data": os.environ.get("FWDLIB_DATA"),
}
(folder / "deep").mkdir()
(folder / "deep" / "extra.txt").write_text("extra")
(folder / "seen.json").write_text(json.dumps(seen))
Path("litter.txt").write_text("")
print("saved", folder / "seen.json")
def draw():
    from fwdlib import plotting"""
DEFAULTS = 'learning_rate = 0.1\nsteps: int = 3  # of the optimizer\nflag = False\ndataset = "digits"'
LOCAL_JOB = places.LocalJob  # before a test puts another in its place
ONE_FILE = "import os\nfrom pathlib import Path\n(Path(os.environ['FWDLIB_RESULTS']) / {name!r}).write_text('one')"


def write_notebook(path: Path, *sources: str) -> Path:
    # The author's kernel has another name, as it does in practice.
    kernel = {"name": "my-env", "display_name": "Mine", "language": "python"}
    notebook = nbformat.read(notebook_files.write_notebook(path, DEFAULTS, *sources, kernel=kernel), 4)
    notebook.cells.insert(0, nbformat.v4.new_markdown_cell("# Title"))
    nbformat.write(notebook, path)
    return path


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def outputs_of(notebook: Path) -> list[dict]:
    return [output for cell in nbformat.read(notebook, 4).cells for output in cell.get("outputs", [])]


def processes_of(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(str(folder) in word for word in process.info["cmdline"] or []):
            found.append(process)
    return found


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """One batch, two at a time, of a success, a failure, a notebook without results and one that steals a result."""
    folder = tmp_path_factory.mktemp("first")
    writer = write_notebook(folder / "writer.ipynb", WRITER)
    broken = "# the reason\nraise ValueError('\\x1b[31mno\\x1b[0m luck')"
    failing = write_notebook(folder / "failing.ipynb", ONE_FILE.format(name="bad.json"), broken, "print('never')")
    silent = write_notebook(folder / "silent.ipynb", "1 + 1")
    parameters = {"learning_rate": 1e-3, "steps": 7, "flag": True, "dataset": "a 'b'"}
    thief = write_notebook(folder / "thief.ipynb", ONE_FILE.format(name="seen.json"))
    jobs = [Job(writer, parameters), Job(failing), Job(silent), Job(thief)]
    (folder / "data").mkdir()
    shutil.copytree(stamps.PACKAGE, folder / "fwdlib")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(stamps, "PACKAGE", folder / "fwdlib")  # so that nobody edits it meanwhile
        patch.setenv("FWDLIB_DATA", "data")
        patch.setattr(sys, "stderr", Terminal())
        outcomes = run_batch(jobs, results=folder / "results", executed=folder / "executed")
        screen = sys.stderr.getvalue()
    return folder, dict(zip(("writer", "failing", "silent", "thief"), outcomes, strict=True)), screen


def test_a_success_moves_its_results_and_stamps_them_last(first):
    folder, outcomes, _ = first
    outcome = outcomes["writer"]
    assert (outcome.status, outcome.error) == ("done", "")
    assert outcome.seconds > 0.5
    assert outcome.executed == folder / "executed" / "writer.ipynb"
    assert set(outcome.results) == {folder / "results" / "seen.json", folder / "results" / "deep" / "extra.txt"}
    stamp = json.loads((folder / "executed" / "writer.json").read_text())
    assert stamp["results"].keys() == {"seen.json", "deep/extra.txt"}
    assert all(re.fullmatch("[0-9a-f]{64}", text) for text in [stamp["fingerprint"], *stamp["results"].values()])


def test_parameters_arrive_with_their_types(first):
    seen = json.loads((first[0] / "results" / "seen.json").read_text())
    assert seen["parameters"] == [1e-3, 7, True, "a 'b'"]
    assert seen["types"] == ["float", "int", "bool", "str"]


def test_the_kernel_has_one_thread_this_python_an_empty_folder_and_whole_paths(first):
    seen = json.loads((first[0] / "results" / "seen.json").read_text())
    assert seen["threads"] == 1
    assert seen["here"] == []
    assert seen["hash_seed"] == "0"
    assert Path(seen["python"]).samefile(sys.executable)
    assert seen["data"] == str(first[0] / "data")


def test_failures_are_told_with_notebook_cell_parameters_and_copy(first):
    folder, outcomes, _ = first
    assert failures([outcomes["writer"], outcomes["silent"]]) == ""
    lines = failures(list(outcomes.values())).splitlines()
    assert lines[:2] == ["2 of 4 notebooks failed.", "failing.ipynb, cell 3: ValueError: no luck (in: # the reason)"]
    assert lines[2] == f"  executed copy: {folder / 'executed' / 'failed' / 'failing.ipynb'}"
    assert lines[3].startswith("thief.ipynb, it wrote seen.json")
    unborn = Outcome(Job(folder / "n.ipynb", {"flag": True, "dataset": "x"}), "failed", 0, folder / "no", (), "E")
    assert failures([unborn]).splitlines()[1:] == [
        "n.ipynb, E",
        "  parameters: flag=True, dataset='x'",
        "  executed copy: none, its kernel did not start",
    ]


def test_failures_end_with_a_count_of_causes(tmp_path):
    errors = {
        "failed": ["cell 3: ValueError: no", "cell 5: ValueError: nor", "its process ended with status -9: x", ""],
        "lost": ["lost: each of 4 workers that had it died"],
    }
    outcomes = [
        Outcome(Job(tmp_path / "n.ipynb"), status, 0, tmp_path / "no", (), error)
        for status, texts in errors.items()
        for error in texts
    ]
    lines = failures(outcomes).splitlines()
    assert lines[0] == "4 of 5 notebooks failed."
    assert lines[-1] == "By cause: 2 x ValueError, 1 x its process ended with status -9, 1 x lost."


def test_a_job_with_a_name_of_its_own_has_a_folder_of_its_own():
    assert Job(Path("n.ipynb")).results_in(Path("r")) == Path("r")
    assert Job(Path("n.ipynb"), name="n").results_in(Path("r")) == Path("r")
    assert Job(Path("n.ipynb"), name="n-flag=True").results_in(Path("r")) == Path("r/n-flag=True")


def test_nothing_else_is_left_behind(first):
    folder, _, _ = first
    assert files_in(folder / "results") == {"seen.json", "deep/extra.txt"}
    assert not list((folder / "results").glob(".running-*"))
    copies = {"writer.ipynb", "silent.ipynb", "failed/failing.ipynb", "failed/thief.ipynb"}
    assert files_in(folder / "executed") == copies | {"writer.json", "silent.json"}
    assert not processes_of(folder)


def test_the_executed_copy_names_the_kernel_and_the_final_paths_and_has_no_stderr(first):
    folder, outcomes, _ = first
    copy = nbformat.read(outcomes["writer"].executed, 4)
    assert copy.metadata.papermill.output_path == str(outcomes["writer"].executed)
    streams = [output for output in outputs_of(outcomes["writer"].executed) if output.output_type == "stream"]
    assert [(stream.name, stream.text) for stream in streams] == [
        ("stdout", f"saved {folder / 'results' / 'seen.json'}\n")
    ]


def test_a_failure_is_told_by_cell_and_its_copy_lies_apart(first):
    folder, outcomes, _ = first
    outcome = outcomes["failing"]
    assert outcome.status == "failed"
    assert outcome.error == "cell 3: ValueError: no luck (in: # the reason)"
    assert outcome.results == ()
    assert outcome.executed == folder / "executed" / "failed" / "failing.ipynb"
    assert "An Exception was encountered" in nbformat.read(outcome.executed, 4).cells[0].source


def test_a_notebook_without_results_is_a_success(first):
    assert (first[1]["silent"].status, first[1]["silent"].results) == ("done", ())


def test_a_job_cannot_overwrite_the_result_of_another(first):
    outcome = first[1]["thief"]
    assert outcome.status == "failed"
    assert "seen.json, a result of writer" in outcome.error
    assert json.loads((first[0] / "results" / "seen.json").read_text())["parameters"][1] == 7  # the writer's


def test_a_terminal_shows_a_bar_per_notebook_and_one_of_all_jobs_and_a_line_per_end(first):
    screen = first[2]
    assert "writer: cell 0 of 4" in screen
    assert re.search(r"[1-4] of 4 jobs", screen)
    assert re.search(r"failing: cell [345] of 5", screen)
    assert "done     writer in" in screen
    assert "FAILED   failing: cell 3: ValueError: no luck" in screen


class Started(Exception):
    pass


@pytest.fixture
def again(first, tmp_path, monkeypatch):
    """A copy of the first batch, and a function that tells whether the writer would run again or be reused."""
    for name in ("results", "executed", "fwdlib"):
        shutil.copytree(first[0] / name, tmp_path / name)
    notebook = Path(shutil.copy(first[0] / "writer.ipynb", tmp_path / "writer.ipynb"))

    def start(*_):
        raise Started

    monkeypatch.setattr(places, "LocalJob", start)
    monkeypatch.setattr(stamps, "PACKAGE", tmp_path / "fwdlib")

    def status(parameters=first[1]["writer"].job.parameters, **options) -> str:
        folders = {"results": tmp_path / "results", "executed": tmp_path / "executed"}
        try:
            return run_batch([Job(notebook, parameters)], **folders, **options)[0].status
        except Started:
            return "run"

    return tmp_path, status


def test_what_is_unchanged_is_reused(again, capsys):
    folder, status = again
    assert status() == "reused"
    assert capsys.readouterr().err == "reused   writer\n"
    assert status(progress=False) == "reused"
    assert capsys.readouterr().err == ""
    notebook = nbformat.read(folder / "writer.ipynb", 4)
    notebook.cells[2].outputs = [nbformat.v4.new_output("stream", text="an output is not part of the notebook")]
    nbformat.write(notebook, folder / "writer.ipynb")
    assert status() == "reused"
    assert status(resume=False) == "run"


def test_other_parameters_or_data_or_quick_mode_run_again(again, monkeypatch):
    _, status = again
    assert status(parameters={"steps": 8}) == "run"
    assert status(fingerprint="other data") == "run"
    monkeypatch.setenv("FWDLIB_QUICK", "1")
    assert status() == "run"


def test_results_on_a_substitute_are_reused_until_the_real_data_are_there(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text(json.dumps({"source": {"name": "digits", "substitute_for": "KMNIST"}}))
    (tmp_path / "b.json").write_text("[1, 2]")
    (tmp_path / "job.ipynb").write_text("executed")
    files = (tmp_path / "a.json", tmp_path / "b.json")
    stamps.write(tmp_path / "job.json", "print", 1.0, tmp_path, files)
    lacking = ["KMNIST", "CIFAR10"]
    monkeypatch.setattr(data, "lacking", lambda: lacking)
    assert stamps.valid_results(Job(tmp_path / "job.ipynb"), "print", tmp_path, tmp_path) == files
    lacking.remove("KMNIST")
    assert stamps.valid_results(Job(tmp_path / "job.ipynb"), "print", tmp_path, tmp_path) is None


@pytest.mark.parametrize("change", ["source", "markdown", "tags"])
def test_another_notebook_runs_again(again, change):
    folder, status = again
    notebook = nbformat.read(folder / "writer.ipynb", 4)
    if change == "tags":
        notebook.cells[2].metadata["tags"] = ["new"]
    else:
        notebook.cells[2 if change == "source" else 0].source += "\n"
    nbformat.write(notebook, folder / "writer.ipynb")
    assert status() == "run"


@pytest.mark.parametrize("name", ["results/seen.json", "results/deep/extra.txt", "executed/writer.json"])
def test_a_file_that_is_altered_or_gone_is_made_again(again, name):
    folder, status = again
    (folder / name).write_text("{}")
    assert status() == "run"
    (folder / name).unlink()
    assert status() == "run"


def test_an_executed_copy_that_is_gone_is_made_again(again):
    folder, status = again
    (folder / "executed/writer.ipynb").unlink()
    assert status() == "run"


def test_a_file_of_fwdlib_counts_if_the_notebook_can_reach_it(again):
    folder, status = again
    doctor = folder / "fwdlib" / "doctor.py"
    doctor.write_text(doctor.read_text() + "\n# another")
    assert status() == "reused"
    style = folder / "fwdlib" / "fwdlib.mplstyle"
    style.write_text(style.read_text() + "\n# another")
    assert status() == "run"


def test_time_outs_dead_kernels_and_killed_workers_are_failures_and_undo_the_stamp(tmp_path, capsys):
    slow = write_notebook(tmp_path / "slow.ipynb", "import time\nprint('begun')\ntime.sleep(100)")
    dead = write_notebook(tmp_path / "dead.ipynb", "import os\nos.kill(os.getpid(), 9)")
    orphan = write_notebook(tmp_path / "orphan.ipynb", "import os, time\nos.kill(os.getppid(), 9)\ntime.sleep(100)")
    executed = tmp_path / "executed"
    executed.mkdir()
    (executed / "slow.json").write_text("an older stamp")
    outcomes = run_batch([Job(slow), Job(dead), Job(orphan)], results=tmp_path / "r", executed=executed, timeout=10)
    assert [outcome.status for outcome in outcomes] == ["failed"] * 3
    assert outcomes[0].error == "cell 2: CellTimeoutError: the notebook took longer than 10 s (in: import time)"
    assert outcomes[1].error == "cell 2: DeadKernelError: Kernel died (in: import os)"
    assert "its process ended with status -9" in outcomes[2].error
    assert files_in(executed) == {"failed/slow.ipynb", "failed/dead.ipynb", "failed/orphan.ipynb"}
    assert "An Exception was encountered" in nbformat.read(outcomes[0].executed, 4).cells[0].source
    assert "begun\n" in [output.get("text") for output in outputs_of(outcomes[0].executed)]
    assert wait_until(lambda: not processes_of(tmp_path), 5)
    lines = capsys.readouterr().err
    assert "\r" not in lines  # no terminal, no bars
    assert lines.startswith("started  slow (3 cells)\nstarted  dead (3 cells)\nFAILED   dead: cell 2: DeadKernelError")


STOP = {
    "worker": "os.kill(os.getppid(), signal.SIGSTOP)",
    "kernel": "os.kill(os.getpid(), signal.SIGSTOP)",
    "both": "os.kill(os.getppid(), signal.SIGSTOP)\nos.kill(os.getpid(), signal.SIGSTOP)",
}


@pytest.mark.parametrize("stopped", STOP)
def test_the_time_out_holds_for_processes_that_hang(tmp_path, monkeypatch, stopped):
    monkeypatch.setattr(places.notebook, "OVERDUE", 15)
    hung = write_notebook(tmp_path / "hung.ipynb", f"import os, signal, time\n{STOP[stopped]}\ntime.sleep(300)")
    begun = time.monotonic()
    (outcome,) = run_batch([Job(hung)], results=tmp_path / "r", executed=tmp_path / "executed", timeout=8)
    assert time.monotonic() - begun < 60
    assert outcome.status == "failed"
    assert "the notebook took longer than 8 s" in outcome.error
    assert stopped == "kernel" or "its process hangs, or was stopped" in outcome.error
    assert wait_until(lambda: not processes_of(tmp_path), 5)
    assert not list((tmp_path / "r").iterdir())


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda sent: sent.name)
def test_an_interrupted_batch_leaves_nothing_and_can_be_run_again(tmp_path, sent):
    gate = "while not Path(dataset).exists():\n    time.sleep(0.05)"
    begun = "import tempfile, time\nfrom pathlib import Path\nunpacked = tempfile.mkdtemp()\n"
    begun += "Path(dataset).with_name('unpacked').write_text(unpacked)\n"
    start = begun + ONE_FILE.format(name="a.txt")
    notebook = write_notebook(tmp_path / "gated.ipynb", start, gate)
    results, executed = tmp_path / "results", tmp_path / "executed"
    arguments = {"notebook": notebook, "parameters": {"dataset": str(tmp_path / "gate")}}
    code = (
        "import signal; from pathlib import PosixPath; from fwdlib.runs.batch import run_batch\n"
        "from fwdlib.runs.jobs import Job\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored where the tests run in the background
        f"run_batch([Job(**{arguments!r})], results={results!r}, executed={executed!r}, num_jobs=1)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    try:
        assert wait_until(lambda: list(results.glob(".running-*/results/a.txt")), 120)
        assert len(processes_of(tmp_path)) >= 3  # batch, worker, kernel
    finally:
        process.send_signal(sent)
        _, errors = process.communicate()
    assert process.returncode != 0
    assert errors.rstrip().endswith("KeyboardInterrupt") == (sent == signal.SIGINT)
    assert wait_until(lambda: not processes_of(tmp_path), 5)
    assert wait_until(lambda: not list(results.iterdir()), 5)
    assert not executed.exists()
    assert not Path((tmp_path / "unpacked").read_text()).parent.exists()
    if sent == signal.SIGKILL:
        (tmp_path / "gate").touch()
        (outcome,) = run_batch([Job(**arguments)], results=results, executed=executed, num_jobs=1)
        assert (outcome.status, outcome.results) == ("done", (results / "a.txt",))
        assert files_in(executed) == {"gated.ipynb", "gated.json"}


def test_a_batch_that_dies_while_it_moves_results_leaves_no_stamp(again, monkeypatch):
    folder, status = again
    worker = object.__new__(LOCAL_JOB)
    worker.job, worker.begun, worker.folder = Job(folder / "writer.ipynb"), 0.0, folder / "worker"
    worker.staging, worker.process = worker.folder / "results", subprocess.CompletedProcess("", 0)
    worker.staging.mkdir(parents=True)
    for name in ("log.txt", "error.txt", "copy.ipynb", "results/seen.json"):
        (worker.folder / name).write_text("")

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("fwdlib.results.write_json", die)
    assert status() == "reused"
    with pytest.raises(KeyboardInterrupt):
        worker.collect("print", folder / "results", folder / "executed", {})
    assert (folder / "results" / "seen.json").read_text() == ""  # moved already
    assert not (folder / "executed" / "writer.json").exists()
    assert status() == "run"


def test_folders_of_dead_batches_are_removed_and_those_of_living_ones_are_not(tmp_path):
    here = socket.gethostname()
    names = [
        f".running-{here}-dead-x",
        f".running-{here}-alive-x",
        f".made-running-{here}-new-x",
        ".running-elsewhere-x-x",
    ]
    names += [".made-running-elsewhere-old-x"]
    old = f".made-running-{here}-old-x"  # its batch was killed before it had locked it
    for name in [*names, old]:
        (tmp_path / name).mkdir()
    for name in (names[-1], old):
        os.utime(tmp_path / name, (time.time() - 100,) * 2)
    with held(tmp_path / names[1]):
        assert run_batch([], results=tmp_path, executed=tmp_path / "executed") == []
    assert {path.name for path in tmp_path.iterdir()} == set(names[1:])


@pytest.fixture
def refuse(tmp_path, monkeypatch):
    """Run a batch that must be refused before anything runs; return the message."""

    def run(*jobs: Job, **options) -> str:
        monkeypatch.setattr(places, "LocalJob", None)
        with pytest.raises(ValueError, match=r".") as caught:
            run_batch(list(jobs), results=tmp_path / "results", executed=tmp_path / "executed", **options)
        assert not (tmp_path / "results").exists()
        return str(caught.value)

    return run


def test_parameters_are_checked(tmp_path, refuse):  # test_parameters.py has the other ways in which they can be wrong
    notebook = write_notebook(tmp_path / "n.ipynb")
    message = refuse(Job(notebook, {"lr": 0.1}))
    assert message == f"{notebook} has no parameter 'lr'; it has learning_rate, steps, flag, dataset"
    assert "parameter 'steps' of " in refuse(Job(notebook, {"steps": "7"}))


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden"])
def test_a_name_that_is_no_file_name_is_refused(tmp_path, refuse, name):
    assert repr(name) in refuse(Job(write_notebook(tmp_path / "n.ipynb"), name=name))


def test_a_name_given_twice_is_refused(tmp_path, refuse):
    notebook = write_notebook(tmp_path / "n.ipynb")
    assert "each job needs a name of its own, but 2 are named 'n'" in refuse(Job(notebook), Job(notebook, {"steps": 4}))


@pytest.mark.parametrize("options", [{"num_jobs": 0}, {"timeout": 0}, {"timeout": float("inf")}])
def test_numbers_are_checked(refuse, options):
    assert next(iter(options)) in refuse(**options)
