"""Notebooks over grids of parameters: a declaration becomes jobs, and what the jobs leave becomes one table.

A declaration says which notebooks run with which parameters: a dict of dicts, by the command line or from a TOML file.

    [notebooks.1b_logistic_forward]     # or any beginning of the name that no other notebook has
    num_seeds = 20                      # one value
    learning_rate = [0.05, 0.1, 0.2]    # a list: a job for each of its values ...
    num_tangents = [1, 4]               # ... with each of these: 6 jobs

A list is always a grid, so a parameter that is a list itself stands in two: ``hidden = [[64, 64]]``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import math
import os
import re
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from fwdlib import data, results
from fwdlib.archives import found_no_network
from fwdlib.atomic import write_bytes
from fwdlib.checks import check_choice, check_count
from fwdlib.runs.batch import Job, Outcome
from fwdlib.runs.parameters import check_parameter, defaults_of, parse

Declaration = dict[str, dict[str, Any]]
FORMATS = ("csv", "json", "parquet")
LONGEST_NAME = 100  # of a job; a file's name may have 255 bytes, and a batch puts more around it


# --- declarations ----------------------------------------------------------------------------------------------------


def read_declaration(path: Path) -> Declaration:
    """Read the tables ``[notebooks.NAME]`` of a TOML file; what else is in it belongs to others.

    Args:
        path: of the file. A NAME that ends in ``.ipynb`` is a path from the file's folder.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is not TOML, or declares no notebook.
    """
    try:
        declared = tomllib.loads(path.read_text(encoding="utf-8")).get("notebooks")
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError are ones
        raise ValueError(f"{path} is not TOML: {error}") from error
    if not (isinstance(declared, dict) and declared and all(isinstance(value, dict) for value in declared.values())):
        raise ValueError(f"{path} must declare notebooks, each as a table: [notebooks.1b_logistic_forward]")
    folder = path.resolve().parent
    return {str(folder / name) if name.endswith(".ipynb") else name: value for name, value in declared.items()}


def declaration_of(
    names: Iterable[str], settings: Iterable[str], num_seeds: int | None, folder: Path | None
) -> Declaration:
    """Return the declaration that a command line makes: every notebook with every setting.

    Args:
        names: of notebooks, or paths.
        settings: ``"name=value,value,..."``; what a value means is up to the default in the notebook.
        num_seeds: value for the notebooks' parameter of that name; None leaves their own.
        folder: of notebooks, see :func:`find_notebook`.

    Raises:
        FileNotFoundError: if there is no such notebook.
        ValueError: if a name is ambiguous, a setting is not of that form, or something is given twice.
    """
    words: dict[str, list[str]] = {}
    for setting in settings:
        name, equals, values = setting.partition("=")
        name, found = name.strip(), [value.strip() for value in values.split(",")]
        if not (name and equals):
            raise ValueError(f"--set takes PARAMETER=VALUE,VALUE,..., got {setting!r}")
        if "" in found:
            raise ValueError(f"--set {name} has an empty value in {setting!r}")
        if name in words or (name == "num_seeds" and num_seeds is not None):
            raise ValueError(f"{name} is given twice; give all its values at once: --set {name}=VALUE,VALUE,...")
        words[name] = found
    if num_seeds is not None:
        words["num_seeds"] = [str(check_count("seeds", num_seeds))]
    declared: Declaration = {}
    for notebook in [str(find_notebook(name, folder)) for name in names]:
        if notebook in declared:
            raise ValueError(f"--notebook names {notebook} twice")
        defaults = defaults_of(Path(notebook))
        declared[notebook] = {name: [parse(text, defaults.get(name)) for text in words[name]] for name in words}
    return declared


def jobs_of(declared: Declaration, folder: Path | None) -> list[Job]:
    """Return a job for each notebook and each point of its grid.

    The name of a job is that of its notebook and the values that were given as lists, in the order of the notebook's
    own parameters; so the same point has the same name in any grid. What no file name can hold is replaced, and a hash
    makes up for it.

    Args:
        declared: parameters by notebook; a list is a grid.
        folder: of notebooks, see :func:`find_notebook`.

    Raises:
        FileNotFoundError: if there is no such notebook.
        ValueError: if a name is ambiguous or a notebook comes twice; if it has no such parameter, a value is not of the
            type of the parameter's default, or a list is empty or has a value twice.
    """
    jobs: list[Job] = []
    for name, parameters in declared.items():
        notebook = find_notebook(name, folder)
        if notebook in {job.notebook for job in jobs}:
            raise ValueError(f"{notebook} is declared twice; the second time as {name!r}")
        jobs += _grid(notebook, parameters)
    return jobs


def _grid(notebook: Path, parameters: dict[str, Any]) -> Iterator[Job]:
    defaults, axes = defaults_of(notebook), {}
    for name, given in parameters.items():
        values = [check_parameter(notebook, defaults, name, v) for v in (given if isinstance(given, list) else [given])]
        twice = [value for value in values if list(map(repr, values)).count(repr(value)) > 1]
        if twice or not values:
            fault = f"has {twice[0]!r} twice" if twice else "has no value"
            raise ValueError(f"parameter {name!r} of {notebook} {fault}: {given!r}")
        axes[name] = values
    order = [name for name in defaults if name in axes]
    for values in itertools.product(*(axes[name] for name in order)):
        point = dict(zip(order, values, strict=True))
        listed = {name: value for name, value in point.items() if isinstance(parameters[name], list)}
        yield Job(notebook, point, _job_name(notebook.stem, listed))


def _job_name(stem: str, point: dict[str, Any]) -> str:
    full = "-".join([stem, *(f"{name}={value}" for name, value in point.items())])
    safe = re.sub(r"[^\w.=+-]", "_", full, flags=re.ASCII)
    if safe == full and len(full) <= LONGEST_NAME:
        return full
    return f"{safe[: LONGEST_NAME - 9]}-{hashlib.sha256(full.encode()).hexdigest()[:8]}"


def find_notebook(name: str, folder: Path | None) -> Path:
    """Return the one notebook that ``name`` means.

    Args:
        name: a path that ends in ``.ipynb``; else a name or its beginning, for example ``"1b"``.
        folder: where notebooks with names are, there or in ``beyond/``; None where there is no checkout.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if there are several.
    """
    if name.endswith(".ipynb"):
        path = Path(name).expanduser().resolve()
        if not path.is_file():
            raise FileNotFoundError(f"there is no notebook at {path}")
        return path
    if folder is None:
        raise FileNotFoundError(
            f"no notebook {name!r}: names are looked up in notebooks/ and notebooks/beyond/ of a checkout of fwdlib, "
            f"and {Path.cwd()} is in none. Go to one, or give the path of a notebook, ending in .ipynb"
        )
    known = {path.stem: path.resolve() for part in (folder, folder / "beyond") for path in sorted(part.glob("*.ipynb"))}
    matching = [name] if name in known else [stem for stem in known if stem.startswith(name)]
    if len(matching) == 1:
        return known[matching[0]]
    if matching:
        raise ValueError(f"{name!r} can be any of {', '.join(matching)}; write more of the name")
    raise FileNotFoundError(f"no notebook {name!r} in {folder}; there are {', '.join(known) or 'none'}")


def data_state() -> str:
    """Return what a batch's results depend on besides its jobs: the data sets that a substitute would stand in for.

    Where a set is the published one, its files have the published hashes, wherever they lie; so nothing else matters.
    Hosts are asked whether they answer. If none does, the processes that this one starts need not find out again.
    """
    lacking = data.lacking()
    if found_no_network():
        os.environ["FWDLIB_OFFLINE"] = "1"
    return f"without {', '.join(lacking)}" if lacking else ""


# --- tables ----------------------------------------------------------------------------------------------------------


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

    Columns: the job; its parameters, as given, else as recorded, but ``seed`` is the row's own; how the seed ended; the
    data; the machine. A missing value is of a parameter that the notebook does not have, or of no number. A seed that
    diverged has an infinite test loss. ``median_step_seconds`` is that of the first seed, run alone within its job, and
    a timing only where no other job ran beside it.

    Args:
        outcomes: of a batch; those that failed, and those that left no record, have no row.
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
            except ValueError:  # another file that the notebook left
                continue


def _plain(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (list, dict)) else value


def _column(values: list[Any]) -> pd.api.extensions.ExtensionArray:
    # Nullable types: a whole number stays one where another notebook has no such parameter.
    dtype = DTYPES.get(frozenset(type(value) for value in values if value is not None), "string")
    return pd.array([str(value) if dtype == "string" and value is not None else value for value in values], dtype=dtype)


def check_format(name: str) -> str:
    """Return the name of a table's format if it can be written here.

    Args:
        name: ``"csv"``, ``"json"`` or ``"parquet"``.

    Raises:
        ValueError: if it is another, or needs a package that is not installed.
    """
    check_choice("to", name, FORMATS)
    if name == "parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ValueError("parquet needs pyarrow, which is not installed here: pip install pyarrow, or take csv or json")
    return name


def write_table(frame: pd.DataFrame, path: Path) -> None:
    """Write a table, whole or not at all, in the format that the ending of ``path`` names.

    JSON has no infinity; there it is the word "inf", as in the records.

    Args:
        frame: the table.
        path: of the file.

    Raises:
        OSError: if it cannot be written. What was there before is still there.
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
