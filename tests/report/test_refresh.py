"""The command that refreshes the committed notebooks: badges, setup cells, what it takes out."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import nbformat
import pytest
from PIL import Image

from report import notebooks as refresh

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = "https://github.com/someone/somewhere"


@pytest.fixture
def notebook():
    return nbformat.read(ROOT / "notebooks" / "1b_logistic_forward.ipynb", as_version=4)


def sources(notebook):
    return [cell.source for cell in notebook.cells]


def test_the_committed_notebooks_are_as_the_command_writes_them(notebook):
    before = sources(notebook)
    refresh.write_setup(notebook, "notebooks/1b_logistic_forward.ipynb", None)
    assert sources(notebook) == before


def test_without_an_address_there_is_no_badge_and_colab_gets_the_wheel(notebook):
    refresh.write_setup(notebook, "notebooks/1b_logistic_forward.ipynb", None)
    text = "\n".join(sources(notebook))
    assert "colab-badge" not in text
    assert "%pip install --quiet --no-deps fwdlib-*.whl palmerpenguins" in text
    assert "make wheel" in text


def test_with_an_address_badge_and_setup_name_it_and_only_once(notebook):
    for _ in range(2):
        refresh.write_setup(notebook, "notebooks/1b_logistic_forward.ipynb", ADDRESS)
    text = "\n".join(sources(notebook))
    assert text.count("colab-badge.svg") == 1
    target = "https://colab.research.google.com/github/someone/somewhere/blob/main/notebooks/1b_logistic_forward.ipynb"
    assert f"]({target})" in notebook.cells[0].source
    assert f"%pip install --quiet --no-deps git+{ADDRESS} palmerpenguins" in text
    assert "make wheel" not in text
    refresh.write_setup(notebook, "notebooks/1b_logistic_forward.ipynb", None)
    assert "colab-badge" not in "\n".join(sources(notebook))


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks" / "beyond").glob("*.ipynb")), ids=lambda path: path.stem)
def test_the_verdicts_in_a_notebook_are_those_of_the_committed_results(path):
    notebook = nbformat.read(path, as_version=4)
    before = sources(notebook)
    assert sum("**Published, and checked.**" in source for source in before) == 1
    refresh.write_claims(notebook)
    assert sources(notebook) == before, "run: make notebooks ARGS='--write-only'"


def test_a_box_keeps_the_text_around_it_and_needs_a_claim():
    cell = nbformat.v4.new_markdown_cell("Before.\n\n> **Published, and checked.** Stale.\n> - stale\n\nAfter.")
    cell.metadata["claims"] = {"Rostami": "rostami2024"}
    notebook = nbformat.v4.new_notebook(cells=[cell])
    refresh.write_claims(notebook)
    assert cell.source.startswith("Before.\n\n> **Published, and checked.** ")
    assert cell.source.endswith("\n\nAfter.")
    assert "tale" not in cell.source
    assert cell.source.count("(Rostami): **") == 2
    cell.metadata["claims"] = {"Nobody": "nobody2020"}
    with pytest.raises(ValueError, match="judges no claim of nobody2020"):
        refresh.write_claims(notebook)
    cell.source, cell.metadata["claims"] = "no box", {"Rostami": "rostami2024"}
    with pytest.raises(ValueError, match="no line that begins with"):
        refresh.write_claims(notebook)


def timed_notebook(folder, code):
    cells = [nbformat.v4.new_markdown_cell("# A title"), nbformat.v4.new_markdown_cell("## Setup")]
    cells += [nbformat.v4.new_code_cell(""), nbformat.v4.new_code_cell(code)]
    cells[3].metadata["timed"] = [0]
    path = folder / "1_timed.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def test_a_notebook_in_which_only_times_differ_is_left_as_it_was(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(refresh, "ROOT", tmp_path)
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    code = "import time\nfrom IPython.display import display\ndisplay(time.time_ns())\ndisplay('a result')"
    path = timed_notebook(tmp_path, code)
    refresh.main(refresh.Options((path,)))
    first = path.read_bytes()
    assert b"a result" in first
    refresh.main(refresh.Options((path,)))
    assert path.read_bytes() == first
    assert "nothing new but measured times" in capsys.readouterr().out
    refresh.main(refresh.Options((path,), times=True))
    assert path.read_bytes() != first

    path.write_bytes(first.replace(b"'a result'", b"'another'"))
    refresh.main(refresh.Options((path,)))
    assert nbformat.read(path, as_version=4).cells[3].outputs[1]["data"]["text/plain"] == "'another'"


def test_clean_keeps_results_and_takes_out_the_rest():
    cell = nbformat.v4.new_code_cell("x")
    cell.metadata["execution"] = {"iopub.execute_input": "2026"}
    widget = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "0%"}
    cell.outputs = [
        nbformat.v4.new_output("stream", name="stdout", text="kept"),
        nbformat.v4.new_output("stream", name="stderr", text="a warning"),
        nbformat.v4.new_output("display_data", data=widget),
        nbformat.v4.new_output("execute_result", data={"text/plain": "3"}, execution_count=1),
    ]
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"widgets": {}, "papermill": {}})
    refresh.clean(notebook)
    assert [output.output_type for output in cell.outputs] == ["stream", "execute_result"]
    assert "execution" not in cell.metadata
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata["kernelspec"]["name"] == "python3"


def test_smaller_png_looks_the_same():
    image = Image.linear_gradient("L").convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, format="png")
    encoded = base64.b64encode(buffer.getvalue()).decode()
    smaller = Image.open(io.BytesIO(base64.b64decode(refresh.smaller_png(encoded)))).convert("RGB")
    difference = [abs(a - b) for a, b in zip(image.tobytes(), smaller.tobytes(), strict=True)]
    assert smaller.size == image.size
    assert max(difference) <= 4
