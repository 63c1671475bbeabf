"""The rules that every notebook keeps, and that its exercises can be solved as their solutions say.

The static rules are those of the course's design: read like this they cannot rot. The exercises are run: each notebook
once, in quick mode, with the solutions put in.
"""

from __future__ import annotations

import ast
import json
import os
import re
import statistics
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDER = REPOSITORY / "notebooks"
DATA = Path(os.environ.get("FWDLIB_DATA") or REPOSITORY.parent / "shared" / "data")
CORE = tuple(
    f"{number}{letter}_{model}_{method}"
    for number, model in ((1, "logistic"), (2, "mlp"), (3, "cnn"))
    for letter, method in (("a", "backprop"), ("b", "forward"))
)
PATHS = sorted(FOLDER.glob("*.ipynb")) + sorted(FOLDER.glob("beyond/*.ipynb"))

HEADINGS = (
    "Setup",
    "Parameters",
    "Data",
    "The model",
    "The idea, by hand",
    "Many estimates average to the (backprop )?gradient",
    "A failure: .+",
    "One step by hand",
    "Training",
    "Saving the run",
    "What came out",
    "What this shows, and what it does not",
    "Exercises",
)
PARAMETERS = {"seed", "num_seeds", "learning_rate", "max_iterations", "optimizer", "device"}
FORWARD_PARAMETERS = {"num_tangents", "tangents", "blocks"}

START = "0_start"  # has no method, so no parameters, training or record
LESSONS = [path for path in PATHS if path.stem != START]

every_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
every_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
every_core_notebook = pytest.mark.parametrize("name", CORE)


