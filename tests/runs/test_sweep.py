"""Sweeps: declarations become jobs, jobs become a table, and `python -m fwdlib run` does all of it, again and again."""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fwdlib import cli, data
from fwdlib.data import Source
from fwdlib.history import History, Run
from fwdlib.results import save_run
from fwdlib.runs import batch, sweep
from fwdlib.runs.batch import Job, Outcome

ROOT = Path(__file__).resolve().parents[2]
DEFAULTS = 'seed = 0\nnum_seeds = 2\nlearning_rate = 0.1\noptimizer = "SGD"\nthreshold = None\nsizes = [64, 64]'
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


def write_notebook(path: Path, source: str = "", defaults: str = DEFAULTS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [nbformat.v4.new_code_cell(defaults, metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell(source)]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path.resolve()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder of notebooks, as a checkout has."""
    folder = tmp_path_factory.mktemp("checkout") / "notebooks"
    for name in ("1a_line", "1b_line", "1b_line_again", "beyond/6_curve"):
        write_notebook(folder / f"{name}.ipynb")
    write_notebook(folder / "2_plain.ipynb", defaults="steps = 3")
    return folder


def jobs_of(folder: Path, words: str, names: tuple[str, ...] = ("1a",), seeds: int | None = None) -> list[Job]:
    return sweep.jobs_of(sweep.declaration_of(names, words.split(), seeds, folder), folder)


# --- which notebooks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "found"),
    [("1a", "1a_line"), ("1b_line", "1b_line"), ("1b_line_", "1b_line_again"), ("6", "beyond/6_curve")],
)
def test_a_notebook_is_found_by_its_name_or_a_beginning_that_no_other_has(folder, name, found):
    assert sweep.find_notebook(name, folder) == (folder / f"{found}.ipynb").resolve()


def test_a_beginning_of_several_lists_them(folder):
    with pytest.raises(ValueError, match="'1b' can be any of 1b_line, 1b_line_again; write more of the name"):
        sweep.find_notebook("1b", folder)


def test_a_beginning_of_none_lists_all(folder):
    with pytest.raises(FileNotFoundError, match="there are 1a_line, 1b_line, 1b_line_again, 2_plain, 6_curve"):
        sweep.find_notebook("7", folder)


def test_outside_a_checkout_only_paths_are_found(folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(
        FileNotFoundError, match=r"notebooks/ and notebooks/beyond/ of a checkout .* path of a notebook"
    ):
        sweep.find_notebook("1a", None)
    assert sweep.find_notebook("1a_line.ipynb", None) == (folder / "1a_line.ipynb").resolve()
    with pytest.raises(FileNotFoundError, match=re.escape(f"there is no notebook at {folder.resolve() / 'x.ipynb'}")):
        sweep.find_notebook("x.ipynb", folder)


# --- declarations ----------------------------------------------------------------------------------------------------


def test_words_make_all_combinations_with_the_types_of_the_defaults(folder):
    jobs = jobs_of(folder, "learning_rate=1,0.5 optimizer=1,Adam threshold=0.3", seeds=20)
    fixed = {"num_seeds": 20, "threshold": 0.3}
    points = [{**fixed, "learning_rate": rate, "optimizer": name} for rate in (1.0, 0.5) for name in ("1", "Adam")]
    assert [job.parameters for job in jobs] == points
    assert {tuple(map(type, job.parameters.values())) for job in jobs} == {(int, float, str, float)}
    assert [job.name for job in jobs][:2] == [
        "1a_line-num_seeds=20-learning_rate=1.0-optimizer=1-threshold=0.3",
        "1a_line-num_seeds=20-learning_rate=1.0-optimizer=Adam-threshold=0.3",
    ]


def test_each_notebook_gets_the_whole_grid_and_no_settings_make_one_job(folder):
    jobs = jobs_of(folder, "seed=1,2", names=("1a", "6"))
    assert [job.name for job in jobs] == ["1a_line-seed=1", "1a_line-seed=2", "6_curve-seed=1", "6_curve-seed=2"]
    (job,) = jobs_of(folder, "", names=("2",))
    assert (job.name, job.parameters) == ("2_plain", {})


def test_the_same_point_has_the_same_name_in_any_grid(folder):
    one, other = jobs_of(folder, "learning_rate=0.10 seed=3"), jobs_of(folder, "seed=3,4 learning_rate=0.2,1e-1")
    assert one[0].name in {job.name for job in other}
    assert [job.name for job in one] == ["1a_line-seed=3-learning_rate=0.1"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("rate=1", "has no parameter 'rate'; it has seed, num_seeds, learning_rate, optimizer, threshold, sizes"),
        ("seed=1.5", "parameter 'seed' of {path} takes a whole number, as its default 0, got '1.5'"),
        ("learning_rate=fast", "takes a number, as its default 0.1, got 'fast'"),
        ("sizes=32", "takes a list, as its default [64, 64], got '32'"),
        ("seed=1,2,01", "parameter 'seed' of {path} has 1 twice: [1, 2, 1]"),
        ("seed=1 seed=2", "seed is given twice; give all its values at once: --set seed=VALUE,VALUE,..."),
        ("seed=", "--set seed has an empty value in 'seed='"),
        ("seed=1,,2", "--set seed has an empty value in 'seed=1,,2'"),
        ("seed", "--set takes PARAMETER=VALUE,VALUE,..., got 'seed'"),
        ("=1", "--set takes PARAMETER=VALUE,VALUE,..., got '=1'"),
    ],
)
def test_words_that_make_no_grid_are_refused(folder, words, message):
    with pytest.raises(ValueError, match=re.escape(message.format(path=(folder / "1a_line.ipynb").resolve()))):
        jobs_of(folder, words)


def test_seeds_are_checked_and_not_given_twice(folder):
    with pytest.raises(ValueError, match="num_seeds is given twice"):
        jobs_of(folder, "num_seeds=3", seeds=4)
    with pytest.raises(ValueError, match="seeds must be a whole number of at least 1, got 0"):
        jobs_of(folder, "", seeds=0)
    with pytest.raises(ValueError, match=r"2_plain.ipynb has no parameter 'num_seeds'; it has steps"):
        jobs_of(folder, "", names=("2",), seeds=4)


def test_a_notebook_is_not_given_twice(folder):
    with pytest.raises(ValueError, match=r"1a_line.ipynb twice"):
        jobs_of(folder, "", names=("1a", "1a_line"))
    with pytest.raises(ValueError, match=r"1a_line.ipynb is declared twice; the second time as '1a_line'"):
        sweep.jobs_of({"1a": {}, "1a_line": {}}, folder)


def test_in_a_file_a_list_is_a_grid_and_in_the_name_a_value_is_neither(folder, tmp_path):
    text = "[notebooks.1a]\nlearning_rate = [1, 0.5]\nseed = 3\nsizes = [[8], [8, 8]]\n"
    text += "[notebooks.6_curve]\n[other]\nx = 1"
    (tmp_path / "b.toml").write_text(text)
    jobs = sweep.jobs_of(sweep.read_declaration(tmp_path / "b.toml"), folder)
    names = [f"1a_line-learning_rate={rate}-sizes=_8" for rate in (1.0, 0.5)]
    assert [re.sub(r"(_8)_.*", r"\1", job.name) for job in jobs] == [*names[:1] * 2, *names[1:] * 2, "6_curve"]
    assert jobs[1].parameters == {"seed": 3, "learning_rate": 1.0, "sizes": [8, 8]}
    assert len({job.name for job in jobs}) == 5


@pytest.mark.parametrize(("values", "message"), [([], "has no value: []"), ([1, 1], "has 1 twice: [1, 1]")])
def test_a_grid_of_nothing_or_with_a_value_twice_is_refused(folder, values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        sweep.jobs_of({"1a": {"seed": values}}, folder)


def test_a_path_in_a_file_starts_at_the_file(folder, tmp_path, monkeypatch):
    notebook = write_notebook(tmp_path / "deep" / "own.ipynb")
    (tmp_path / "deep" / "b.toml").write_text('[notebooks."own.ipynb"]\nseed = [1, 2]')
    monkeypatch.chdir(tmp_path)
    jobs = sweep.jobs_of(sweep.read_declaration(Path("deep/b.toml")), folder)
    assert [(job.notebook, job.name) for job in jobs] == [(notebook, "own-seed=1"), (notebook, "own-seed=2")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must declare notebooks"),
        ("[notebooks]", "must declare notebooks"),
        ("notebooks = 1", "must declare notebooks"),
        ("[notebooks]\n1a = 3", "must declare notebooks"),
        ("[notebook.1a]", "must declare notebooks"),
        ("[notebooks", "is not TOML"),
    ],
)
def test_a_file_that_declares_nothing_is_refused(tmp_path, text, message):
    (tmp_path / "b.toml").write_text(text)
    with pytest.raises(ValueError, match=rf"b.toml {message}"):
        sweep.read_declaration(tmp_path / "b.toml")


def test_the_reports_own_batch_has_plain_names_so_its_results_lie_flat():
    jobs = sweep.jobs_of(sweep.read_declaration(ROOT / "report" / "batches.toml"), ROOT / "notebooks")
    assert {job.name for job in jobs} >= {"1a_logistic_backprop", "3b_cnn_forward"}
    for job in jobs:
        assert job.notebook.is_file()
        assert job.name == job.notebook.stem
        assert job.results_in(Path("results")) == Path("results")


@given(points=st.lists(st.dictionaries(st.sampled_from("ab"), st.text(max_size=120)), max_size=3))
def test_names_are_file_names_and_no_two_points_share_one(points):
    points = [dict(sorted(point.items())) for point in points]
    names = [sweep._job_name("1a_line", point) for point in points]
    assert all(re.fullmatch(r"1a_line[\w.=+-]*", name, re.ASCII) and len(name) <= 100 for name in names)
    assert len(set(names)) == len({repr(point) for point in points})


# --- tables ----------------------------------------------------------------------------------------------------------


def outcome_of(folder: Path, name: str = "1b_line", *, given=None, recorded=None, runs=None, **changes) -> Outcome:
    """Return a job that succeeded and left a record, a text and a JSON file of another kind."""
    runs = runs or [Run(0, "reached", 2, [1.5, 0.25], [1.5, 0.5], [20, 5]), Run(1, "diverged", 1, [math.nan], [], [])]
    alone = Run(0, "reached", 2, [1.5, 0.25], [1.5, 0.5], [20, 5], [0.1, 0.4, 0.2])
    history, first = History(runs, [{}] * len(runs), 40, len(runs), 1.0), History([alone], [{}], 40, 1, 0.5)
    source = Source("digits", "a test", "KMNIST", "0123", "CC0 1.0", "nobody", 0)
    content = {"history": history, "alone": first, "parameters": recorded or {"seed": 0, "learning_rate": 0.123457}}
    record = save_run(name, title="forward gradient", source=source, folder=folder, **content | changes)
    (folder / "notes.txt").write_text("not a record")
    (folder / "other.json").write_text("{}")
    job = Job(folder / f"{name}.ipynb", given or {}, f"{name}-x")
    return Outcome(job, "done", 1.0, folder / "copy.ipynb", (folder / "notes.txt", folder / "other.json", record))


def test_a_table_has_a_row_per_seed_with_parameters_results_data_and_machine(tmp_path, monkeypatch):
    monkeypatch.delenv("FWDLIB_QUICK", raising=False)
    exact = {"learning_rate": 0.123456789, "sizes": [8, 8]}
    rows = sweep.table([outcome_of(tmp_path, given=exact)]).to_dict("records")
    assert [row["seed"] for row in rows] == [0, 1]
    assert [row["status"] for row in rows] == ["reached", "diverged"]
    assert [(row["test_loss"], row["test_errors"]) for row in rows] == [(0.5, 5), (math.inf, 40)]
    assert (rows[0]["test_accuracy"], rows[0]["train_loss"]) == (0.875, 0.25)
    assert pd.isna(rows[1]["train_loss"])
    expected = {"notebook": "1b_line", "job": "1b_line-x", "method": "forward gradient", "iterations": 2}
    expected |= {"learning_rate": 0.123456789, "sizes": "[8, 8]", "median_step_seconds": 0.2, "quick": False}
    expected |= {"data": "digits", "substitute_for": "KMNIST", "data_fingerprint": "0123"}
    assert expected.items() <= rows[0].items()
    assert all(rows[0][name] for name in ("fwdlib", "torch", "python", "system", "processor", "cores", "threads"))


def test_whole_numbers_stay_whole_where_another_notebook_has_no_such_parameter(tmp_path):
    plain = outcome_of(tmp_path, "1a", recorded={"seed": 0, "threshold": 0.3})
    forward = outcome_of(tmp_path, "1b", recorded={"seed": 0, "num_tangents": 4, "threshold": None, "mixed": "x"})
    third = outcome_of(tmp_path, "1c", recorded={"seed": 0, "mixed": 1})
    frame = sweep.table([plain, forward, third])
    names = ["notebook", "job", "method", "seed", "threshold", "num_tangents", "mixed", "status"]
    assert list(frame)[:8] == names  # the parameters stand together, before what came out
    assert list(frame["num_tangents"]) == [pd.NA, pd.NA, 4, 4, pd.NA, pd.NA]
    assert frame.dtypes[["seed", "threshold", "num_tangents", "mixed"]].astype(str).tolist() == [
        *("Int64", "Float64", "Int64", "string")
    ]
    assert list(frame["mixed"])[2:] == ["x", "x", "1", "1"]


def test_failures_and_jobs_without_a_record_have_no_row_and_an_empty_table_has_its_columns(tmp_path):
    failed = Outcome(Job(tmp_path / "n.ipynb"), "failed", 1.0, tmp_path / "n.ipynb", (), "cell 1: ...")
    silent = Outcome(Job(tmp_path / "m.ipynb"), "done", 1.0, tmp_path / "m.ipynb", ())
    frame = sweep.table([failed, silent])
    assert len(frame) == 0
    assert list(frame) == [*sweep.FIRST, *sweep.LAST]
    sweep.write_table(frame, tmp_path / "table.csv")
    assert (tmp_path / "table.csv").read_text() == ",".join(frame) + "\n"


def test_a_clock_that_was_not_running_leaves_no_time(tmp_path):
    history = History([Run(0, "completed", 1, [1.0], [1.0], [3])], [{}], 40, 1, 0.0)
    frame = sweep.table([outcome_of(tmp_path, alone=history)])
    assert frame["median_step_seconds"].isna().all()


@pytest.mark.parametrize("to", sweep.FORMATS)
def test_every_format_gives_the_table_back(tmp_path, to):
    if to == "parquet":
        pytest.importorskip("pyarrow")
    frame = sweep.table([outcome_of(tmp_path, given={"learning_rate": 1e-17}), outcome_of(tmp_path, "1a")])
    path = tmp_path / "new" / f"table.{to}"
    sweep.write_table(frame, path)
    back = {"csv": pd.read_csv, "json": pd.read_json, "parquet": pd.read_parquet}[to](path)
    assert list(back) == list(frame)
    assert list(back["learning_rate"]) == [1e-17, 1e-17, 0.123457, 0.123457]
    assert list(back["test_loss"]) == [0.5, math.inf] * 2
    assert list(back["train_loss"].isna()) == [False, True] * 2
    assert list(back["status"]) == ["reached", "diverged"] * 2
    assert [path.name for path in path.parent.iterdir()] == [f"table.{to}"]


def test_a_table_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "table.csv"
    path.write_text("old")

    def no_space(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match=r"could not write .*table.csv"):
        sweep.write_table(sweep.table([]), path)
    assert path.read_text() == "old"


def test_parquet_without_pyarrow_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert sweep.check_format("csv") == "csv"
    assert cli.main(["run", "--notebook", "1a", "--to", "parquet"]) == 1
    assert "parquet needs pyarrow, which is not installed here: pip install pyarrow" in capsys.readouterr().err
    with pytest.raises(ValueError, match="to must be one of 'csv', 'json', 'parquet', got 'xlsx'"):
        sweep.check_format("xlsx")


def test_only_which_sets_are_replaced_matters_of_the_data(monkeypatch):
    places = {"penguins": "palmerpenguins (the same rows), because ...", "KMNIST": "/data/KMNIST", "digits": "sklearn"}
    monkeypatch.setattr(data, "available", lambda: places)
    assert sweep.data_state() == ""
    places["KMNIST"] = "a download, because it is not in ..."
    assert sweep.data_state() == ""
    places |= {"KMNIST": "SUBSTITUTE digits, because no host answers", "CIFAR10": "nowhere, because no host answers"}
    assert sweep.data_state() == "without KMNIST, CIFAR10"


# --- python -m fwdlib run --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A checkout with one notebook, a copy of fwdlib that nobody edits meanwhile, and what a record has besides."""
    root = tmp_path_factory.mktemp("root")
    (root / "pyproject.toml").write_text('[project]\nname = "fwdlib"\n')
    write_notebook(root / "notebooks" / "1b_tiny.ipynb", TRAIN)
    shutil.copytree(Path(batch.__file__).parents[1], root / "fwdlib", ignore=shutil.ignore_patterns("__pycache__"))
    template = outcome_of(root).results[-1].rename(root / "template.json")
    (root / "deep").mkdir()
    return template.parent


def enter(checkout: Path, patch: pytest.MonkeyPatch) -> None:
    """Go deep into the checkout, and leave behind what this machine has set."""
    for name in ("FWDLIB_RESULTS", "FWDLIB_DATA", "FWDLIB_QUICK"):
        patch.delenv(name, raising=False)
    patch.setenv("FWDLIB_OFFLINE", "1")
    patch.setenv("TEMPLATE", str(checkout / "template.json"))
    patch.setattr(batch, "__file__", str(checkout / "fwdlib" / "runs" / "batch.py"))
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

    monkeypatch.setattr(batch, "_Worker", start)
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
        ("", "run takes either --notebook NAME, of notebooks, or --batches FILE, which declares them"),
        ("--notebook 1b --batches b.toml", "run takes either --notebook NAME, of notebooks, or --batches FILE"),
        ("--batches b.toml --seeds 2", "the parameters of b.toml are in it: --set and --seeds go with --notebook"),
        ("--batches b.toml --set seed=2", "the parameters of b.toml are in it"),
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


def test_control_c_keeps_what_is_finished_and_says_how_to_go_on(checkout, tmp_path):
    env = os.environ | {"PYTHONPATH": str(checkout), "FWDLIB_OFFLINE": "1", "TEMPLATE": str(checkout / "template.json")}
    env |= {"FWDLIB_RESULTS": str(tmp_path)}
    command = [sys.executable, "-m", "fwdlib", "run", "--notebook", "1b", "--set", "optimizer=SGD,late", "--jobs", "1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=checkout / "deep", env=env, **pipes)
    late = "run/results/.running-*-1b_tiny-optimizer=late-*/cell.txt"
    end = time.monotonic() + 120
    while process.poll() is None and not list(tmp_path.glob(late)) and time.monotonic() < end:
        time.sleep(0.05)
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
