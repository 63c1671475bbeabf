"""What depends on what: between the modules, and on other packages."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "fwdlib"

# Bottom up: a module imports only from what stands before it. A new one goes to its place here.
LAYERS = (
    "checks",
    "recording",
    "files",
    "runtime",
    "archives",
    "data",
    "tangents",
    "perturbations",
    "dual_tensor",
    "dual_rules",
    "objectives",
    "estimators",
    "dual",
    "models",
    "exercises",
    "statistics",
    "history",
    "workers",
    "checkpoint",
    "stacking",
    "training",
    "results",
    "plotting",
    "contenders",
    "benchmark",
    "parameters",
    "batch",
    "cluster",
    "sweep",
    "beyond",
    "doctor",
    "cli",
    "__main__",
)


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
    layer = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    IMPORTS[layer] = IMPORTS.get(layer, set()) | imports_of(file)


def reached_from(module: str) -> set[str]:
    reached, waiting = set(), [module]
    while waiting:
        new = IMPORTS[waiting.pop()] - reached
        reached |= new
        waiting += new
    return reached


def test_imports_are_found_in_every_form(tmp_path):
    lines = "import fwdlib.data\nfrom fwdlib import runtime, results\nfrom fwdlib.methods.feedback import DFA"
    (tmp_path / "x.py").write_text(
        f"{lines}\ndef f():\n    import report.page.figures, json\n    from torch import nn\n"
    )
    assert imports_of(tmp_path / "x.py") == {"data", "runtime", "results", "beyond", "report"}


@pytest.mark.parametrize("module", sorted(IMPORTS))
def test_nothing_below_imports_anything_above(module):
    if module == "__init__":
        assert IMPORTS[module] == set()
        return
    assert module in LAYERS, f"give {module} its place in LAYERS"
    above = LAYERS[LAYERS.index(module) + (module == "beyond") :]
    assert IMPORTS[module] <= set(LAYERS) - set(above), f"{module} imports from above"


def test_runtime_imports_nothing_of_the_project_but_checks():
    assert IMPORTS["runtime"] <= {"checks"}
    assert IMPORTS["checks"] == set()


@pytest.mark.parametrize("module", ["plotting", "results"])
def test_figures_and_records_never_import_the_training_loop(module):
    assert not reached_from(module) & {"training", "estimators"}


def test_the_core_never_imports_beyond():
    assert [module for module in IMPORTS if "beyond" in IMPORTS[module] - {module}] in ([], ["cli"])


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
    return [Requirement(text) for texts in project["optional-dependencies"].values() for text in texts]


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
    optional = {"tensorflow_datasets"}
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
