"""Which files of fwdlib a notebook's code can reach."""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
import pytest

from fwdlib.children import run
from fwdlib.runs import stamps
from fwdlib.runs.imports import Package
from fwdlib.runs.jobs import Job

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
FILES = {
    "__init__.py": 'PUBLIC = {"train": "training", "explain": "stacked.engine"}\ndef __getattr__(name): ...',
    "checks.py": "",
    "data.py": "from fwdlib.checks import check",
    "training.py": "def train():\n    from fwdlib.stacked.engine import Engine",
    "plotting.py": "from pathlib import Path\nSTYLE = Path(__file__).with_name('fwdlib.mplstyle')",
    "fwdlib.mplstyle": "",
    "doctor.py": "import fwdlib.data",
    "typed.py": "if TYPE_CHECKING:\n    from fwdlib import doctor\nelse:\n    import fwdlib.data",
    "probing.py": "COMMAND = ['python', '-m', 'fwdlib.stacked.memory']",
    "stacked/__init__.py": "",
    "stacked/engine.py": "from fwdlib import checks",
    "stacked/memory.py": "",
}
CHECKS, ENGINE = {"checks.py"}, {"stacked/__init__.py", "stacked/engine.py", "checks.py"}
TRAIN = {"training.py", *ENGINE}


@pytest.fixture
def package(tmp_path) -> Package:
    for name, content in FILES.items():
        path = tmp_path / "fwdlib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return Package(tmp_path / "fwdlib")


def reached(package: Package, code: str) -> set[str]:
    return {path.relative_to(package.folder).as_posix() for path in package.files_of(code)}


@pytest.mark.parametrize(
    ("code", "files"),
    [
        ("import fwdlib.data", {"data.py", *CHECKS}),
        ("import fwdlib.data as d", {"data.py", *CHECKS}),
        ("from fwdlib import data, checks", {"data.py", *CHECKS}),
        ("from fwdlib.data import load", {"data.py", *CHECKS}),
        ("from fwdlib.stacked import engine", ENGINE),
        ("import fwdlib.stacked.engine", ENGINE),
        ("def f():\n    from fwdlib import training", TRAIN),
        ("from fwdlib import train", TRAIN),
        ("from fwdlib import explain", ENGINE),
        ("import fwdlib as fl\nprint(fl.train(1))", TRAIN),
        ("import fwdlib\nfwdlib.explain.__doc__", ENGINE),
        ("import fwdlib", set()),
        ("import fwdlib.checks\nfwdlib.train", TRAIN),
        ("import fwdlib as fl\nfl.data.load()\nnp.train", {"data.py", *CHECKS}),
        ("import fwdlib as fl\ngetattr(fl, name)", TRAIN),
        ("from fwdlib import *", TRAIN),
        ("from fwdlib import plotting", {"plotting.py", "fwdlib.mplstyle"}),
        ("from fwdlib import typed", {"typed.py", "data.py", *CHECKS}),
        ("from fwdlib import probing", {"probing.py", "stacked/__init__.py", "stacked/memory.py"}),
        ("%pip install x\nif True:\n    !ls\n    import fwdlib.checks", CHECKS),
        ("import numpy, report", set()),
    ],
)
def test_imports_are_followed_in_every_form(package, code, files):
    found = reached(package, code)
    assert found - {"__init__.py"} == files
    assert ("__init__.py" in found) == ("fwdlib" in code)


def test_code_that_cannot_be_read_reaches_everything(package):
    assert reached(package, "x = !ls") == set(FILES)


@pytest.fixture
def fingerprint_of(tmp_path, monkeypatch):
    """Return a function that gives the fingerprint of a notebook of the course, after a file of fwdlib has changed."""

    def fingerprint(notebook: str, changed: str = "") -> str:
        folder = tmp_path / "fwdlib"
        if not folder.exists():
            stamps_package = stamps.PACKAGE
            for path in Package(stamps_package).all_files():
                copy = folder / path.relative_to(stamps_package)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(path.read_bytes())
        monkeypatch.setattr(stamps, "PACKAGE", folder)
        if changed:
            path = folder / changed
            path.write_text(path.read_text() + "\n# edited")
        (path,) = NOTEBOOKS.rglob(f"{notebook}_*.ipynb")
        return stamps.fingerprints([Job(path)], "")[path.stem]

    return fingerprint


@pytest.mark.parametrize("name", ["doctor.py", "cli.py", "runs/batch.py", "bench/measuring.py", "methods/feedback.py"])
def test_editing_what_a_notebook_cannot_reach_keeps_its_stamp(fingerprint_of, name):
    assert fingerprint_of("1a") == fingerprint_of("1a", name)


@pytest.mark.parametrize("name", ["estimators.py", "fwdlib.mplstyle", "stacked/estimator.py", "__init__.py"])
def test_editing_what_a_notebook_reaches_changes_its_stamp(fingerprint_of, name):
    # the stacked engine through the one lazy import of the core
    assert fingerprint_of("1a") != fingerprint_of("1a", name)


def test_a_wing_counts_for_the_notebooks_that_use_it(fingerprint_of):
    assert fingerprint_of("6") != fingerprint_of("6", "methods/feedback_figures.py")
    assert fingerprint_of("8") != fingerprint_of("8", "bench/measuring.py")


@pytest.mark.parametrize("notebook", ["1b_logistic_forward", "beyond/6_feedback_alignment"])
def test_all_that_a_notebook_imports_when_it_starts_is_found(notebook):
    cells = nbformat.read(NOTEBOOKS / f"{notebook}.ipynb", 4).cells
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    lines = [line for line in code.splitlines() if line.startswith(("from fwdlib", "import fwdlib"))]
    assert len(lines) > 5
    tell = "import sys; print(*(m.__file__ for n, m in sys.modules.items() if n.split('.')[0] == 'fwdlib'))"
    ended = run([sys.executable, "-c", "\n".join([*lines, tell])], folder=NOTEBOOKS.parent)
    loaded = {Path(word) for word in ended.stdout.split()}
    assert len(loaded) > 5
    assert loaded <= Package(stamps.PACKAGE).files_of(code)
