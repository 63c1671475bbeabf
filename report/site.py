"""The course, to be read without running it: ``python -m report.site`` makes a page of each notebook, and an index.

The pages show what the committed notebooks hold: text, code and outputs; nothing is executed. They look like the report
and need no network; the same notebooks give the same bytes.
"""

from __future__ import annotations

import ast
import itertools
import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import nbformat
import tyro
from nbformat import NotebookNode

from fwdlib.atomic import write_bytes
from report.page import pandoc

HERE = Path(__file__).parent
ROOT = HERE.parent
READER = "ipynb+markdown_in_html_blocks"  # so that what is folded away is text, too
INDEX = """\
---
title: Gradients without backpropagation
subtitle: The notebooks of the course as they were executed, to read without running them
lang: en
---

Forward gradients train a model with one derivative along one random direction, and no way back. The first six
notebooks are pairs: *a* trains with backprop, *b* trains the same model with forward gradients. Each stands alone.
To run one, to change it, or to have your answers to its exercises checked, open its file in Jupyter.

{sections}
"""
SECTIONS = {"notebooks": "The six, in pairs", "notebooks/beyond": "Beyond the six"}


@dataclass
class Options:
    """Make a page of each committed notebook, and an index of them."""

    output: Path = HERE / "site"
    """Where the pages go. Pages of notebooks that are no more are removed."""


def main(options: Options) -> None:
    """Write the site, once all of it is made.

    Args:
        options: see :class:`Options`.

    Raises:
        OSError: if a page cannot be written.
    """
    output = options.output.expanduser().resolve()
    pages = build(find(ROOT), output)
    for name, text in pages.items():
        write_bytes(output / name, text.encode())
    for stale in {path.name for path in output.glob("*.html")} - set(pages):
        (output / stale).unlink()
    print(output / "index.html")


def find(root: Path) -> list[Path]:
    """Return the notebooks in the order of the course, those past the six last.

    Args:
        root: of the repository.
    """
    paths = [path for folder in SECTIONS for path in (root / folder).glob("[0-9]*.ipynb")]
    return sorted(paths, key=lambda path: (len(path.parts), int(re.match(r"\d+", path.name)[0]), path.name))


def build(paths: Sequence[Path], output: Path) -> dict[str, str]:
    """Return the HTML of all pages by file name, ``index.html`` among them.

    Args:
        paths: of the notebooks, in their order.
        output: the folder that they will lie in, for links to what lies elsewhere.
    """
    notebooks = [nbformat.read(path, as_version=4) for path in paths]
    titles = [title_of(notebook) for notebook in notebooks]
    said = docstrings(ROOT / "fwdlib")

    def make(index: int) -> str:
        links: list[pandoc.Link] = [
            {"href": "index.html", "text": "All notebooks"},
            {"href": relative(HERE / "report.html", output), "text": "The report"},
            {"href": relative(paths[index], output), "text": "This notebook's file"},
        ]
        turn: list[pandoc.Link] = [
            {"href": f"{paths[i].stem}.html", "text": text.format(titles[i]), "rel": rel}
            for i, rel, text in (
                (index - 1, "prev", "\N{LEFTWARDS ARROW} {}"),
                (index + 1, "next", "{} \N{RIGHTWARDS ARROW}"),
            )
            if 0 <= i < len(paths)
        ]
        options = [f"--metadata=title:{titles[index]}", "--metadata=lang:en", "--toc-depth=2"]
        prepared = nbformat.writes(prepare(notebooks[index], said))
        return pandoc.to_html(prepared, READER, links=links, turn=turn, options=options)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # each waits for a pandoc of its own
        pages = dict(zip((f"{path.stem}.html" for path in paths), pool.map(make, range(len(paths))), strict=True))
    links: list[pandoc.Link] = [{"href": relative(HERE / "report.html", output), "text": "The report"}]
    return {"index.html": pandoc.to_html(index_of(paths, notebooks, output), links=links), **pages}


