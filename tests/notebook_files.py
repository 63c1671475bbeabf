"""Small notebooks, for tests that run or read some."""

from __future__ import annotations

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
