"""Stamps: which results are still valid, because everything that they depend on is still the same.

A stamp is written last, after the results of a job. It holds a fingerprint of what the job depends on and the hash of
each result file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import nbformat

from fwdlib.runs.imports import Package
from fwdlib.runs.jobs import Job

# results and runtime are imported where they are used: a Dask worker needs no torch, which takes two seconds.
PACKAGE = Path(__file__).parents[1]


def sources(paths: Iterable[Path] | None = None) -> dict[str, str]:
    """Return the hash of source files of fwdlib, by their paths in the package.

    Args:
        paths: of files. Default: all that a result can depend on.
    """
    paths = Package(PACKAGE).all_files() if paths is None else paths
    return {path.relative_to(PACKAGE).as_posix(): sha256(path) for path in sorted(paths)}


def fingerprints(jobs: list[Job], extra: str) -> dict[str, str]:
    """Return a hash of all that the results of each job depend on, by the job's name.

    That is the notebook's cells with their tags (but not their outputs), its parameters, the files of fwdlib that its
    code can reach, the versions of Python and torch, quick mode, and ``extra``, which stands for everything else, such
    as the data.
    """
    from fwdlib import runtime

    versions = runtime.versions()
    shared = {
        "versions": [versions[name] for name in ("python", "torch")],
        "quick": runtime.is_quick(),
        "extra": extra,
    }
    package = Package(PACKAGE)
    notebooks = {notebook: _content(notebook, package) for notebook in {job.notebook for job in jobs}}
    return {job.name: _hash_of(shared | notebooks[job.notebook] | {"parameters": job.parameters}) for job in jobs}


def _content(notebook: Path, package: Package) -> dict[str, Any]:
    cells = nbformat.read(notebook, 4).cells
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    return {
        "cells": [[cell.cell_type, cell.source, cell.metadata.get("tags", [])] for cell in cells],
        "fwdlib": sources(package.files_of(code)),
    }


def _hash_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write(stamp: Path, fingerprint: str, seconds: float, results: Path, files: Iterable[Path]) -> None:
    """Write the stamp of a job.

    Args:
        stamp: its path.
        fingerprint: of the job.
        seconds: that the job took.
        results: folder for result files.
        files: that the job has left there.

    Raises:
        OSError: if it cannot be written.
    """
    from fwdlib.results import write_json

    digests = {file.relative_to(results).as_posix(): sha256(file) for file in files}
    about = {"fingerprint": fingerprint, "seconds": seconds, "lacked": sorted(set(_lacked(files)))}
    write_json(stamp, about | {"results": digests})


def _lacked(files: Iterable[Path]) -> Iterator[str]:
    # The data sets that substitutes replaced, as the records say.
    for file in files:
        with suppress(ValueError, LookupError, TypeError):  # another kind of file
            if file.suffix == ".json" and (name := json.loads(file.read_text())["source"]["substitute_for"]):
                yield name


def valid_results(job: Job, fingerprint: str, results: Path, executed: Path) -> tuple[Path, ...] | None:
    """Return the result files of an earlier batch if its stamp is valid for the job's present fingerprint, or None.

    Results on a substitute are valid for as long as the data set cannot be had.
    """
    try:
        stamp = json.loads((executed / f"{job.name}.json").read_text())
        is_valid = stamp["fingerprint"] == fingerprint and (executed / f"{job.name}.ipynb").is_file()
        is_valid = is_valid and all(sha256(results / name) == digest for name, digest in stamp["results"].items())
        if is_valid and stamp["lacked"]:
            from fwdlib import data  # with torch, which a Dask worker may not have

            is_valid = {*stamp["lacked"]} <= {*data.lacking()}
        return tuple(results / name for name in stamp["results"]) if is_valid else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # no stamp, a damaged one, a lost result
        return None


def sha256(path: Path) -> str:
    """Return the hash of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