def index_of(paths: Sequence[Path], notebooks: Sequence[NotebookNode], output: Path) -> str:
    """Return the index as Markdown: title, claim and file of each notebook.

    Args:
        paths: of the notebooks.
        notebooks: what they hold.
        output: folder of the pages.
    """
    entries: dict[str, list[str]] = {}
    for path, notebook in zip(paths, notebooks, strict=True):
        entry = f"### [{title_of(notebook)}]({path.stem}.html)\n\n{claim_of(notebook)}\n\n"
        entry += f"[{path.name}]({relative(path, output)}){{.file}}\n"
        entries.setdefault(next(folder for folder in SECTIONS if path.parent.match(folder)), []).append(entry)
    sections = [f"## {SECTIONS[folder]}\n\n" + "\n".join(entries[folder]) for folder in SECTIONS if folder in entries]
    return INDEX.format(sections="\n".join(sections))


def title_of(notebook: NotebookNode) -> str:
    """Return the first heading of a notebook."""
    return notebook.cells[0].source.split("\n", 1)[0].removeprefix("# ").strip()


def claim_of(notebook: NotebookNode) -> str:
    """Return what a notebook claims: its paragraph that begins so, in Markdown; empty if there is none."""
    found = re.search(r"^\*\*Claim\.\*\* (.+?)(?:\n\n|\Z)", notebook.cells[0].source, re.DOTALL | re.MULTILINE)
    return found[1] if found else ""


def prepare(notebook: NotebookNode, said: dict[str, str]) -> NotebookNode:
    """Return the notebook as pandoc shall read it: without its title, with descriptions of its figures.

    Args:
        notebook: left as it is.
        said: docstrings of the functions that draw, as :func:`docstrings` returns them.
    """
    notebook = nbformat.from_dict(json.loads(json.dumps(notebook)))
    notebook.cells[0].source = notebook.cells[0].source.partition("\n")[2].lstrip()
    heading = title_of(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            heading = [heading, *re.findall(r"^##+ (.+)$", cell.source, re.MULTILINE)][-1]
            continue
        data = [output.data for output in cell.get("outputs", []) if "data" in output]
        for html in (item for item in data if "text/html" in item):  # pandas' own style is ours to choose
            html["text/html"] = re.sub(r"<style.*?</style>| border=\"1\"", "", html["text/html"], flags=re.DOTALL)
        figures = [output for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
        calls = drawing_calls(cell.source)
        for figure, call in itertools.zip_longest(figures, calls[: len(figures)]):
            figure.metadata = {"image/png": {"alt": description(heading, call, said)}}
    return notebook


def drawing_calls(source: str) -> list[str]:
    r"""Return the functions named ``plot_...`` that a cell calls, in their order.

    Example:
        >>> drawing_calls("display(table, plotting.plot_training(record))\nplotting.plot_seeds(record)")
        ['plotting.plot_training', 'plotting.plot_seeds']
    """
    tree = ast.parse(re.sub(r"^(\s*)[%!].*$", r"\1pass", source, flags=re.MULTILINE))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    calls.sort(key=lambda call: (call.func.end_lineno, call.func.end_col_offset))
    names = [ast.unparse(call.func) for call in calls]
    return [name for name in names if name.rpartition(".")[2].startswith("plot_")]


def description(heading: str, call: str | None, said: dict[str, str]) -> str:
    """Return the alternative text of a figure: where it is, and what the function that drew it says that it draws.

    Args:
        heading: of the figure's section.
        call: the function, with its module; None if it is not known.
        said: docstrings.

    Example:
        >>> description("Training", "plotting.plot_seeds", {"plotting.plot_seeds": "Draw every seed's loss."})
        "Figure of the section “Training”: every seed's loss."
    """
    where = f"Figure of the section \N{LEFT DOUBLE QUOTATION MARK}{heading}\N{RIGHT DOUBLE QUOTATION MARK}"
    text = said.get(call or "", "").removeprefix("Draw ")
    return f"{where}: {text}" if text else f"{where}, described in the text around it."


def docstrings(folder: Path) -> dict[str, str]:
    """Return the first lines of the docstrings of all functions ``plot_...``, by module and name; nothing is imported.

    Args:
        folder: with Python files, at any depth.
    """
    found = {}
    for path in sorted(folder.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("plot_"):
                found[f"{path.stem}.{node.name}"] = (ast.get_docstring(node) or "").split("\n", 1)[0]
    return found


def relative(path: Path, folder: Path) -> str:
    """Return the link from a page in ``folder`` to ``path``."""
    return Path(os.path.relpath(path, folder)).as_posix()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
