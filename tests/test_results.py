"""Records: read back as they were written, whole or not at all; the tables made from them."""

import dataclasses
import errno
import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from fwdlib import atomic, results
from fwdlib.data import Source
from fwdlib.history import History, Run
from fwdlib.results import comparison, interval_text, load_run, save_run, summary, table, write_json, write_text
from fwdlib.statistics import Interval

INF = math.inf
SOURCE = Source("penguins/processed", "a test", None, "0123456789abcdef", "CC0 1.0", "nobody", 0)
RUNS = [
    Run(4, "reached", 2, [1.5, 1.25, 0.25], [1.5, 1.0, 0.5], [20, 10, 5]),
    Run(5, "not reached", 3, [1.5, 1.25, 1.0, 0.75], [2.0, 1.5, 1.0, 1.0], [20, 15, 10, 10]),
    Run(6, "diverged", 1, [1.5, INF], [2.0, math.nan], [20, 25]),
]
ALONE = Run(4, "reached", 2, [1.5, 1.25, 0.25], [1.5, 1.0, 0.5], [20, 10, 5], [0.125, 0.375])


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    for name in ("FWDLIB_RESULTS", "FWDLIB_QUICK"):
        monkeypatch.delenv(name, raising=False)


def histories(runs=RUNS):
    params = [{"weight": torch.zeros(3, 4), "bias": torch.zeros(3)} for _ in runs]
    return {
        "history": History(runs, params, num_test=40, together=len(runs), seconds=1.0),
        "alone": History([ALONE], params[:1], num_test=40, together=1, seconds=0.5),
    }


def save(folder, name="1b_logistic_forward", parameters=None, **changes):
    parameters = {"learning_rate": 0.2, "device": "cpu"} if parameters is None else parameters
    options = {"title": "forward gradient", "source": SOURCE, "folder": folder, **histories(), **changes}
    return save_run(name, parameters=parameters, **options)


def names_in(folder):
    return [path.name for path in folder.iterdir()]


def same(first, second):
    return repr(first) == repr(second)  # unlike ==, takes nan for nan


# records


