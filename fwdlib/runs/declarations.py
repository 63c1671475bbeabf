"""Notebooks over grids of parameters: a declaration becomes jobs.

A declaration says which notebooks run with which parameters. It comes from the command line or from a TOML file:

    [notebooks.1b_logistic_forward]     # or a beginning of the name that no other notebook has
    num_seeds = 20                      # one value
    learning_rate = [0.05, 0.1, 0.2]    # a list: a job for each of its values ...
    num_tangents = [1, 4]               # ... with each of these: 6 jobs

A list is always a grid, so a parameter that is a list itself needs two: ``hidden = [[64, 64]]``.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import nbformat

from fwdlib import data
from fwdlib.archives import stay_offline_without_network
from fwdlib.checks import check_count
from fwdlib.runs.jobs import Job
from fwdlib.runs.parameters import check_parameter, defaults_of, parse, split

Declaration = dict[str, dict[str, Any]]
LONGEST_NAME = 100  # of a job; a file's name may have 255 bytes, and a batch adds to it


def read_declaration(path: Path) -> Declaration:
    """Read the tables ``[notebooks.NAME]`` of a TOML file and ignore everything else in it.

    Args:
        path: of the file. A NAME that ends in ``.ipynb`` is a path from the file's folder.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is not TOML, or declares no notebook.
    """
    try:
        declared = tomllib.loads(path.read_text(encoding="utf-8")).get("notebooks")
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise ValueError(f"{path} is not TOML: {error}") from error
    if not (isinstance(declared, dict) and declared and all(isinstance(value, dict) for value in declared.values())):
        raise ValueError(f"{path} must declare notebooks, each as a table: [notebooks.1b_logistic_forward]")
    folder = path.resolve().parent
    return {str(folder / name) if name.endswith(".ipynb") else name: value for name, value in declared.items()}


def declaration_of(
    names: Iterable[str], settings: Iterable[str], num_seeds: int | None, folder: Path | None
) -> Declaration:
    """Return the declaration of a command line: every notebook with every setting.

    Args:
        names: of notebooks, or paths.
        settings: ``"name=value,value,..."``. The default in the notebook decides how a value is read.
        num_seeds: value for the notebooks' parameter of that name; None keeps their own.
        folder: of notebooks, see :func:`find_notebook`.

    Raises:
        FileNotFoundError: if there is no such notebook.
        ValueError: if a name is ambiguous, a setting has another form, or something is given twice.
    """
    words: dict[str, list[str]] = {}
    for setting in settings:
        name, equals, values = setting.partition("=")
        name = name.strip()
        if not (name and equals):
            raise ValueError(f"--set takes PARAMETER=VALUE,VALUE,..., got {setting!r}")
        try:
            found = split(values)
        except ValueError as error:
            raise ValueError(f"--set {name}: {error}") from error
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

    A job is named after its notebook and the values that were given as lists, in the order of the notebook's own
    parameters: so the same point has the same name in any grid. Characters that a file name cannot hold are replaced,
    and a hash keeps such names apart.

    Args:
        declared: parameters by notebook; a list is a grid.
        folder: of notebooks, see :func:`find_notebook`.

    Raises:
        FileNotFoundError: if there is no such notebook.
        ValueError: if a name is ambiguous or a notebook is declared twice; if it has no such parameter, a value is not
            of the type of the parameter's default, or a list is empty or has a value twice.
    """
    jobs: list[Job] = []
    for name, parameters in declared.items():
        notebook = find_notebook(name, folder)
        if notebook in {job.notebook for job in jobs}:
            raise ValueError(f"{notebook} is declared twice, the second time as {name!r}")
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
    """Return the path of the notebook that ``name`` stands for.

    Args:
        name: a path that ends in ``.ipynb``, or a notebook's name or its beginning, for example ``"1b"``.
        folder: that holds the notebooks with names, directly or in ``beyond/``; None outside a checkout.

    Raises:
        FileNotFoundError: if there is no such notebook.
        ValueError: if several names begin like this.
    """
    if name.endswith(".ipynb"):
        path = Path(name).expanduser().resolve()
        if not path.is_file():
            raise FileNotFoundError(f"there is no notebook at {path}")
        return path
    if folder is None:
        raise FileNotFoundError(
            f"no notebook {name!r}: names are looked up in notebooks/ and notebooks/beyond/ of a checkout of fwdlib, "
            f"and {Path.cwd()} is not in one. Change to a checkout, or give the path of a notebook, ending in .ipynb"
        )
    known = {path.stem: path.resolve() for part in (folder, folder / "beyond") for path in sorted(part.glob("*.ipynb"))}
    matching = [name] if name in known else [stem for stem in known if stem.startswith(name)]
    if len(matching) == 1:
        return known[matching[0]]
    if matching:
        raise ValueError(f"{name!r} can mean {', '.join(matching)}; write more of the name")
    raise FileNotFoundError(f"no notebook {name!r} in {folder}; there are {', '.join(known) or 'none'}")


def get_data(jobs: list[Job]) -> dict[str, str]:
    """Get the data sets that the jobs' notebooks name, before anything runs, and return those that cannot be had.

    The files of every other set have the published hashes, wherever they are; so the results depend on nothing else. If
    no host answers, it sets ``FWDLIB_OFFLINE``, so that the jobs do not ask again.

    Args:
        jobs: of a batch.

    Returns:
        Why a data set is missing, by its name. A set whose substitute has the same rows is not among them.
    """
    cells = [cell.source for path in {job.notebook for job in jobs} for cell in nbformat.read(path, 4).cells]
    text = "\n".join([*cells, *(repr(job.parameters) for job in jobs)])
    missing = {}
    for name in data.FETCHABLE:
        if re.search(rf"(?<![a-z0-9]){name}(?![a-z0-9])", text, re.IGNORECASE):
            try:
                data.fetch(name)
            except FileNotFoundError as error:
                missing |= {} if name == "penguins" else {name: str(error)}
            except data.DamagedFileError:
                pass  # the job that needs it says so
    stay_offline_without_network()
    return missing
