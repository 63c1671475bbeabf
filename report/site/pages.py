"""A Sphinx extension: the pages that are templates, filled with what the repository holds, and the report beside them.

Every page but the notebooks is a Jinja template. It can use :func:`notebooks`, :func:`reference`, :func:`public_names`,
:func:`promises` and :func:`reasons`, so that no list of notebooks, modules or promises is kept by hand, and no number.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jinja2
import nbformat
from docutils import nodes
from docutils.parsers.rst.states import Inliner
from sphinx import addnodes
from sphinx.application import Sphinx

from fwdlib.atomic import message_of

T = TypeVar("T")
REPORT = Path(__file__).parents[1]
ROOT = REPORT.parent
NOTEBOOK_LINK = re.compile(r'href="[^"]*?notebooks/([\w/]+)\.ipynb"')
REPORT_LINK = re.compile(r"\[([^\[\]\n]*)\]\((?:\.\./)*(?:report/)?report\.html(#[\w-]+)?\)")
PDF_LINK = '<li><a href="report.pdf"'


class Entry(NamedTuple):
    """A notebook in a list."""

    document: str
    """Its path from the site's sources, without the ending."""
    claim: str
    """The paragraph in which it says what it claims, in Markdown without links; empty if there is none."""


def notebooks(pattern: str) -> list[Entry]:
    """Return the notebooks of a pattern in the order of their numbers.

    Args:
        pattern: below the root of the repository, ``"notebooks/beyond/[0-9]*.ipynb"``.
    """
    paths = ROOT.glob(pattern)
    ordered = sorted(paths, key=lambda path: (int(re.match(r"\d+", path.name)[0]), path.name))
    documents = [path.relative_to(ROOT).with_suffix("").as_posix() for path in ordered]
    return [Entry(d, claim(nbformat.read(p, 4).cells[0].source)) for d, p in zip(documents, ordered, strict=True)]


def claim(text: str) -> str:
    r"""Return the paragraph of a notebook's first cell that begins with "Claim.".

    Example:
        >>> claim("# 1b\n\n**Claim.** As [1a](1a.ipynb), but *forward*.\n\nMore.")
        'As 1a, but *forward*.'
    """
    found = re.search(r"^\*\*Claim\.\*\* (.+?)(?:\n\n|\Z)", text, re.DOTALL | re.MULTILINE)
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", found[1]) if found else ""


def reference(package: str) -> str:
    """Return the reference of a package and of its modules, as reStructuredText.

    Args:
        package: its name, ``"fwdlib.stacked"``. Of ``"fwdlib"`` itself only the modules of the core, not the wings.
    """
    walk = pkgutil.iter_modules if package == "fwdlib" else pkgutil.walk_packages
    found = walk(importlib.import_module(package).__path__, f"{package}.")
    modules = [name for _, name, is_package in found if not ((package == "fwdlib" and is_package) or "._" in name)]
    titles = [(name.removeprefix(f"{package}."), name) for name in sorted(modules)]
    sections = [f"{title}\n{'-' * len(title)}\n\n.. automodule:: {name}\n" for title, name in titles]
    return "\n".join([f".. automodule:: {package}\n   :no-members:\n", *sections])


def public_names() -> dict[str, str]:
    """Return where each name of ``import fwdlib`` is documented, by name: ``"fwdlib.estimators.forward_gradient"``."""
    package = importlib.import_module("fwdlib")
    values = {name: getattr(package, name) for name in getattr(package, "__all__", ())}
    return {name: f"{value.__module__}.{value.__qualname__}" for name, value in values.items() if callable(value)}


def promises() -> dict[str, list[Any]]:
    """Return the items of the fault drill, each with its promise, by the title of their kind."""
    from tests.drill.harness import KINDS
    from tests.drill.items import ITEMS

    return {title: [item for item in ITEMS.values() if item.kind == kind] for kind, title in KINDS.items()}


def reasons() -> str:
    """Return the table of the report that says when to avoid backprop, as Markdown."""
    from report.page.context import build_context, load_results
    from report.sections import choice

    return choice.markdown(choice.rows(build_context(load_results(REPORT / "results"))), "report.html")


def fill(app: Sphinx, document: str, source: list[str]) -> None:
    """Render a page that is a template, and make links to the report lead beside the pages."""
    if not document.startswith("notebooks/"):
        names: dict[str, Any] = {"notebooks": notebooks, "reference": reference, "public_names": public_names}
        names |= {"promises": promises, "reasons": reasons}
        source[0] = jinja2.Template(source[0], undefined=jinja2.StrictUndefined).render(names)
    up = "../" * document.count("/")
    source[0] = REPORT_LINK.sub(rf"<a href='{up}report.html\2'>\1</a>", source[0])  # MyST would look for a source


def mend_links(app: Sphinx, document: nodes.document) -> None:
    """Make links between notebooks lead to their pages.

    MyST resolves the symbolic link ``report/site/notebooks``, and so looks for the pages outside the site's sources.
    """
    for link in document.findall(addnodes.pending_xref):
        if Path(link["reftarget"]).is_relative_to(ROOT):
            link["reftarget"] = Path(link["reftarget"]).relative_to(ROOT).as_posix()


def keep_colons(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Keep napoleon from reading an attribute's docstring ``"Seeds: one each."`` as a type and a description."""
    if what in {"attribute", "data", "property"}:
        lines.insert(0, "\\")  # reads as nothing, and is a first line without a colon


def keep_bars(parser: Inliner, match: re.Match[str], line: int) -> tuple[str, list, str, list]:
    """Read ``|`` as itself. To reStructuredText ``|x|`` is a name to be substituted; in our docstrings it is a norm.

    Returns:
        The text up to the bar and with it, the nodes made of it, the text to go on with, and the parser's complaints.
    """
    return match.string[: match.end()], [], match.string[match.end() :], []


def copy_report(app: Sphinx, error: Exception | None) -> None:
    """Put the committed report beside the pages. It gets a link to them, and links to notebooks lead to their pages."""
    if error is None:
        text = (REPORT / "report.html").read_text(encoding="utf-8")
        text = NOTEBOOK_LINK.sub(r'href="notebooks/\1.html"', text)
        text = text.replace(PDF_LINK, f'<li><a href="index.html">The course</a></li>\n{PDF_LINK}', 1)
        (app.outdir / "report.html").write_text(text, encoding="utf-8")
        (app.outdir / "report.pdf").write_bytes((REPORT / "report.pdf").read_bytes())


def in_words(handler: Callable[..., T]) -> Callable[..., T]:
    """Return a step of the build that ends it with a sentence, not with a traceback, if a file cannot be used."""

    @functools.wraps(handler)
    def handle(*args: Any) -> T:
        try:
            return handler(*args)
        except (OSError, ValueError) as error:
            sys.exit(f"the site was not made: {message_of(error)}")  # of an exception, Sphinx would show a traceback

    return handle


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect the steps above to Sphinx's build."""
    Inliner.dispatch["|"] = keep_bars
    app.connect("source-read", in_words(fill))
    app.connect("doctree-read", mend_links)
    app.connect("autodoc-process-docstring", keep_colons, priority=400)  # napoleon's is 500
    app.connect("build-finished", in_words(copy_report))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