def test_a_record_is_read_back_as_it_was_saved(tmp_path):
    path = save(tmp_path / "a/b", parameters={"learning_rate": 0.2, "threshold": None, "optimizer": "SGD"})
    assert path == tmp_path / "a/b/1b_logistic_forward.json"
    record = load_run(path)
    assert same(record.runs, RUNS)
    assert same(record.alone, ALONE)
    assert (record.name, record.title) == ("1b_logistic_forward", "forward gradient")
    assert record.parameters == {"learning_rate": 0.2, "threshold": None, "optimizer": "SGD"}
    assert (record.num_test, record.num_params, record.together) == (40, 15, 3)
    assert record.source == SOURCE._asdict()
    assert record.environment["device"] == "cpu"
    assert record.environment["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert record.quick is False


def test_nan_and_both_infinities_survive(tmp_path):
    run = Run(0, "diverged", 2, [1.0, -INF, math.nan], [INF, 1.0, 2.0], [1, 2, 3], [INF])
    record = load_run(save(tmp_path, **histories([run])))
    assert same(record.runs, [run])


def test_a_record_is_json_that_any_reader_takes(tmp_path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    content = json.loads(save(tmp_path).read_text(), parse_constant=refuse)
    assert content["runs"][2]["train_loss"] == [1.5, "inf"]


def test_numbers_are_rounded_to_six_digits_and_counts_are_not(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": [1 / 3, (2e-9 / 3, -123456789.0)], "b": 123456789, "c": True, "d": np.float64(1 / 3)})
    content = json.loads(path.read_text())
    assert content == {"a": [0.333333, [6.66667e-10, -123457000.0]], "b": 123456789, "c": True, "d": 0.333333}


def test_parameters_are_read_back_bit_for_bit(tmp_path):
    parameters = {
        "learning_rate": 0.1 + 0.2,
        "threshold": math.inf,
        "lowest": [-math.inf, 1 / 3],
        "words": "inf",
        "nested": {"tiny": 5e-324, "none": None, "yes": True, "whole": 1.0},
    }
    found = load_run(save(tmp_path, parameters=parameters)).parameters
    assert repr(found) == repr(parameters)
    assert math.isnan(load_run(save(tmp_path, parameters={"rate": math.nan})).parameters["rate"])


def test_quick_mode_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setenv("FWDLIB_QUICK", "1")
    assert load_run(save(tmp_path)).quick is True


def test_the_folder_is_that_of_the_environment_unless_given(tmp_path, monkeypatch):
    monkeypatch.setenv("FWDLIB_RESULTS", str(tmp_path / "there"))
    assert save(None).parent == tmp_path / "there"
    assert save(tmp_path).parent == tmp_path


def test_a_missing_record_says_how_to_make_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no record at .*1a\.json; run the notebook 1a\.ipynb"):
        load_run(tmp_path / "1a.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"format": 1, "na', "is not JSON"),
        (b"", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[1, 2]", "is not a record of format 1"),
        (b'{"name": "1a"}', "is not a record of format 1"),
        (b'{"format": 2, "name": "1a"}', "is not a record of format 1"),
        (b'{"format": 1, "name": "1a"}', "is not a record of format 1"),
        (b'{"format": 1, "runs": [{"seed": 0, "colour": 1}], "alone": {}}', "is not a record of format 1"),
    ],
)
def test_a_file_that_is_no_record_says_what_to_do(tmp_path, content, message):
    path = tmp_path / "1a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_run(path)
    assert str(path) in str(error.value)
    assert "run 1a.ipynb again" in str(error.value)


def test_words_in_other_alphabets_survive_any_locale(tmp_path, monkeypatch):
    path = save(tmp_path, parameters={"characters": "おきすつ"})
    assert load_run(path).parameters == {"characters": "おきすつ"}
    path.write_text(path.read_text(encoding="utf-8").replace("\\u304a\\u304d\\u3059\\u3064", "おきすつ"), "utf-8")
    assert load_run(path).parameters == {"characters": "おきすつ"}


# whole or not at all


def no_space(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_new_file_replaces_the_old_one_and_can_be_read_by_others(tmp_path):
    path = tmp_path / "x.txt"
    write_text(path, "old ä\n")
    write_text(path, "new ö\n")
    assert path.read_bytes() == "new ö\n".encode()
    assert path.stat().st_mode & 0o777 == 0o644
    assert names_in(tmp_path) == ["x.txt"]


def test_the_old_file_is_there_until_the_new_one_is_complete(tmp_path, monkeypatch):
    path, seen = tmp_path / "x.txt", []
    write_text(path, "old")
    monkeypatch.setattr(os, "fsync", lambda _: seen.append(path.read_text()))
    with path.open() as reader:
        write_text(path, "new")
        assert reader.read() == "old"  # moved into place, not written over: a reader has one or the other
    assert seen == ["old"]
    assert path.read_text() == "new"


def test_a_full_disk_names_file_and_cause_and_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "1b_logistic_forward.json"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left on device") as error:
        save(tmp_path)
    assert f"could not write {path}: " in str(error.value)
    assert "free some space" in str(error.value)
    assert error.value.errno == errno.ENOSPC
    assert path.read_text() == "old"
    assert names_in(tmp_path) == [path.name]


FULL_DISK = """
import os, pathlib, sys
from fwdlib.results import write_text
path = pathlib.Path(sys.argv[1], "x.txt")
write_text(path, "old")
try:
    write_text(path, "new" * 200_000)
except OSError as error:
    print(error)
print(os.listdir(path.parent), path.read_text())
"""


def test_a_disk_that_is_really_full(tmp_path):
    # In a mount namespace of its own, so that no mount can be left behind, whatever happens.
    mount = 'mount -t tmpfs -o size=64k none "$1"'
    unshare = ["unshare", "-rm", "sh", "-c"]
    if not shutil.which("unshare") or subprocess.run([*unshare, mount, "sh", tmp_path], capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted in a namespace here")
    command = [*unshare, f'{mount} && exec "$2" -c "$3" "$1"', "sh", tmp_path, sys.executable, FULL_DISK]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    message, state = result.stdout.splitlines()
    assert f"could not write {tmp_path / 'x.txt'}: No space left on device. To go on, free some space" in message
    assert state == "['x.txt'] old"


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"could not write .*file/1b_logistic_forward\.json: ") as error:
        save(tmp_path / "file")
    assert "choose a folder you can write to (FWDLIB_RESULTS names the folder)" in str(error.value)
    assert names_in(tmp_path) == ["file"]


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    def denied(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(atomic.tempfile, "NamedTemporaryFile", denied)  # root may write anywhere
    with pytest.raises(PermissionError, match=r"could not write .*: Permission denied\. To go on, choose a folder"):
        save(tmp_path)


def test_a_folder_in_the_place_of_the_file(tmp_path):
    (tmp_path / "1b_logistic_forward.json").mkdir()
    with pytest.raises(OSError, match=r"could not write .*1b_logistic_forward\.json: "):
        save(tmp_path)
    assert names_in(tmp_path) == ["1b_logistic_forward.json"]


def test_nothing_is_left_when_it_is_interrupted(tmp_path, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path)
    assert names_in(tmp_path) == []


def test_what_is_no_json_is_refused_before_the_old_file_is_touched(tmp_path):
    path = save(tmp_path)
    before = path.read_bytes()
    with pytest.raises(TypeError, match="not JSON serializable"):
        save(tmp_path, parameters={"tangents": print})
    assert path.read_bytes() == before
    assert names_in(tmp_path) == [path.name]


# tables


@pytest.fixture
def record(tmp_path):
    return load_run(save(tmp_path))


def test_table_has_a_row_for_each_seed(record):
    other = dataclasses.replace(record, name="1a_logistic_backprop", title="backprop", runs=record.runs[:1])
    rows = table([record, other])
    assert rows["seed"].tolist() == [4, 5, 6, 4]
    assert rows["name"].tolist() == [record.name] * 3 + ["1a_logistic_backprop"]
    assert rows["title"].tolist() == ["forward gradient"] * 3 + ["backprop"]
    assert rows["status"].tolist() == ["reached", "not reached", "diverged", "reached"]
    assert rows["iterations"].tolist() == [2, 3, 1, 2]
    assert rows["train_loss"].tolist() == [0.25, 0.75, INF, 0.25]
    assert rows["test_loss"].tolist()[:2] == [0.5, 1.0]
    assert rows["test_errors"].tolist() == [5, 10, 40, 5]  # a diverged model gets all wrong
    assert rows["test_accuracy"].tolist() == [0.875, 0.75, 0.0, 0.875]


def test_summary_of_mixed_ends(record):
    column = summary([record])[record.name]
    assert column["seeds"] == "1 reached, 1 not reached, 1 diverged"
    assert column["iterations, median [95 % interval]"] == "never"  # two of three never arrived
    assert column["test accuracy at the end, median"] == "75.0 %"
    assert column["misclassifications at the end, median"] == "10 of 40"
    assert column["mean time of an iteration"] == "250.00 ms"
    assert column["total time"] == "0.50 s for 2 iterations"


def test_summary_of_seeds_that_arrived(record):
    runs = [Run(i, "reached", 10 * i, [1.0], [0.125 * i], [i]) for i in range(1, 8)]
    column = summary([dataclasses.replace(record, runs=runs)])[record.name]
    assert column["seeds"] == "7 reached"
    assert column["iterations, median [95 % interval]"] == "40 [10, 70]"
    assert column["test loss at the end, median"] == "0.500"


def test_iterations_of_seeds_that_did_not_arrive_are_infinite(record):
    runs = [*record.runs, Run(7, "completed", 100)]
    assert results.iterations(dataclasses.replace(record, runs=runs)) == [2, INF, INF, 100]


def test_comparison_takes_the_difference_seed_by_seed_over_the_seeds_that_finished_with_both(record):
    def ended(seed, iterations, loss, wrong, status="reached"):
        return Run(seed, status, iterations, [1.0, loss], [1.0, loss], [9, wrong], [0.5] * iterations)

    first = [ended(0, 10, 0.25, 2), ended(1, 20, 0.5, 4), ended(2, 30, 0.5, 4)]
    second = [ended(0, 11, 0.75, 1), ended(1, 24, 0.5, 4), ended(2, 99, 9.0, 9, "not reached")]
    records = [
        dataclasses.replace(record, title=title, runs=runs, alone=runs[0], num_test=10)
        for title, runs in (("backprop", first), ("forward gradient", second))
    ]
    table = comparison(*records)
    assert list(table) == ["backprop", "forward gradient", "mean difference, seed by seed"]
    found = list(table["mean difference, seed by seed"])
    assert found[0] == "2 pairs"
    assert [text.split()[0] for text in found[1:]] == ["+2.5", "+0.2500", "+5.0", "-0.5", "1.00", "1.10"]
    assert "[" in found[1]  # with its interval


def test_comparison_without_a_seed_that_finished_with_both_has_no_difference(record):
    never = [dataclasses.replace(run, status="not reached", test_loss=[1.0]) for run in record.runs]
    found = comparison(record, dataclasses.replace(record, title="other", runs=never))["mean difference, seed by seed"]
    assert list(found)[:5] == ["0 pairs", "none", "none", "none", "none"]


def test_summary_has_a_column_for_each_record(record):
    other = dataclasses.replace(record, name="1a_logistic_backprop")
    assert list(summary([record, other])) == ["1b_logistic_forward", "1a_logistic_backprop"]


@pytest.mark.parametrize(
    ("interval", "text"),
    [
        (Interval(1.0, 2.5, 4.0), "2.5 [1, 4]"),
        (Interval(1.0, INF, INF), "never [1, never]"),
        (Interval(math.nan, 2.0, math.nan), "2"),
    ],
)
def test_interval_text(interval, text):
    assert interval_text(interval) == text
