"""Tables: a row per seed, with columns that keep their types, in every format."""

from __future__ import annotations

import math
import os

import pandas as pd
import pytest

from fwdlib import cli
from fwdlib.history import History, Run
from fwdlib.runs import tables
from fwdlib.runs.jobs import Job, Outcome


def test_a_table_has_a_row_per_seed_with_parameters_results_data_and_machine(outcome_of, tmp_path, monkeypatch):
    monkeypatch.delenv("FWDLIB_QUICK", raising=False)
    exact = {"learning_rate": 0.123456789, "sizes": [8, 8]}
    rows = tables.table([outcome_of(tmp_path, given=exact)]).to_dict("records")
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


def test_whole_numbers_stay_whole_where_another_notebook_has_no_such_parameter(outcome_of, tmp_path):
    plain = outcome_of(tmp_path, "1a", recorded={"seed": 0, "threshold": 0.3})
    forward = outcome_of(tmp_path, "1b", recorded={"seed": 0, "num_tangents": 4, "threshold": None, "mixed": "x"})
    third = outcome_of(tmp_path, "1c", recorded={"seed": 0, "mixed": 1})
    frame = tables.table([plain, forward, third])
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
    frame = tables.table([failed, silent])
    assert len(frame) == 0
    assert list(frame) == [*tables.FIRST, *tables.LAST]
    tables.write_table(frame, tmp_path / "table.csv")
    assert (tmp_path / "table.csv").read_text() == ",".join(frame) + "\n"


def test_a_clock_that_was_not_running_leaves_no_time(outcome_of, tmp_path):
    history = History([Run(0, "completed", 1, [1.0], [1.0], [3])], [{}], 40, 1, 0.0)
    frame = tables.table([outcome_of(tmp_path, alone=history)])
    assert frame["median_step_seconds"].isna().all()


@pytest.mark.parametrize("to", tables.FORMATS)
def test_every_format_gives_the_table_back(outcome_of, tmp_path, to):
    if to == "parquet":
        pytest.importorskip("pyarrow")
    frame = tables.table([outcome_of(tmp_path, given={"learning_rate": 1e-17}), outcome_of(tmp_path, "1a")])
    path = tmp_path / "new" / f"table.{to}"
    tables.write_table(frame, path)
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
        tables.write_table(tables.table([]), path)
    assert path.read_text() == "old"


def test_parquet_without_pyarrow_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert tables.check_format("csv") == "csv"
    assert cli.main(["run", "--notebook", "1a", "--to", "parquet"]) == 1
    assert "parquet needs pyarrow, which is not installed here: pip install pyarrow" in capsys.readouterr().err
    with pytest.raises(ValueError, match="to must be one of 'csv', 'json', 'parquet', got 'xlsx'"):
        tables.check_format("xlsx")
