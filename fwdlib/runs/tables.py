"""The results of a batch as one table, with a row per seed, and its file."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from fwdlib import results
from fwdlib.atomic import write_bytes
from fwdlib.checks import check_choice
from fwdlib.runs.jobs import Outcome

FORMATS = ("csv", "json", "parquet")
FIRST = ("notebook", "job", "method", "seed")
LAST = (
    *("status", "iterations", "train_loss", "test_loss", "test_errors", "test_accuracy", "median_step_seconds"),
    *("data", "substitute_for", "data_fingerprint", "quick", "fwdlib", "torch", "python"),
    *("system", "processor", "cores", "threads", "device"),
)
DTYPES = {
    frozenset({bool}): "boolean",
    frozenset({int}): "Int64",
    frozenset({float}): "Float64",
    frozenset({int, float}): "Float64",
}


def table(outcomes: Iterable[Outcome]) -> pd.DataFrame:
    """Return one row per seed of each record that the jobs left.

    Columns: the job; its parameters, as given or else as recorded, but ``seed`` is the row's own; how the seed ended;
    the data; the machine. A value is missing where a notebook has no such parameter, and where the number is nan. A
    seed that diverged has an infinite test loss. ``median_step_seconds`` is measured on the first seed, trained alone
    within its job. It is a timing only if no other job ran at the same time.

    Args:
        outcomes: of a batch. Jobs that failed and jobs that left no record have no row.
    """
    rows = [row for outcome in outcomes for row in _rows(outcome)]
    parameters = dict.fromkeys(name for row in rows for name in row if name not in (*FIRST, *LAST))
    return pd.DataFrame({name: _column([row.get(name) for row in rows]) for name in (*FIRST, *parameters, *LAST)})


def _rows(outcome: Outcome) -> Iterator[dict[str, Any]]:
    for record in _records(outcome):
        environment, steps = record.environment, record.alone.step_seconds
        about = {
            **{name: _plain(value) for name, value in (record.parameters | outcome.job.parameters).items()},
            "notebook": outcome.job.notebook.stem,
            "job": outcome.job.name,
            "method": record.title,
            "median_step_seconds": float(pd.Series(steps).median()) if steps else None,
            "data": record.source["name"],
            "substitute_for": record.source["substitute_for"],
            "data_fingerprint": record.source["fingerprint"],
            "quick": record.quick,
            **{name: environment["versions"].get(name) for name in ("fwdlib", "torch", "python")},
            **{name: environment.get(name) for name in ("system", "processor", "cores", "threads", "device")},
        }
        for run in results.table([record]).drop(columns=["name", "title"]).to_dict("records"):
            yield about | run


def _records(outcome: Outcome) -> Iterator[results.Record]:
    for path in outcome.results:
        if path.suffix == ".json":
            try:
                yield results.load_run(path)
            except ValueError:  # the notebook's own file, not a record
                continue


def _plain(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (list, dict)) else value


def _column(values: list[Any]) -> pd.api.extensions.ExtensionArray:
    # Nullable types keep whole numbers whole where another notebook has no such parameter.
    dtype = DTYPES.get(frozenset(type(value) for value in values if value is not None), "string")
    return pd.array([str(value) if dtype == "string" and value is not None else value for value in values], dtype=dtype)


def check_format(name: str) -> str:
    """Return the name of a table's format if this machine can write it.

    Args:
        name: ``"csv"``, ``"json"`` or ``"parquet"``.

    Raises:
        ValueError: if it is another name, or needs a package that is not installed.
    """
    check_choice("to", name, FORMATS)
    if name == "parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ValueError("parquet needs pyarrow, which is not installed here: pip install pyarrow, or use csv or json")
    return name


def write_table(frame: pd.DataFrame, path: Path) -> None:
    """Write a table, whole or not at all, in the format that the suffix of ``path`` names.

    JSON has no infinity, so the file has the word "inf", as the records do.

    Raises:
        OSError: if it cannot be written. The old file is left in place.
        ValueError: as :func:`check_format`.
    """
    to = check_format(path.suffix.removeprefix("."))
    if to == "parquet":
        content = frame.to_parquet(index=False)
    elif to == "csv":
        content = frame.to_csv(index=False).encode()
    else:
        rows = [{name: _word(value) for name, value in row.items()} for row in frame.to_dict("records")]
        content = (json.dumps(rows, indent=1, allow_nan=False) + "\n").encode()
    write_bytes(path, content)


def _word(value: Any) -> Any:
    if pd.isna(value):
        return None
    return str(value) if isinstance(value, float) and math.isinf(value) else value
