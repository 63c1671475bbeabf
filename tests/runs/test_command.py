"""`python -m fwdlib run`: from words to jobs to a table, again and again."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from fwdlib import cli
from fwdlib.runs import places, stamps
from tests.notebook_files import DEFAULTS, write_notebook
from tests.processes import wait_until

pytestmark = pytest.mark.slow  # starts processes

ROOT = Path(__file__).resolve().parents[2]
# What a notebook leaves, without the seconds that importing torch takes: one record, of a loss that is the rate.
TRAIN = """\
import json, os, time
from pathlib import Path
if learning_rate > 1:
    raise ValueError("too fast")
if optimizer == "late":
    time.sleep(300)
curve = {"train_loss": [learning_rate], "test_loss": [2 * learning_rate], "test_errors": [3], "step_seconds": []}
ends = {"status": "completed", "iterations": 5}
runs = [{"seed": seed + i, **ends, **curve} for i in range(num_seeds)]
record = json.loads(Path(os.environ["TEMPLATE"]).read_text()) | {"runs": runs}
record["parameters"] = {"seed": seed, "num_seeds": num_seeds, "learning_rate": learning_rate}
(Path(os.environ["FWDLIB_RESULTS"]) / "tiny.json").write_text(json.dumps(record))"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, outcome_of) -> Path:
    """A checkout with one notebook, a copy of fwdlib that nobody edits meanwhile, and what a record has besides."""
    root = tmp_path_factory.mktemp("root")
    (root / "pyproject.toml").write_text('[project]\nname = "fwdlib"\n')
    write_notebook(root / "notebooks" / "1b_tiny.ipynb", DEFAULTS, TRAIN)
    shutil.copytree(stamps.PACKAGE, root / "fwdlib", ignore=shutil.ignore_patterns("__pycache__"))
    template = outcome_of(root).results[-1].rename(root / "template.json")
    (root / "deep").mkdir()
    return template.parent


def enter(checkout: Path, patch: pytest.MonkeyPatch) -> None:
    """Go deep into the checkout, and leave behind what this machine has set."""
    for name in ("FWDLIB_RESULTS", "FWDLIB_DATA", "FWDLIB_QUICK"):
        patch.delenv(name, raising=False)
    patch.setenv("FWDLIB_OFFLINE", "1")
    patch.setenv("TEMPLATE", str(checkout / "template.json"))
    patch.setattr(stamps, "PACKAGE", checkout / "fwdlib")
    patch.chdir(checkout / "deep")


@pytest.fixture
def run(checkout, monkeypatch, capsys):
    """Run the command; return its exit code, stdout and stderr."""
    enter(checkout, monkeypatch)

    def run(words: str) -> tuple[int, str, str]:
        code = cli.main(["run", *words.split()])
        return code, *capsys.readouterr()

    return run


GRID = "--notebook 1b --set learning_rate=0.5,0.25,8 --seeds 2"


@pytest.fixture(scope="module")
def swept(checkout) -> tuple[int, str, str, Path]:
    """A command whose third job fails: exit code, what it said, and where its table is."""
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(io.StringIO()) as said,
        contextlib.redirect_stderr(io.StringIO()) as errors,
    ):
        enter(checkout, patch)
        code = cli.main(["run", *GRID.split(), "--jobs", "3"])
    return code, said.getvalue(), errors.getvalue(), checkout / "results" / "run" / "table.csv"


def test_a_failure_is_listed_with_cell_and_parameters_and_the_table_has_the_rest(swept, checkout):
    code, said, errors, path = swept
    assert code == 1
    assert said == f"4 rows, from 2 of 3 jobs, in {path}\n"
    end = errors[errors.index("1 of 3 notebooks failed.") :].splitlines()
    assert end[1:3] == [
        "1b_tiny.ipynb, cell 3: ValueError: too fast (in: import json, os, time)",
        "  parameters: num_seeds=2, learning_rate=8.0",
    ]
    assert "too fast" in Path(end[3].removeprefix("  executed copy: ")).read_text()
    frame = pd.read_csv(path)
    assert list(frame["learning_rate"]) == [0.5, 0.5, 0.25, 0.25]
    assert list(frame["test_loss"]) == [1.0, 1.0, 0.5, 0.5]
    assert list(frame["seed"]) == [0, 1, 0, 1]
    results = path.with_name("results")
    assert {file.relative_to(results).as_posix() for file in results.rglob("*.json")} == {
        f"1b_tiny-num_seeds=2-learning_rate={rate}/tiny.json" for rate in (0.5, 0.25)
    }


class Started(Exception):
    pass


