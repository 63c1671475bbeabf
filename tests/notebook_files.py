"""Small notebooks, for tests that run or read some, and what a batch makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat

# The cell that the tests of `python -m fwdlib run` and of declarations share: a default of every kind.
DEFAULTS = 'seed = 0\nnum_seeds = 2\nlearning_rate = 0.1\noptimizer = "SGD"\nthreshold = None\nsizes = [64, 64]'
PYTHON = {"name": "python3", "display_name": "Python 3", "language": "python"}


def write_notebook(path: Path, parameters: str | None, *sources: str, kernel: dict | None = PYTHON) -> Path:
    """Write a notebook; return its path.

    Args:
        path: of the file; its folder is made.
        parameters: content of the cell tagged ``parameters``; None for no such cell.
        sources: of the cells of code that follow.
        kernel: that the notebook names; None for none.
    """
    tagged = [] if parameters is None else [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    cells = [*tagged, *map(nbformat.v4.new_code_cell, sources)]
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"kernelspec": kernel} if kernel else {}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), path)
    return path.resolve()


def stamp_times(output: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (output / "executed").glob("*.json")}


def content_of(output: Path) -> dict[str, bytes | str]:
    """Return all files of a batch, less the times and the folder's own name."""
    found: dict[str, bytes | str] = {}
    for path in sorted((output / "results").rglob("*")):
        if path.is_file():
            found[path.relative_to(output).as_posix()] = path.read_bytes()
    for path in sorted((output / "executed").rglob("*.ipynb")):
        copy = nbformat.read(path, 4)
        for part in [copy, *copy.cells]:
            part.metadata.pop("execution", None)
            for name in ("start_time", "end_time", "duration"):
                part.metadata.papermill.pop(name, None)
        for number, cell in enumerate(copy.cells):
            cell.id = str(number)  # papermill draws one for the cell it puts in
        found[path.relative_to(output).as_posix()] = nbformat.writes(copy).replace(str(output), "")
    for path in sorted((output / "executed").glob("*.json")):
        found[path.relative_to(output).as_posix()] = json.dumps(json.loads(path.read_text()) | {"seconds": 0})
    return found
