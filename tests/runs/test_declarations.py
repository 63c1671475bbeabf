"""Declarations of notebooks and parameters, from the command line and from files, become jobs."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fwdlib import data
from fwdlib.runs import declarations
from fwdlib.runs.jobs import Job
from tests.notebook_files import DEFAULTS, write_notebook

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder of notebooks, as a checkout has."""
    folder = tmp_path_factory.mktemp("checkout") / "notebooks"
    for name in ("1a_line", "1b_line", "1b_line_again", "beyond/6_curve"):
        write_notebook(folder / f"{name}.ipynb", DEFAULTS)
    write_notebook(folder / "2_plain.ipynb", "steps = 3")
    return folder


def jobs_of(folder: Path, words: str, names: tuple[str, ...] = ("1a",), seeds: int | None = None) -> list[Job]:
    return declarations.jobs_of(declarations.declaration_of(names, words.split(), seeds, folder), folder)


# --- which notebooks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "found"),
    [("1a", "1a_line"), ("1b_line", "1b_line"), ("1b_line_", "1b_line_again"), ("6", "beyond/6_curve")],
)
def test_a_notebook_is_found_by_its_name_or_a_beginning_that_no_other_has(folder, name, found):
    assert declarations.find_notebook(name, folder) == (folder / f"{found}.ipynb").resolve()


def test_a_beginning_of_several_or_none_lists_what_there_is(folder):
    with pytest.raises(ValueError, match="'1b' can mean 1b_line, 1b_line_again; write more of the name"):
        declarations.find_notebook("1b", folder)
    with pytest.raises(FileNotFoundError, match="there are 1a_line, 1b_line, 1b_line_again, 2_plain, 6_curve"):
        declarations.find_notebook("7", folder)


def test_outside_a_checkout_only_paths_are_found(folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(
        FileNotFoundError, match=r"notebooks/ and notebooks/beyond/ of a checkout .* path of a notebook"
    ):
        declarations.find_notebook("1a", None)
    assert declarations.find_notebook("1a_line.ipynb", None) == (folder / "1a_line.ipynb").resolve()
    with pytest.raises(FileNotFoundError, match=re.escape(f"there is no notebook at {folder.resolve() / 'x.ipynb'}")):
        declarations.find_notebook("x.ipynb", folder)


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


def test_lists_on_the_command_line(folder):
    jobs = jobs_of(folder, "sizes=[8],[8,16] threshold=[0.1,0.2]")
    assert [job.parameters for job in jobs] == [
        {"sizes": [8], "threshold": [0.1, 0.2]},
        {"sizes": [8, 16], "threshold": [0.1, 0.2]},
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
        ("threshold=(1,2)", "as its default None, got (1, 2)"),
        ("seed=(1,2", "--set seed: ')' is missing at the end of '(1,2'"),
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
    with pytest.raises(ValueError, match=r"1a_line.ipynb is declared twice, the second time as '1a_line'"):
        declarations.jobs_of({"1a": {}, "1a_line": {}}, folder)


def test_in_a_file_a_list_is_a_grid_and_in_the_name_a_value_is_neither(folder, tmp_path):
    text = "[notebooks.1a]\nlearning_rate = [1, 0.5]\nseed = 3\nsizes = [[8], [8, 8]]\n"
    text += "[notebooks.6_curve]\n[other]\nx = 1"
    (tmp_path / "b.toml").write_text(text)
    jobs = declarations.jobs_of(declarations.read_declaration(tmp_path / "b.toml"), folder)
    names = [f"1a_line-learning_rate={rate}-sizes=_8" for rate in (1.0, 0.5)]
    assert [re.sub(r"(_8)_.*", r"\1", job.name) for job in jobs] == [*names[:1] * 2, *names[1:] * 2, "6_curve"]
    assert jobs[1].parameters == {"seed": 3, "learning_rate": 1.0, "sizes": [8, 8]}
    assert len({job.name for job in jobs}) == 5


def test_a_grid_of_nothing_is_refused(folder):
    with pytest.raises(ValueError, match=re.escape("has no value: []")):
        declarations.jobs_of({"1a": {"seed": []}}, folder)


def test_a_path_in_a_file_starts_at_the_file(folder, tmp_path, monkeypatch):
    notebook = write_notebook(tmp_path / "deep" / "own.ipynb", DEFAULTS)
    (tmp_path / "deep" / "b.toml").write_text('[notebooks."own.ipynb"]\nseed = [1, 2]')
    monkeypatch.chdir(tmp_path)
    jobs = declarations.jobs_of(declarations.read_declaration(Path("deep/b.toml")), folder)
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
        declarations.read_declaration(tmp_path / "b.toml")


def test_the_reports_own_batch_has_plain_names_so_its_results_lie_flat():
    jobs = declarations.jobs_of(declarations.read_declaration(ROOT / "report" / "batches.toml"), ROOT / "notebooks")
    assert {job.name for job in jobs} >= {"1a_logistic_backprop", "3b_cnn_forward"}
    for job in jobs:
        assert job.notebook.is_file()
        assert job.name == job.notebook.stem
        assert job.results_in(Path("results")) == Path("results")


@given(points=st.lists(st.dictionaries(st.sampled_from("ab"), st.text(max_size=120)), max_size=3))
def test_names_are_file_names_and_no_two_points_share_one(points):
    points = [dict(sorted(point.items())) for point in points]
    names = [declarations._job_name("1a_line", point) for point in points]
    assert all(re.fullmatch(r"1a_line[\w.=+-]*", name, re.ASCII) and len(name) <= 100 for name in names)
    assert len(set(names)) == len({repr(point) for point in points})


def test_the_data_that_notebooks_name_are_fetched_before_the_batch(monkeypatch, tmp_path):
    asked, had = [], {"penguins"}

    def fetch(name):
        asked.append(name)
        if name not in had:
            raise FileNotFoundError(f"no {name}")

    monkeypatch.setattr(data, "fetch", fetch)
    cells = [nbformat.v4.new_code_cell('data = load_kmnist()\nload_penguins()\ndataset = "cifar10"')]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "one.ipynb")
    jobs = [Job(tmp_path / "one.ipynb", {"other": "FashionMNIST"})]
    assert declarations.get_data(jobs) == {name: f"no {name}" for name in ("KMNIST", "FashionMNIST", "CIFAR10")}
    assert asked == ["penguins", "KMNIST", "FashionMNIST", "CIFAR10"]  # MNIST is none of them
    had |= {"KMNIST", "FashionMNIST", "CIFAR10"}
    assert declarations.get_data(jobs) == {}
    had.clear()
    assert "penguins" not in declarations.get_data(jobs)  # the package has the same rows