@pytest.fixture
def no_start(monkeypatch, swept):
    """No job runs; what would have is listed."""
    started = []

    def start(job, *_):
        started.append(job.name.removeprefix("1b_tiny-num_seeds=2-"))
        raise KeyboardInterrupt

    monkeypatch.setattr(places, "LocalJob", start)
    return started


def test_the_same_command_runs_only_what_is_missing(run, no_start):
    code, said, errors = run(GRID)
    assert no_start == ["learning_rate=8.0"]
    assert code == 130
    assert said.startswith("4 rows, from 2 of 3 jobs")
    message = "python -m fwdlib: stopped. What was finished is kept; the same command goes on\n"
    assert errors.splitlines(keepends=True)[-1] == message
    run(GRID.replace(",8", ""))
    assert no_start == ["learning_rate=8.0"]  # nothing more


def test_a_larger_grid_runs_what_is_new_and_no_resume_runs_all(run, no_start):
    run(GRID.replace("0.5,", "0.5,0.125,"))
    assert no_start == ["learning_rate=0.125"]
    code, _, errors = run(f"{GRID} --no-resume")
    assert (code, no_start[1:]) == (130, ["learning_rate=0.5"])
    assert errors.endswith("the same command, without --no-resume, goes on\n")


def test_a_dry_run_lists_the_jobs_and_which_are_done(run, no_start):
    code, said, errors = run(f"{GRID} --dry-run")
    assert (code, errors, no_start) == (0, "", [])
    states = re.findall(r"^(done|to run) +1b_tiny-num_seeds=2-learning_rate=([\d.]+)$", said, re.MULTILINE)
    assert states == [("done", "0.5"), ("done", "0.25"), ("to run", "8.0")]
    assert "3 jobs, 1 to run, with results in " in said


@pytest.mark.parametrize("to", ["json", "parquet"])
def test_the_table_comes_in_other_formats_without_running_again(run, no_start, swept, tmp_path, to):
    if to == "parquet":
        pytest.importorskip("pyarrow")
    output = shutil.copytree(swept[3].parent, tmp_path / "moved")
    code, said, _ = run(f"{GRID.replace(',8', '')} --to {to} --output {output}")
    assert (code, no_start, said) == (0, [], f"4 rows, from 2 of 2 jobs, in {output / f'table.{to}'}\n")
    read = {"json": pd.read_json, "parquet": pd.read_parquet}[to]
    assert list(read(output / f"table.{to}")["train_loss"]) == [0.5, 0.5, 0.25, 0.25]


def test_a_declared_batch_runs_through_the_same_command(run, no_start, checkout, tmp_path):
    (checkout / "deep" / "b.toml").write_text("[notebooks.1b]\nlearning_rate = [0.5, 0.25]\nnum_seeds = [2]\n")
    code, said, _ = run("--batches b.toml")
    assert (code, no_start) == (0, [])
    assert said.startswith("4 rows, from 2 of 2 jobs")


def test_quick_runs_do_not_overwrite_real_ones(run, checkout, monkeypatch):
    monkeypatch.setenv("FWDLIB_QUICK", "1")
    _, said, _ = run(f"{GRID} --dry-run")
    assert said.endswith(f"3 jobs, 3 to run, with results in {checkout / 'results' / 'run-quick'}\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "run takes either --notebook NAME ... or --batches FILE, which declares notebooks"),
        ("--notebook 1b --batches b.toml", "run takes either --notebook NAME ... or --batches FILE"),
        ("--batches b.toml --seeds 2", "b.toml sets its own parameters: --set and --seeds go only with --notebook"),
        ("--batches b.toml --set seed=2", "b.toml sets its own parameters"),
        ("--batches no.toml", "no.toml"),
        ("--notebook 2", "no notebook '2' in "),
        ("--notebook 1b --set rate=1", "has no parameter 'rate'; it has seed, num_seeds"),
        ("--notebook 1b --jobs 0", "num_jobs must be a whole number of at least 1, got 0"),
    ],
)
def test_words_that_make_no_batch_are_refused_before_anything_runs(run, checkout, words, message):
    before = sorted(checkout.rglob("*"))
    code, said, errors = run(words)
    assert (code, said) == (1, "")
    assert message in errors
    assert "Traceback" not in errors
    assert sorted(checkout.rglob("*")) == before


