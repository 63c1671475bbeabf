"""From Markdown or a notebook to one HTML page that needs no other file, no script to be complete, and no network."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import pypandoc

HERE = Path(__file__).parent
MARKDOWN = "markdown-tex_math_single_backslash"


class _Target(TypedDict):
    href: str
    text: str


class Link(_Target, total=False):
    """An entry of a page's navigation; ``rel`` says what the other page is to this one, ``"next"`` for example."""

    rel: str


def to_html(
    text: str,
    reader: str = MARKDOWN,
    *,
    resources: Path = HERE,
    notebooks: str = "",
    links: Sequence[Link] = (),
    turn: Sequence[Link] = (),
    options: Sequence[str] = (),
) -> str:
    r"""Return a whole page: ``page.html`` around the text, with style sheet, script and pictures inside.

    Formulas are MathML. Sections, figures and the first cells of tables get what links and screen readers need
    (``page.lua``); links to notebooks lead to their pages.

    Args:
        text: in the form that ``reader`` reads.
        reader: pandoc's name of that form.
        resources: folder that the text's pictures are relative to.
        notebooks: folder of the notebooks' pages, as seen from this page: ``"site/"``.
        links: beside the title.
        turn: below the text.
        options: further ones for pandoc.

    Example:
        >>> page = to_html("---\ntitle: One\nlang: en\n---\n\n[1a](../notebooks/1a.ipynb)", notebooks="site/")
        >>> '<a href="site/1a.html">' in page
        True
    """
    arguments = ["--standalone", f"--template={HERE / 'page.html'}", "--embed-resources", "--mathml", "--wrap=none"]
    arguments += [f"--resource-path={resources}{os.pathsep}{HERE}", f"--lua-filter={HERE / 'page.lua'}", "--toc"]
    arguments += [f"--metadata=notebooks:{notebooks}"]
    for name, entries in (("links", links), ("turn", turn)):
        escaped = [{key: html.escape(value) for key, value in entry.items()} for entry in entries]
        arguments.append(f"--variable-json={name}:{json.dumps(escaped)}")
    return pypandoc.convert_text(text, "html5", reader, extra_args=[*arguments, *options])