def load(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def core(name: str) -> nbformat.NotebookNode:
    return load(FOLDER / f"{name}.ipynb")


def code_cells(notebook) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tagged(notebook, tag: str) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def tree(cell) -> ast.Module:
    """Parse a code cell; a line with a magic counts as ``pass``."""
    return ast.parse(re.sub(r"^(\s*)[%!].*$", r"\1pass", cell.source, flags=re.MULTILINE))


def parameters_of(notebook) -> dict[str, object]:
    (cell,) = tagged(notebook, "parameters")
    values = {}
    for statement in tree(cell).body:
        assert isinstance(statement, ast.Assign), f"no assignment: {ast.unparse(statement)}"
        (target,) = statement.targets
        values[target.id] = ast.literal_eval(statement.value)
    return values


def headings_of(notebook) -> list[str]:
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    return re.findall(r"^## (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)


def outputs_of(notebook) -> list[nbformat.NotebookNode]:
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def calls(node: ast.AST, name: str) -> bool:
    return any(isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == name for n in ast.walk(node))


def test_the_six_are_there():
    assert set(CORE) <= {path.stem for path in PATHS}


# every notebook


@every_notebook
def test_is_valid_and_names_the_kernel_that_every_headless_runner_finds(path):
    notebook = load(path)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"


@every_lesson
def test_has_one_parameters_cell_of_literals(path):
    parameters = parameters_of(load(path))
    assert set(parameters) >= PARAMETERS
    assert {"threshold", "num_iterations"} & set(parameters)


@every_notebook
def test_is_short_and_so_are_its_cells(path):
    notebook = load(path)
    lengths = [len(cell.source.splitlines()) for cell in code_cells(notebook)]
    assert path.stem == START or 20 <= len(notebook.cells) <= 30
    assert statistics.median(lengths) <= 12
    assert max(lengths) <= 25


@every_notebook
def test_starts_with_its_title_and_what_it_takes(path):
    first = load(path).cells[0]
    assert first.cell_type == "markdown"
    assert re.match(rf"# {path.stem.split('_')[0]} · .+\n", first.source)
    assert "**Claim.**" in first.source
    assert re.search(r"CPU cores; no GPU needed|needs a GPU", first.source)


@every_notebook
def test_code_keeps_to_what_the_project_allows(path):
    for cell in code_cells(load(path)):
        assert "sys.path" not in cell.source
        assert "functorch" not in cell.source
        assert not calls(tree(cell), "globals")
        for node in ast.walk(tree(cell)):
            loop = isinstance(node, (ast.For, ast.While, ast.ListComp, ast.GeneratorExp, ast.SetComp, ast.DictComp))
            assert not (loop and calls(node, "print")), f"printed inside a loop:\n{ast.unparse(node)}"
            assert not (isinstance(node, ast.ExceptHandler) and node.type is None), "a bare except"


@every_notebook
def test_installs_nothing_outside_colab(path):
    for cell in code_cells(load(path)):
        if re.search(r"^\s*[%!]\s*pip", cell.source, re.MULTILINE):
            assert re.search(r'^if "google\.colab" in sys\.modules:.*\n    %pip ', cell.source, re.MULTILINE)
            assert not re.search(r"^[%!]", cell.source, re.MULTILINE)


@every_notebook
def test_is_committed_executed_from_top_to_bottom(path):
    counts = [cell.execution_count for cell in code_cells(load(path))]
    assert counts == list(range(1, len(counts) + 1))


@every_notebook
def test_outputs_are_kept(path):
    for cell in code_cells(load(path)):
        last = tree(cell).body[-1]
        shows = isinstance(last, ast.Expr) and not calls(last, "assert_close")
        assert cell.outputs or not shows, f"no output of:\n{cell.source}"


@every_notebook
def test_outputs_are_clean(path):
    notebook = load(path)
    assert "widgets" not in notebook.metadata
    for output in outputs_of(notebook):
        assert output.output_type != "error"
        assert output.get("name") != "stderr"
        kinds = set(output.get("data", {}))
        assert kinds <= {"text/plain", "text/html", "text/markdown", "text/latex", "image/png"}


@every_notebook
def test_outputs_are_those_of_a_full_run_on_the_real_data_and_of_no_one_s_machine(path):
    text = "\n".join(output.get("text", "") + str(output.get("data", {})) for output in outputs_of(load(path)))
    assert "SUBSTITUTE" not in text
    assert "quick mode" not in text
    assert not re.search(r"/(home|root|work|tmp|Users)/", text)


@every_notebook
def test_has_figures(path):
    assert any("image/png" in output.get("data", {}) for output in outputs_of(load(path)))


@every_notebook
def test_file_is_small(path):
    assert path.stat().st_size <= 300_000


def test_the_start_page_leads_to_every_notebook_and_explains_twenty_words():
    text = "\n".join(cell.source for cell in load(FOLDER / f"{START}.ipynb").cells)
    assert {path.relative_to(FOLDER).as_posix() for path in LESSONS} <= set(re.findall(r"\]\(([^)#]+\.ipynb)\)", text))
    glossary = text.partition("## Twenty words")[2].partition("\n## ")[0]
    words = re.findall(r"^- \*\*(.+?)\*\*", glossary, re.MULTILINE)
    assert len(words) == 20
    assert words == sorted(words, key=str.lower)


@every_notebook
def test_links_to_notebooks_lead_somewhere(path):
    for cell in load(path).cells:
        for target in re.findall(r"\]\(([^)]+\.ipynb)\)", cell.source) if cell.cell_type == "markdown" else []:
            assert (path.parent / target).is_file(), target


# the six


@every_core_notebook
def test_headings_come_in_the_same_order_in_all_six(name):
    found = headings_of(core(name))
    assert len(found) == len(HEADINGS), found
    for heading, pattern in zip(found, HEADINGS, strict=True):
        assert re.fullmatch(pattern, heading), f"{heading!r} where {pattern!r} should be"


@every_core_notebook
def test_says_in_one_quoted_line_what_differs_from_its_twin(name):
    twin = next(n for n in CORE if n[0] == name[0] and n != name)
    before_setup = "\n".join(cell.source for cell in core(name).cells[:2]).partition("## Setup")[0]
    (quote,) = [line for line in before_setup.splitlines() if line.startswith(">")]
    assert re.fullmatch(rf"> \*\*What differs (in|from) \[{twin[:2]}\]\({twin}\.ipynb\): .+\*\*", quote)


@pytest.mark.parametrize("name", [name for name in CORE if name[1] == "b"])
def test_a_pair_has_the_same_parameters_but_for_those_of_the_tangents(name):
    twin = next(n for n in CORE if n[0] == name[0] and n != name)
    backprop, forward = parameters_of(core(twin)), parameters_of(core(name))
    assert set(forward) - set(backprop) == FORWARD_PARAMETERS
    assert {key: forward[key] for key in backprop} == backprop


@every_core_notebook
def test_compares_with_fwdlib(name):
    assert sum(calls(tree(cell), "assert_close") for cell in code_cells(core(name))) >= 3  # model, idea, step


# exercises


def stub_of(cell) -> ast.FunctionDef:
    (stub,) = [
        node
        for node in tree(cell).body
        if isinstance(node, ast.FunctionDef) and ast.unparse(node.body) == "raise NotImplementedError"
    ]
    return stub


def solution_of(cell, following) -> str:
    """Return the code folded at the start of the markdown cell after an exercise's."""
    assert following.cell_type == "markdown"
    folded = re.match(r"<details><summary>Solution</summary>\n\n(.*?)\n\n</details>", following.source, re.DOTALL)
    assert folded, f"no folded solution after {stub_of(cell).name}"
    (code,) = re.findall(r"^```python\n(.*?)^```$", folded[1], re.MULTILINE | re.DOTALL)
    return code


def solved(notebook) -> tuple[nbformat.NotebookNode, dict[str, tuple[int, int]]]:
    """Put after each exercise its solution with its checker; tell where exercise and solution are, by name."""
    cells, places = [], {}
    for i, cell in enumerate(notebook.cells):
        cells.append(cell)
        if "exercise" in cell.metadata.get("tags", []):
            stub = stub_of(cell)
            lines = cell.source.splitlines()
            rest = "\n".join(lines[: stub.lineno - 1] + lines[stub.end_lineno :])
            cells.append(nbformat.v4.new_code_cell(solution_of(cell, notebook.cells[i + 1]) + "\n\n" + rest))
            places[stub.name] = len(cells) - 2, len(cells) - 1
    notebook.cells = cells
    return notebook, places


@every_core_notebook
def test_exercises_are_stubs_with_a_checker_and_a_folded_solution(name):
    notebook = core(name)
    exercises = tagged(notebook, "exercise")
    assert len(exercises) >= 2
    for cell in exercises:
        stub = stub_of(cell)
        assert calls(tree(cell), "check")
        following = notebook.cells[notebook.cells.index(cell) + 1]
        defined = [node.name for node in ast.parse(solution_of(cell, following)).body if hasattr(node, "name")]
        assert stub.name in defined


def said(cell) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


@pytest.mark.slow
@every_notebook
def test_runs_in_quick_mode_and_the_solutions_pass_their_checkers(path, tmp_path, monkeypatch):
    for variable, folder in (("IPYTHONDIR", "ipython"), ("JUPYTER_RUNTIME_DIR", "runtime")):
        monkeypatch.setenv(variable, str(tmp_path / folder))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")  # the kernel "python3" is this Python
    monkeypatch.setenv("FWDLIB_QUICK", "1")
    monkeypatch.setenv("FWDLIB_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("MPLBACKEND", raising=False)
    if DATA.is_dir():
        monkeypatch.setenv("FWDLIB_DATA", str(DATA))
    notebook, places = solved(load(path))
    client = NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    for exercise, (stub, solution) in places.items():
        assert said(notebook.cells[stub]).startswith(f"{exercise}: not solved yet")
        assert said(notebook.cells[solution]).strip() == f"{exercise}: right."
    if path.stem not in CORE:
        return
    (file,) = (tmp_path / "results").iterdir()
    assert file.name == f"{path.stem}.json"
    assert set(json.loads(file.read_text())["parameters"]) == set(parameters_of(notebook))
    assert not any(output.get("name") == "stderr" for output in outputs_of(notebook))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "message"),
    [({"nmu_seeds": 3}, "this notebook has no parameter 'nmu_seeds'; it has seed, num_seeds"), ({"num_seeds": 0}, "0")],
)
def test_refuses_what_papermill_would_let_pass(given, message, tmp_path, monkeypatch):
    import papermill

    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")  # the kernel "python3" is this Python
    monkeypatch.setenv("FWDLIB_QUICK", "1")
    monkeypatch.setenv("FWDLIB_RESULTS", str(tmp_path / "results"))
    source = FOLDER / "1a_logistic_backprop.ipynb"
    with pytest.raises(papermill.PapermillExecutionError, match=message) as error:
        papermill.execute_notebook(source, tmp_path / "out.ipynb", given, kernel_name="python3", progress_bar=False)
    assert "check_inserted" in str(error.value)
    assert not (tmp_path / "results").exists()


@every_lesson
def test_checks_the_parameters_that_papermill_inserts(path):
    code = "\n".join(cell.source for cell in code_cells(load(path)))
    assert "runtime.summary(seeds, device, In)" in code
