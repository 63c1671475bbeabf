"""What depends on what: between the modules, and on other packages."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import fwdlib

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "fwdlib"

# Bottom up: a module imports only from what stands before it. The core lies flat; a wing is a sub-package.
CORE = (
    "checks",
    "atomic",
    "locks",
    "runtime",
    "archives",
    "data",
    "tangents",
    "objectives",
    "estimators",
    "models",
    "exercises",
    "statistics",
    "history",
    "session",
    "seeds",
    "steps",
    "training",
    "results",
    "plotting",
    "drawings",
    "sliders",
    "children",
)
WINGS = {  # the wings that each may import
    "forward": (),
    "stacked": ("forward",),
    "methods": ("forward", "stacked"),
    "trainer": ("forward", "stacked", "methods"),
    "bench": ("forward", "stacked", "methods", "trainer"),
    "runs": (),
}
TOP = ("doctor", "cli", "__main__")
# forward_gradient calls the engines; no other module of the core imports a wing
LAZY = {("estimators", "forward"), ("estimators", "stacked"), ("forward", "stacked")}


def imports_of(path: Path) -> set[str]:
    """Return the modules of the project that a file imports, at its top or inside functions: ``data``, ``report``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import, line {node.lineno}"
            # `from fwdlib import data` names a module, `from fwdlib.data import Dataset` what is in one
            names = [f"fwdlib.{a.name}" for a in node.names] if node.module == "fwdlib" else [node.module]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            found |= {rest.split(".")[0]} if package == "fwdlib" and rest else {package} & {"report", "tests"}
    return found


FILES = sorted(PACKAGE.rglob("*.py"))
IMPORTS = {}
for file in FILES:
    room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    IMPORTS[room] = IMPORTS.get(room, set()) | imports_of(file)


def reached_from(module: str) -> set[str]:
    reached, waiting = set(), [module]
    while waiting:
        new = IMPORTS[waiting.pop()] - reached
        reached |= new
        waiting += new
    return reached


def test_imports_are_found_in_every_form(tmp_path):
    lines = "import fwdlib.data\nfrom fwdlib import runtime, results\nfrom fwdlib.methods.feedback import DFA"
    (tmp_path / "x.py").write_text(f"{lines}\ndef f():\n    import report.figures, json\n    from torch import nn\n")
    assert imports_of(tmp_path / "x.py") == {"data", "runtime", "results", "methods", "report"}


@pytest.mark.parametrize("module", sorted(set(IMPORTS) - {"__init__"}))
def test_a_module_imports_only_from_below(module):
    assert module in {*CORE, *WINGS, *TOP}, f"give {module} its place in CORE, WINGS or TOP"
    if module in CORE:
        below = set(CORE[: CORE.index(module)]) | {"children"} - {module}
    elif module in WINGS:
        below = {*CORE, *WINGS[module], module}
    else:
        below = {*CORE, *WINGS, *TOP[: TOP.index(module)]}
    lazy = {above for here, above in LAZY if here == module}
    assert IMPORTS[module] - below - lazy == set(), f"{module} imports from above"


@pytest.mark.parametrize(
    ("file", "wings"), [("estimators.py", ("forward", "stacked")), ("forward/derivatives.py", ("stacked",))]
)
def test_the_engines_are_imported_when_they_are_called(file, wings):
    tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
    at_the_top = [node.module for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert not [name for name in at_the_top if name.startswith(tuple(f"fwdlib.{wing}" for wing in wings))]


@pytest.mark.parametrize("module", ["plotting", "results"])
def test_figures_and_records_never_import_the_training_loop(module):
    assert not reached_from(module) & {"training", "estimators"}


@pytest.mark.parametrize("wing", WINGS)
def test_a_wing_says_what_it_is_for_and_who_uses_it(wing):
    docstring = ast.get_docstring(ast.parse((PACKAGE / wing / "__init__.py").read_text(encoding="utf-8")))
    assert len(docstring.splitlines()) >= 3
    assert "For " in docstring


def test_the_core_is_what_the_start_and_the_six_notebooks_import():
    reached = set()
    for path in sorted((REPOSITORY / "notebooks").glob("[0-3]*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        lines = [line for cell in cells if cell["cell_type"] == "code" for line in "".join(cell["source"]).splitlines()]
        code = "\n".join(line for line in lines if line.startswith(("from fwdlib", "import fwdlib")))
        for node in ast.parse(code).body:
            names = [a.name for a in node.names] if node.module == "fwdlib" else [node.module.split(".")[1]]
            reached |= {*names, *(module for name in names for module in reached_from(name))}
    assert reached - {"forward", "stacked"} <= set(CORE)
    assert set(CORE) - reached <= {"children", "locks", "exercises"}  # for the wings, and for the exercises' own cells


@pytest.mark.parametrize("name", fwdlib.PUBLIC)
def test_each_public_name_is_there(name):
    assert getattr(fwdlib, name) is getattr(importlib.import_module(f"fwdlib.{fwdlib.PUBLIC[name]}"), name)
    assert name in dir(fwdlib)
    assert fwdlib.PUBLIC[name].split(".")[0] in IMPORTS


def test_a_name_that_is_not_public_is_an_error_that_lists_the_others():
    with pytest.raises(AttributeError, match=r"'backward'.*forward_gradient"):
        _ = fwdlib.backward


def test_importing_fwdlib_imports_no_torch():
    code = "import sys, fwdlib; sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'matplotlib')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


def requirements() -> dict[str, tuple[Requirement, str]]:
    found = {}
    for line in (REPOSITORY / "requirements.txt").read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            text, _, reason = line.partition("#")
            requirement = Requirement(text.strip())
            assert requirement.name not in found, f"{requirement.name} twice"
            found[requirement.name] = requirement, reason.strip()
    return found


def dependencies() -> list[Requirement]:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [Requirement(text) for text in project["dependencies"]]


def extras() -> list[Requirement]:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    own = {"zoo"}  # installed by `make test-zoo` alone
    return [
        Requirement(t) for name, texts in project["optional-dependencies"].items() if name not in own for t in texts
    ]


def test_the_wheel_depends_on_what_requirements_txt_says():
    named = requirements()
    for dependency in dependencies() + extras():
        assert dependency.name in named, f"requirements.txt lacks {dependency}"
        assert str(named[dependency.name][0]) == str(dependency)


@pytest.mark.parametrize("name", requirements())
def test_every_requirement_has_a_lower_bound_alone_and_a_reason(name):
    requirement, reason = requirements()[name]
    assert re.fullmatch(r">=[\d.]+", str(requirement.specifier)), "a lower bound and nothing else"
    assert len(reason.split()) >= 1


def test_what_fwdlib_imports_is_a_dependency():
    # by the name of the import, where it is not that of the package; what a module can do without is left out
    names = {"sklearn": "scikit-learn", "PIL": "pillow"}
    tools = {"papermill", "nbformat", "psutil", "distributed"} | {"jupyter_client", "packaging"}  # the doctor's
    optional = {"tensorflow_datasets", "torchzero"}
    given = {dependency.name for dependency in dependencies()}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                roots = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                roots = {node.module.split(".")[0]}
            else:
                continue
            for root in roots - set(sys.stdlib_module_names) - {"fwdlib"} - tools - optional:
                assert names.get(root, root) in given, f"{path.name} imports {root}"