def test_a_notebook_without_a_kernel_runs_and_one_without_a_record_is_named(run, checkout, tmp_path):
    path = write_notebook(tmp_path / "silent.ipynb", DEFAULTS, "print(seed)", kernel=None)
    code, said, errors = run(f"--notebook {path} --set seed=3 --output {tmp_path / 'out'}")
    assert (code, said) == (0, f"0 rows, from 0 of 1 jobs, in {tmp_path / 'out' / 'table.csv'}\n"), errors
    assert "No row for silent-seed=3: no record was left." in errors
    assert "save_run" in errors


def test_brackets_stay_together(run, tmp_path):
    path = write_notebook(tmp_path / "mine.ipynb", "tup = (1, 2)\nnothing = None")
    code, said, errors = run(f"--notebook {path} --output {tmp_path / 'out'} --dry-run --set nothing=[1,2]")
    assert (code, errors) == (0, "")
    assert "1 jobs, 1 to run" in said
    code, _, errors = run(f"--notebook {path} --output {tmp_path / 'out'} --dry-run --set tup=(1,2) nothing=[1,2]")
    assert code == 1
    assert "parameter 'tup' of" in errors
    assert "(1, 2) is a tuple, which papermill cannot pass on. Make the default a list" in errors


def test_a_substitute_is_told_at_the_start_and_at_the_end(run, tmp_path):
    used = TRAIN.replace(
        '"runs": runs}', '"runs": runs}\nrecord["source"] |= {"name": "digits", "substitute_for": "KMNIST"}'
    )
    path = write_notebook(tmp_path / "stand_in.ipynb", DEFAULTS, f"# load_kmnist()\n{used}")
    code, _, errors = run(f"--notebook {path} --output {tmp_path / 'out'}")
    assert code == 0, errors
    assert errors.startswith("KMNIST is not available: ")
    assert errors.splitlines()[-1].startswith("SUBSTITUTE: stand_in used digits in place of KMNIST")
    code, _, errors = run(f"--notebook {path} --output {tmp_path / 'out'}")
    assert "reused   stand_in" in errors
    assert errors.splitlines()[-1].startswith("SUBSTITUTE: stand_in used digits in place of KMNIST")


def test_control_c_keeps_what_is_finished_and_says_how_to_go_on(checkout, tmp_path):
    env = os.environ | {"PYTHONPATH": str(checkout), "FWDLIB_OFFLINE": "1", "TEMPLATE": str(checkout / "template.json")}
    env |= {"FWDLIB_RESULTS": str(tmp_path)}
    env.pop("FWDLIB_DATA", None)  # the record of the template is of a substitute
    command = [sys.executable, "-m", "fwdlib", "run", "--notebook", "1b", "--set", "optimizer=SGD,late", "--jobs", "1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=checkout / "deep", env=env, **pipes)
    late = "run/results/.running-*1b_tiny-optimizer=late-*/cell.txt"
    wait_until(lambda: process.poll() is not None or list(tmp_path.glob(late)), 120)
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    assert errors.endswith("stopped. What was finished is kept; the same command goes on\n")
    assert said == f"2 rows, from 1 of 2 jobs, in {tmp_path / 'run' / 'table.csv'}\n"
    assert list(pd.read_csv(tmp_path / "run" / "table.csv")["optimizer"]) == ["SGD"] * 2
    assert not list(tmp_path.glob("run/results/.running-*"))


def test_a_notebook_of_the_course(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("FWDLIB_QUICK", "1")
    monkeypatch.setenv("FWDLIB_OFFLINE", "1")
    monkeypatch.delenv("FWDLIB_DATA", raising=False)
    monkeypatch.chdir(ROOT / "notebooks" / "beyond")
    words = ["run", "--notebook", "1b", "--set", "num_tangents=3", "--seeds", "20", "--output", str(tmp_path)]
    assert cli.main([*words, "--jobs", "1", "--to", "json"]) == 0, capsys.readouterr().err
    frame = pd.read_json(tmp_path / "table.json")
    assert list(frame["seed"]) == [0, 1]  # quick mode has two
    assert set(frame["num_tangents"]) == {3}
    assert set(frame["iterations"]) == {20}
    assert set(frame["data"]) == {"penguins/processed"}
    assert frame["quick"].all()
    assert (frame["median_step_seconds"] > 0).all()


def test_the_commands_of_the_readme_are_possible(monkeypatch, capsys):
    monkeypatch.setenv("FWDLIB_OFFLINE", "1")
    monkeypatch.chdir(ROOT)
    commands = re.findall(r"python -m fwdlib (run .*)", (ROOT / "README.md").read_text())
    assert commands
    for command in commands:
        words = command.partition("#")[0].split()
        assert cli.main([*words, "--dry-run"]) == 0, capsys.readouterr().err
        assert "to run" in capsys.readouterr().out
