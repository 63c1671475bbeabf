"""A Sphinx extension: alternative texts for the figures of notebooks, from the docstrings of their plot functions."""

from __future__ import annotations

import ast
import functools
import itertools
import re
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx

PACKAGE = Path(__file__).parents[2] / "fwdlib"


def describe_figures(app: Sphinx, document: nodes.document) -> None:
    """Give every figure of a notebook that has no alternative text one."""
    said = docstrings(PACKAGE)
    for cell in document.findall(lambda node: node.get("nb_element") == "cell_code" if hasattr(node, "get") else False):
        figures = [image for image in cell.findall(nodes.image) if not image.get("alt")]
        calls = drawing_calls(next(cell.findall(nodes.literal_block)).astext()) if figures else []
        for image, call in itertools.zip_longest(figures, calls[: len(figures)]):
            image["alt"] = description(heading_of(cell), call, said)


def heading_of(node: nodes.Node) -> str:
    """Return the title of the section that a node stands in."""
    while not isinstance(node, nodes.section):
        node = node.parent
    return next(node.findall(nodes.title)).astext()


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
    """Return the alternative text of a figure: where it is, and what its function's docstring says that it draws.

    Args:
        heading: of the figure's section.
        call: the function that drew it, with its module; None if it is not known.
        said: docstrings.

    Example:
        >>> description("Training", "plotting.plot_seeds", {"plotting.plot_seeds": "Draw every seed's loss."})
        "Figure of the section “Training”: every seed's loss."
    """
    where = f"Figure of the section \N{LEFT DOUBLE QUOTATION MARK}{heading}\N{RIGHT DOUBLE QUOTATION MARK}"
    text = said.get(call or "", "").removeprefix("Draw ")
    return f"{where}: {text}" if text else f"{where}, described in the text around it."


@functools.cache
def docstrings(folder: Path) -> dict[str, str]:
    """Return the first line of the docstring of each function ``plot_...``, by module and name; nothing is imported."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("plot_"):
                found[f"{path.stem}.{node.name}"] = (ast.get_docstring(node) or "").split("\n", 1)[0]
    return found


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect :func:`describe_figures` to Sphinx's build."""
    app.connect("doctree-read", describe_figures)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
